"""Adapters on disk: exact, at home in PEFT, and back."""

import json

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.adapters import active_adapter, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.mounting import mounted_adapter
from labkit.lora.qlora import add_qlora
from labkit.models.surgery import untie_embeddings
from labkit.quant.model import dequantize_model, quantize_model
from tests.conftest import make_small_llama
from tests.formats.cases import adapted, logits, outputs, untied
from tests.lora.cases import FAMILIES, make_gpt2, make_model, randomize


@pytest.mark.parametrize("quantized", [False, True])
def test_reloaded_adapter_equals_the_live_one_bit_for_bit(tmp_path, quantized):
    model = adapted(quantized=quantized)
    save_adapter(model, tmp_path / "a")
    fresh = make_small_llama()
    if quantized:
        quantize_model(fresh, progress=False)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "a").eval()), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"variant": "rslora"},
        {"targets": "attention"},
        {"targets": [f"layers.{i}.mlp.up_proj" for i in (0, 2)]},
    ],
)
def test_peft_loads_what_is_saved_here(tmp_path, config):
    model = adapted(**config)
    save_adapter(model, tmp_path / "a")
    theirs = PeftModel.from_pretrained(make_small_llama(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_a_quantized_models_adapter_works_in_peft_on_the_dequantized_base(tmp_path):
    model = adapted(quantized=True)
    save_adapter(model, tmp_path / "a")
    base = make_small_llama()
    quantize_model(base, progress=False)
    theirs = PeftModel.from_pretrained(dequantize_model(base), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_loads_here(tmp_path, rslora):
    config = PeftConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=rslora, init_lora_weights=False
    )
    theirs = get_peft_model(make_small_llama(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(make_small_llama(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


CASES = {
    "rslora": (make_model, {"variant": "rslora"}),
    "dora": (make_model, {"variant": "dora"}),
    "rsdora": (make_model, {"variant": "rsdora", "targets": "attention"}),
    "patterns": (make_model, {"rank_pattern": {"down_proj": 8}, "alpha_pattern": {r"layers\.0\..*": 3}}),
    "b_random": (make_model, {"init": "b_random"}),
    "conv1d": (make_gpt2, {"variant": "dora"}),
    "embedding": (untied, {"targets": ["embed_tokens", "lm_head", "q_proj"]}),
    "full": (make_model, {"modules_to_save": ["model.norm"]}),
    "new head": (untied, {"modules_to_save": ["lm_head"]}),
    "some": (make_model, {"targets": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]}),
    "bert": (FAMILIES["bert"], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_here_is_exact_and_peft_loads_the_same(tmp_path, case):
    make, config = CASES[case]
    model = randomize(add_lora(make(), LoRAConfig(**{"r": 4, "alpha": 12} | config)))
    for name, module in mounted_adapter(model).modules.items():
        if name not in lora_layers(model):
            module.weight.data *= 1.5
    save_adapter(model, tmp_path / "a")
    before = outputs(model)
    assert not torch.equal(before, outputs(make()))
    assert torch.equal(outputs(load_adapter(make(), tmp_path / "a")), before)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "a"))
    torch.testing.assert_close(outputs(theirs), before, rtol=1e-5, atol=1e-5)


def test_twice_the_rank_may_be_more_than_a_layer_is_wide(tmp_path):
    model = randomize(add_lora(make_model(), LoRAConfig(r=20, init="pissa", targets=["k_proj"])))  # 32 x 64
    save_adapter(model, tmp_path / "a")
    again = load_adapter(make_model(), tmp_path / "a")
    assert next(iter(lora_layers(again).values())).r == 40
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_start_from_the_weight_goes_to_peft_as_plain_lora_or_as_it_is(tmp_path, init, plain):
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=12, init=init)))
    before = outputs(model)
    save_adapter(model, tmp_path / "a", plain=plain)
    assert json.loads((tmp_path / "a" / peft_folder.CONFIG).read_text())["r"] == (8 if plain else 4)
    for other in (
        load_adapter(make_model(), tmp_path / "a"),
        PeftModel.from_pretrained(make_model(), str(tmp_path / "a")),
    ):
        torch.testing.assert_close(outputs(other), before, rtol=1e-4, atol=2e-5)


PEFT_CASES = {
    "dora": (make_model, {"use_dora": True}),
    "rsdora": (make_model, {"use_dora": True, "use_rslora": True}),
    "pissa": (make_model, {"init_lora_weights": "pissa"}),
    "olora": (make_model, {"init_lora_weights": "olora", "use_rslora": True}),
    "patterns": (
        make_model,
        {"rank_pattern": {"down_proj": 2, "unused": 3}, "alpha_pattern": {"^model.layers.1.*": 5}},
    ),
    "conv1d": (make_gpt2, {}),
    "embedding": (untied, {"target_modules": ["embed_tokens", "v_proj"]}),
    "full": (make_model, {"modules_to_save": ["norm"], "target_modules": ["q_proj"]}),
    "expression": (make_model, {"target_modules": r".*\.1\..*(q|k)_proj"}),
    "layers": (make_model, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "excluded": (
        make_model,
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    ),
    "bert": (FAMILIES["bert"], {"target_modules": ["query", "value"]}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_saves_of_every_kind_loads_here(tmp_path, case):
    make, config = PEFT_CASES[case]
    torch.manual_seed(3)
    theirs = get_peft_model(
        make(), PeftConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | config)
    )
    for name, p in theirs.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data += 0.1 * torch.randn(p.shape)
        elif p.requires_grad:
            p.data *= 1 + 0.2 * torch.randn(p.shape)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(make(), tmp_path / "a")
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("init", ["pissa", "loftq_iter_2"])
def test_an_adapter_with_a_4_bit_base_of_its_own_is_loaded_with_that_base(tmp_path, init):
    model = randomize(
        add_qlora(make_model(), LoRAConfig(r=4, alpha=12, init=init), compute_dtype=torch.float32)
    )
    save_adapter(model, tmp_path / "a", plain=False)
    again = load_adapter(make_model(), tmp_path / "a", "again")
    assert torch.equal(outputs(again), outputs(model)) and active_adapter(again) == "again"
    save_adapter(again, tmp_path / "b", plain=False)
    assert torch.equal(outputs(load_adapter(make_model(), tmp_path / "b")), outputs(model))
    quantized = make_model()
    quantize_model(quantized, progress=False)
    for wrong in (quantized, make_model(seed=1)):
        with pytest.raises(AdapterMismatch, match="original model in full precision"):
            load_adapter(wrong, tmp_path / "a")
    if init == "pissa":  # the residual was quantized; the plain form leaves out only that error
        save_adapter(model, tmp_path / "c")
        load_adapter(make_model(), tmp_path / "c")
    else:
        with pytest.raises(ValueError, match="plain=False"):
            save_adapter(model, tmp_path / "c")


def test_adapters_load_beside_each_other_and_a_name_only_once(tmp_path):
    first, second = (randomize(add_lora(make_model(), LoRAConfig(r=r, alpha=8)), r) for r in (2, 4))
    save_adapter(first, tmp_path / "first")
    save_adapter(second, tmp_path / "second")
    model = load_adapter(make_model(), tmp_path / "first", "first")
    load_adapter(model, tmp_path / "second", "second")
    assert torch.equal(outputs(model), outputs(second))
    assert torch.equal(outputs(use_adapter(model, "first")), outputs(first))
    with pytest.raises(ValueError, match="one of them named 'second'"):
        load_adapter(model, tmp_path / "second", "second")


def test_an_adapter_of_tied_embeddings_loads_onto_untied_ones_and_back(tmp_path):
    tied = randomize(add_lora(make_model(tie_word_embeddings=True), LoRAConfig(r=4)))
    untied = randomize(add_lora(untie_embeddings(make_model(tie_word_embeddings=True)), LoRAConfig(r=4)))
    for model, other in ((tied, untied), (untied, tied)):
        folder = save_adapter(model, tmp_path / "a")
        base = make_model(tie_word_embeddings=True)
        base = untie_embeddings(base) if other is untied else base
        assert torch.equal(outputs(load_adapter(base, folder)), outputs(model))
    elsewhere = untie_embeddings(make_model(tie_word_embeddings=True))
    elsewhere.lm_head.weight.data[0, 0] += 1
    with pytest.raises(AdapterMismatch, match="other weights"):
        load_adapter(elsewhere, folder)

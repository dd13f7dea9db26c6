"""Adapters on disk: exact, at home in PEFT, and never loaded where they do not belong."""

import json
import math
import os

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.provenance import PROVENANCE
from labkit.lora.adapters import active_adapter, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge
from labkit.lora.mounting import mounted_adapter
from labkit.lora.qlora import add_qlora
from labkit.quant.model import dequantize_model, quantize_model
from tests.conftest import make_small_llama
from tests.test_variants import FAMILIES, make_gpt2, make_model, randomize
from tests.test_variants import IDS as SHORT

IDS = torch.arange(40).view(2, 20)


def adapted(seed=0, quantized=False, **config):
    model = make_small_llama(seed)
    if quantized:
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 8} | config))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


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


def change_tensors(folder, change):
    tensors = load_file(folder / peft_folder.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / peft_folder.WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"),
            r"up_proj.lora_A.weight is missing",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
            ),
            "layers.9.*no such",
        ),
        (lambda t: t.update({"base_model.model.extra": torch.ones(1)}), "extra"),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 65)}
            ),
            r"has shape \(4, 65\), not \(4, 64\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(tmp_path, change, message):
    save_adapter(adapted(), tmp_path / "a")
    change_tensors(tmp_path / "a", change)
    fresh = make_small_llama()
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert not lora_layers(fresh)


@pytest.mark.parametrize("quantized", [False, True])
def test_adapter_of_another_base_is_refused(tmp_path, quantized):
    save_adapter(adapted(quantized=quantized), tmp_path / "a")
    other = make_small_llama(seed=1)
    if quantized:
        quantize_model(other, progress=False)
    with pytest.raises(AdapterMismatch, match="same shape but with other weights"):
        load_adapter(other, tmp_path / "a")


def test_adapter_of_another_size_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="other layers or sizes"):
        load_adapter(make_small_llama(intermediate_size=160), tmp_path / "a")


def test_the_same_base_in_other_precision_is_the_same_base(tmp_path):
    save_adapter(adapted(quantized=True), tmp_path / "a")
    load_adapter(make_small_llama(), tmp_path / "a")
    load_adapter(make_small_llama().bfloat16(), tmp_path / "a")


def test_fingerprint_does_not_see_adapters_merged_or_not():
    model = adapted()
    assert fingerprint(make_small_llama()) == fingerprint(model)
    assert fingerprint(merge(model)) == fingerprint(make_small_llama())


def test_pickle_truncated_and_foreign_folders_are_refused(tmp_path):
    model = make_small_llama()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(model, tmp_path)
    folder = save_adapter(adapted(), tmp_path / "a")
    weights = folder / peft_folder.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_adapter(model, folder)
    folder = save_adapter(adapted(), tmp_path / "b")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(json.dumps(config | {"lora_bias": True}))
    with pytest.raises(ValueError, match="lora_bias=True"):
        load_adapter(model, folder)
    assert not lora_layers(model)


def test_saving_replaces_an_adapter_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = save_adapter(adapted(), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(
        peft_folder,
        "save_file",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(seed=2), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["a"], "temporary files are gone"
    monkeypatch.undo()
    save_adapter(adapted(r=2), folder)
    assert json.loads((folder / peft_folder.CONFIG).read_text())["r"] == 2
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_to_save_or_nan_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapter to save"):
        save_adapter(make_small_llama(), tmp_path / "a")
    model = adapted()
    next(iter(lora_layers(model).values())).lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# -- every variant, both ways


def untied():
    return make_model(tie_word_embeddings=False)


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=SHORT)[0]


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


def test_a_random_start_cannot_be_saved_as_it_is_nor_read_from_peft(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=4, init="pissa_niter_2"))
    with pytest.raises(ValueError, match="plain=True"):
        save_adapter(model, tmp_path / "a", plain=False)
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    for init in ("pissa_niter_4", "corda", "loftq"):
        (folder / peft_folder.CONFIG).write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
            load_adapter(make_model(), folder)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, lambda t, p: [t.pop(f"{p}.layers.1.mlp.up_proj.lora_{x}.weight") for x in "AB"], "layers.1.mlp.up_proj.lora_A.weight is missing"),
        ({"variant": "dora"}, lambda t, p: t.pop(f"{p}.layers.0.mlp.up_proj.lora_magnitude_vector"), "up_proj.lora_magnitude_vector is missing"),
        ({}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(192)}), "magnitude_vector is left over"),
        ({"targets": ["q_proj"]}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), "up_proj.lora_A.weight is left over"),
        ({"modules_to_save": ["model.norm"]}, lambda t, p: t.pop(f"{p}.norm.weight"), "norm.weight is missing"),
        ({"rank_pattern": {"up_proj": 2}}, lambda t, p: t.update({f"{p}.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}), r"has shape \(4, 64\), not \(2, 64\)"),
    ],
)  # fmt: skip
def test_a_key_too_many_or_too_few_is_named_for_every_kind(tmp_path, config, change, message):
    save_adapter(add_lora(make_model(), LoRAConfig(**{"r": 4} | config)), tmp_path / "a")
    change_tensors(tmp_path / "a", lambda tensors: change(tensors, "base_model.model.model"))
    fresh = make_model()
    with pytest.raises(AdapterMismatch, match=message):
        load_adapter(fresh, tmp_path / "a")
    assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_another_vocabulary_is_noticed_by_the_embedding_that_peft_saves(tmp_path):
    theirs = get_peft_model(untied(), PeftConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    theirs.get_base_model().model.embed_tokens.base_layer.weight.data[5] += 1
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="not the weight of this base"):
        load_adapter(untied(), tmp_path / "a")


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


def test_provenance_is_recorded_and_of_the_base_before_pissa(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=4, init="pissa", targets=["q_proj"]))
    save_adapter(model, tmp_path / "a", data="3fb2", metrics={"loss": 1.25})
    record = json.loads((tmp_path / "a" / PROVENANCE).read_text())
    assert record["base"] == fingerprint(make_model())
    assert record["data"] == "3fb2" and record["metrics"] == {"loss": 1.25}
    assert record["config"]["init"] == "pissa" and record["config"]["targets"] == ["q_proj"]
    assert record["versions"]["torch"] == torch.__version__


# -- vLLM

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank; 16 unless it is given


def vllm_objections(folder, max_lora_rank=16):
    """What vLLM's documented rules (docs: features/lora; `lora/peft_helper.py`, `lora/utils.py`) have against a folder."""
    assert max_lora_rank in VLLM_RANKS
    config = json.loads((folder / "adapter_config.json").read_text())
    objections = [f"missing {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if config.get("modules_to_save"):
        objections.append("vLLM only supports modules_to_save being None")
    if config.get("use_dora"):
        objections.append("vLLM does not yet support DoRA")
    if config.get("bias", "none") != "none":
        objections.append("Adapter bias is not supported")
    if max([config["r"], *config.get("rank_pattern", {}).values()]) > max_lora_rank:
        objections.append("LoRA rank is greater than max_lora_rank")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        objections.append("one r and one lora_alpha scale all modules")
    targets = config["target_modules"]
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not key.startswith("base_model.model.") or part not in (
            "A.weight",
            "B.weight",
            "embedding_A",
            "embedding_B",
        ):
            objections.append(f"{key} is an unsupported LoRA weight")
        elif isinstance(targets, list) and module.rpartition(".")[2] not in {
            t.rpartition(".")[2] for t in targets
        }:
            objections.append(f"{module} is not in target_modules")
        elif tensor.shape[0 if "A" in part else 1] != config["r"]:
            objections.append(f"{key} is not of rank {config['r']}")
    return objections


@pytest.mark.parametrize(
    ("config", "objection"),
    [
        ({"r": 16}, None),
        ({"r": 8, "variant": "rslora", "targets": ["q_proj", "v_proj"]}, None),
        ({"r": 8, "init": "pissa"}, None),
        ({"r": 8, "targets": ["layers.0.self_attn.q_proj"]}, None),
        ({"r": 16, "init": "pissa"}, "greater than max_lora_rank"),
        ({"r": 8, "variant": "dora"}, "does not yet support DoRA"),
        ({"r": 8, "modules_to_save": ["model.norm"]}, "modules_to_save"),
        ({"r": 8, "rank_pattern": {"up_proj": 4}}, "one r"),
    ],
)
def test_vllm_takes_what_its_rules_allow(tmp_path, config, objection):
    save_adapter(add_lora(make_model(), LoRAConfig(**config)), tmp_path / "a")
    objections = vllm_objections(tmp_path / "a")
    assert not objections if objection is None else any(objection in o for o in objections)
    if config == {"r": 16, "init": "pissa"}:
        assert not vllm_objections(tmp_path / "a", max_lora_rank=32)


def test_vllm_scales_rslora_as_here(tmp_path):
    model = add_lora(make_model(), LoRAConfig(r=8, alpha=12, variant="rslora", init="pissa"))
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / peft_folder.CONFIG).read_text())
    assert config["lora_alpha"] / math.sqrt(config["r"]) == pytest.approx(
        next(iter(lora_layers(model).values())).scaling
    )

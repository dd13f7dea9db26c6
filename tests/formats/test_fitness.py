"""What vLLM's rules say of folders that labkit and PEFT write, and whether the advice mends what it is about."""

import json
import math

import pytest
import torch
from peft import IA3Config, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file
from transformers import LlamaModel

from labkit.formats import peft_folder
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.fitness import check_for_vllm
from labkit.formats.vllm_rules import MAX_VOCABULARY, NOTED, REFUSED, WRONG
from labkit.lora.adapters import use_adapter
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.extraction import compress_adapter
from labkit.lora.inject import add_lora, lora_layers
from tests.formats.cases import change_tensors
from tests.lora.cases import make_gpt2, make_model, randomize

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
FULL_PRECISION = (NOTED, "dtype")  # the small models are in fp32


def saved(folder, model=None, plain=True, **config):
    model = randomize(add_lora(model or make_model(), LoRAConfig(**{"r": 8} | config)))
    return save_adapter(model, folder, plain=plain)


def saved_by_peft(folder, model=None, **config):
    chosen = {"r": 8, "target_modules": ["q_proj", "v_proj"]} | config
    get_peft_model(model or make_model(), PeftConfig(**chosen)).save_pretrained(folder)
    return folder


def rules(fitness):
    return [(objection.outcome, objection.rule) for objection in fitness.objections]


def change_config(folder, **changes):
    path = folder / peft_folder.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def served_scale(folder):
    """The one factor that vLLM multiplies with (`PEFTHelper.__post_init__`)."""
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


FIT = {
    "LoRA": ({}, 8),
    "rsLoRA": ({"variant": "rslora", "alpha": 12, "targets": ["q_proj", "v_proj"]}, 8),
    "rank 1": ({"r": 1, "alpha": 1}, 1),
    "rank 12": ({"r": 12}, 16),
    "PiSSA, as LoRA of twice the rank": ({"init": "pissa"}, 16),
    "a single layer": ({"targets": ["layers.0.self_attn.q_proj"]}, 8),
    "lower ranks with scales to match": (
        {"alpha": 8, "rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 4}},
        8,
    ),
    "embeddings and head": ({"targets": ["embed_tokens", "lm_head", "q_proj"]}, 8),
}


@pytest.mark.parametrize(("config", "needed"), FIT.values(), ids=FIT)
def test_an_adapter_of_labkit_fits_and_the_server_scales_it_as_here(tmp_path, config, needed):
    model = make_model(tie_word_embeddings=False)
    folder = saved(tmp_path / "a", model, **config)
    fitness = check_for_vllm(folder, vocabulary=128)
    assert fitness.fits and rules(fitness) == [FULL_PRECISION]
    assert fitness.max_lora_rank == needed and f"--max-lora-rank {needed}" in str(fitness)
    if config.get("init") != "pissa":  # its factors are others in the folder, of scale 1
        for layer in lora_layers(model).values():
            assert layer.scaling == pytest.approx(served_scale(folder))


UNFIT = {
    "DoRA": ({"variant": "dora"}, (REFUSED, "dora"), "compress_adapter"),
    "a module in full": ({"modules_to_save": ["model.norm"]}, (REFUSED, "saved"), "save_merged"),
    "the head in full": ({"modules_to_save": ["lm_head"]}, (REFUSED, "saved"), "save_merged"),
    "a lower rank": ({"rank_pattern": {"up_proj": 4}}, (WRONG, "scaling"), "combine"),
    "another scale": ({"alpha_pattern": {"q_proj": 99}}, (WRONG, "scaling"), "combine"),
}


@pytest.mark.parametrize(("config", "rule", "advice"), UNFIT.values(), ids=UNFIT)
def test_an_adapter_of_labkit_that_does_not_fit_meets_one_objection_with_a_way_out(
    tmp_path, config, rule, advice
):
    model = make_model(tie_word_embeddings=False)
    fitness = check_for_vllm(saved(tmp_path / "a", model, **config))
    assert rules(fitness) == [rule, FULL_PRECISION] and not fitness.fits
    assert advice in fitness.objections[0].advice and "does not fit" in str(fitness)


def test_pissa_as_a_difference_to_its_own_base_is_served_on_the_wrong_one(tmp_path):
    folder = saved(tmp_path / "a", plain=False, init="pissa")
    assert rules(check_for_vllm(folder)) == [(WRONG, "start"), FULL_PRECISION]
    again = save_adapter(load_adapter(make_model(), folder), tmp_path / "b", plain=True)  # the advice
    assert check_for_vllm(again).fits


BY_PEFT = {
    "LoRA": ({}, None),
    "rsLoRA": ({"use_rslora": True}, None),
    "targets as an expression": ({"target_modules": r".*\.(q_proj|v_proj)"}, None),
    "some layers": ({"layers_to_transform": [1]}, None),
    "a Gaussian start": ({"init_lora_weights": "gaussian"}, None),
    "DoRA": ({"use_dora": True}, (REFUSED, "dora")),
    "a module in full": ({"modules_to_save": ["lm_head"]}, (REFUSED, "saved")),
    "biases of LoRA": ({"lora_bias": True}, (REFUSED, "bias")),
    "a pattern of ranks": ({"rank_pattern": {"q_proj": 4}}, (WRONG, "scaling")),
    "a pattern of scales": ({"alpha_pattern": {"q_proj": 4}}, (WRONG, "scaling")),
    "PiSSA": ({"init_lora_weights": "pissa"}, (WRONG, "start")),
    "OLoRA": ({"init_lora_weights": "olora"}, (WRONG, "start")),
    "new tokens": ({"trainable_token_indices": [1, 2]}, (REFUSED, "tensor")),
}


@pytest.mark.parametrize(("config", "rule"), BY_PEFT.values(), ids=BY_PEFT)
def test_a_folder_of_peft_meets_the_objection_that_it_should(tmp_path, config, rule):
    fitness = check_for_vllm(saved_by_peft(tmp_path / "a", make_model(tie_word_embeddings=False), **config))
    assert rules(fitness) == ([rule] if rule else []) + [FULL_PRECISION]


def test_biases_of_the_base_that_were_trained_too_are_refused(tmp_path):
    model = make_model(attention_bias=True)
    fitness = check_for_vllm(saved_by_peft(tmp_path / "a", model, bias="lora_only"))
    assert rules(fitness) == [(REFUSED, "bias"), FULL_PRECISION]


def test_embeddings_of_another_length_are_passed_over_or_refused(tmp_path):
    model = get_peft_model(make_model(), PeftConfig(r=8, target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert (WRONG, "tensor") in rules(check_for_vllm(tmp_path / "a"))
    model = get_peft_model(make_model(), PeftConfig(r=8, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "b", save_embedding_layers=True)
    assert (REFUSED, "tensor") in rules(check_for_vllm(tmp_path / "b"))


def test_names_that_no_module_of_the_server_has_are_told_from_names_that_it_refuses(tmp_path):
    headless = make_model(LlamaModel)  # "layers.0…", not "model.layers.0…": matches nothing, without an error
    fitness = check_for_vllm(saved_by_peft(tmp_path / "a", headless))
    assert rules(fitness) == [(WRONG, "module"), FULL_PRECISION]
    assert "ForCausalLM" in fitness.objections[0].advice
    other = check_for_vllm(
        saved_by_peft(tmp_path / "b", make_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    )
    assert rules(other) == [(REFUSED, "module"), FULL_PRECISION]


def test_the_rank_is_held_against_the_server_or_says_what_the_server_needs(tmp_path):
    folder = saved(tmp_path / "a", r=24)
    fitness = check_for_vllm(folder)
    assert rules(fitness) == [(NOTED, "rank"), FULL_PRECISION] and fitness.max_lora_rank == 32
    assert rules(check_for_vllm(folder, max_lora_rank=16)) == [(REFUSED, "rank"), FULL_PRECISION]
    assert rules(check_for_vllm(folder, max_lora_rank=32)) == [FULL_PRECISION]
    with pytest.raises(ValueError, match="max_lora_rank=24 is not known; choose one of"):
        check_for_vllm(folder, max_lora_rank=24)
    large = check_for_vllm(saved_by_peft(tmp_path / "b", r=520))
    assert rules(large) == [(REFUSED, "rank"), FULL_PRECISION] and large.max_lora_rank is None


def test_the_advice_for_a_rank_too_high_and_for_dora_makes_adapters_that_fit(tmp_path):
    for variant in ("lora", "dora"):
        model = randomize(add_lora(make_model(), LoRAConfig(r=24, variant=variant)))
        compress_adapter(model, "default", "small", r=8)
        folder = save_adapter(use_adapter(model, "small"), tmp_path / variant)
        assert check_for_vllm(folder, max_lora_rank=8).fits


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_the_advice_for_scales_computes_the_same_with_the_one_scale_of_the_server(tmp_path, variant):
    patterns = {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"q_proj": 99}}
    model = randomize(add_lora(make_model(), LoRAConfig(r=8, variant=variant, **patterns)))
    updates = {
        name: layer.scaling * layer.lora_B @ layer.lora_A for name, layer in lora_layers(model).items()
    }
    combine(model, {"default": 1.0}, "even")
    folder = save_adapter(use_adapter(model, "even"), tmp_path / "a")
    assert check_for_vllm(folder).fits
    tensors, scale = load_file(folder / peft_folder.WEIGHTS), served_scale(folder)
    for name, update in updates.items():
        A, B = (tensors[f"{peft_folder.PREFIX}{name}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(scale * B @ A, update.detach(), rtol=1e-5, atol=1e-6)


def test_embeddings_must_be_those_of_the_base_and_its_vocabulary_not_too_large(tmp_path):
    folder = saved(tmp_path / "a", make_model(tie_word_embeddings=False), targets=["embed_tokens", "lm_head"])
    wrong = check_for_vllm(folder, vocabulary=130)
    assert rules(wrong) == [(REFUSED, "vocabulary")] * 2 + [FULL_PRECISION]
    small = saved(tmp_path / "b")
    assert rules(check_for_vllm(small, vocabulary=MAX_VOCABULARY + 1)) == [
        (REFUSED, "vocabulary"),
        FULL_PRECISION,
    ]
    assert check_for_vllm(small, vocabulary=MAX_VOCABULARY).fits


def test_half_an_adapter_and_broken_numbers_are_found(tmp_path):
    folder = saved(tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight"))
    [objection, _] = check_for_vllm(folder).objections
    assert objection.outcome == REFUSED and f"{LAYER}.lora_A without the other factor" in objection.found
    folder = saved(tmp_path / "c")
    key = f"{LAYER}.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key].flatten()}))
    [objection, _] = check_for_vllm(folder).objections
    assert objection.outcome == REFUSED and f"{key} is no matrix" in objection.found
    folder = saved(tmp_path / "b")
    change_tensors(folder, lambda tensors: tensors[f"{LAYER}.lora_A.weight"].fill_(float("nan")))
    assert rules(check_for_vllm(folder)) == [(WRONG, "values"), FULL_PRECISION]


def test_an_adapter_in_a_dtype_of_the_server_is_served_without_a_word(tmp_path):
    folder = saved(tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    assert not check_for_vllm(folder).objections


def test_a_folder_that_is_no_lora_adapter_or_lacks_a_setting_is_refused(tmp_path):
    get_peft_model(
        make_model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "a")
    assert rules(check_for_vllm(tmp_path / "a")) == [(REFUSED, "kind")]
    folder = saved(tmp_path / "b")
    config = json.loads((folder / peft_folder.CONFIG).read_text())
    (folder / peft_folder.CONFIG).write_text(
        json.dumps({k: v for k, v in config.items() if k != "lora_alpha"})
    )
    assert "no lora_alpha" in str(check_for_vllm(folder))
    change_config(folder, lora_alpha=8, r=0)
    assert rules(check_for_vllm(folder)) == [(REFUSED, "kind")]
    change_config(folder, r=8, alpha_pattern=[1], modules_to_save="lm_head")
    assert rules(check_for_vllm(folder)) == [(REFUSED, "kind")] * 2
    change_config(folder, alpha_pattern={"(": 8}, modules_to_save=None)
    with pytest.raises(ValueError, match="cannot be matched"):
        check_for_vllm(folder)
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        check_for_vllm(tmp_path / "nowhere")

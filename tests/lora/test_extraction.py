"""An adapter out of a full fine-tune is its best approximation; what it cannot hold is named."""

import copy
import warnings

import pytest
import torch
from peft import convert_to_lora

from labkit.lora.adapters import adapter_configs, base_only, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.extraction import compress_adapter, extract_adapter
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.low_rank import decompose, decompose_product, rank_for
from labkit.lora.merging import unload
from labkit.quant.model import quantize_model
from tests.lora.cases import logits, make_gpt2, make_model, randomize
from tests.lora.test_adapters import two_adapters
from tests.lora.test_combining import best_of_rank, deltas_of, peft_with

PATH = "model.layers.1.mlp.down_proj"


def tuned_model(r=4, **config):
    """A model whose linear layers changed by a matrix of rank r, as a merged adapter changes them."""
    return unload(randomize(add_lora(make_model(), LoRAConfig(r=r, alpha=12, **config))))


def changed_everywhere(seed=3):
    """A model whose linear layers changed in every direction, as full fine-tuning changes them."""
    model = make_model()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data += 0.01 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": None, "energy": 0.999999}, {"r": 64}])
def test_a_change_of_low_rank_is_extracted_whole(settings):
    tuned, model = tuned_model(), make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_adapter(model, tuned, **settings)
    torch.testing.assert_close(logits(model), logits(tuned), rtol=1e-4, atol=1e-5)
    with base_only(model):
        assert torch.equal(logits(model), logits(make_model()))
    assert lora_layers(model)[PATH].r == (64 if settings["r"] == 64 else 4)


def test_of_a_change_in_every_direction_the_best_of_its_rank_is_kept():
    tuned, base = changed_everywhere(), make_model()
    model = extract_adapter(make_model(), tuned, 3)
    for path, found in deltas_of(model).items():
        change = (
            tuned.get_submodule(path).weight.double() - base.get_submodule(path).weight.double()
        ).detach()
        wanted = best_of_rank(change, 3)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_energy_is_the_smallest_rank_that_keeps_that_share(energy):
    tuned, base = changed_everywhere(), make_model()
    model = extract_adapter(make_model(), tuned, None, energy=energy)
    for path, layer in lora_layers(model).items():
        change = tuned.get_submodule(path).weight.double() - base.get_submodule(path).weight.double()
        squares = torch.linalg.svdvals(change.detach()).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[layer.r - 1] >= energy > kept[layer.r - 2]
    assert len({layer.r for layer in lora_layers(model).values()}) > 1, "so the config needs a pattern"
    for path, layer in lora_layers(model).items():
        assert adapter_configs(model)["default"].for_layer(path).r == layer.r


def test_a_transposed_layer_is_extracted_too():
    tuned = unload(randomize(add_lora(make_gpt2(), LoRAConfig(r=4))))
    model = extract_adapter(make_gpt2(), tuned, 4)
    torch.testing.assert_close(logits(model), logits(tuned), rtol=1e-4, atol=1e-5)


def test_layers_that_did_not_change_get_no_correction():
    model = extract_adapter(make_model(), tuned_model(targets=["q_proj"]), 4)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {"q_proj"}


def test_what_the_adapter_does_not_hold_is_named_and_can_be_taken_over_whole():
    tuned = tuned_model()
    tuned.model.norm.weight.data += 0.1
    tuned.lm_head.weight.data += 0.1
    with pytest.warns(UserWarning, match="2 weights changed too.*model.norm.weight, lm_head.weight"):
        extract_adapter(make_model(), tuned, 4)
    with pytest.warns(UserWarning, match="1 weights changed too.*model.norm.weight"):
        model = extract_adapter(make_model(), tuned, 4, modules_to_save=["lm_head"])
    assert torch.equal(model.get_submodule("lm_head").weight, tuned.lm_head.weight)
    with base_only(model):
        assert torch.equal(logits(model), logits(make_model()))


def test_models_that_give_no_adapter_are_refused_and_stay_as_they_were():
    packed, diverged, adapted = tuned_model(), tuned_model(), add_lora(make_model(), LoRAConfig(r=2))
    quantize_model(packed, progress=False)
    diverged.get_submodule(PATH).weight.data[0, 0] = float("nan")
    model = make_model()
    cases = [
        (make_model(), {}, "no layer of targets='all-linear' differs"),
        (make_model(intermediate_size=128), {}, r"is \(192, 64\) in model and \(128, 64\) in tuned"),
        (make_model(num_hidden_layers=1), {}, "tuned has no layer model.layers.1"),
        (packed, {}, "of tuned is in 4 bits"),
        (diverged, {}, "NaN or infinity"),
        (adapted, {}, "LoRA adapters already"),
        (tuned_model(), {"r": None}, "r and energy are both None"),
        (tuned_model(), {"r": 0}, "r=0 must be"),
        (tuned_model(), {"energy": 0}, "energy=0 must be"),
        (tuned_model(), {"name": "a.b"}, "without dots"),
    ]
    for tuned, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            extract_adapter(model, tuned, **settings)
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="extract_adapter would freeze or hide"):
        extract_adapter(adapted, tuned_model())


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_compressed_it_is_the_best_of_its_rank_and_the_adapter_stays(variant):
    model = two_adapters(r=8, variant=variant)
    whole, before = deltas_of(model), logits(model)
    compress_adapter(model, "clerk", "small", 2)
    for path, found in deltas_of(model).items():
        wanted = best_of_rank(whole[path], 2)
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(logits(use_adapter(model, "clerk")), before)
    with pytest.raises(ValueError, match="r and energy are both None"):
        compress_adapter(model, "clerk", "smaller")


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA")
@pytest.mark.parametrize("rank", [2, 0.8])
def test_compression_is_pefts_convert_to_lora(rank):
    model = randomize(add_lora(make_model(), LoRAConfig(r=8, alpha=8), "poet"))
    theirs = peft_with(copy.deepcopy(model))
    compress_adapter(model, "poet", "small", **({"r": rank} if rank > 1 else {"energy": rank}))
    _, state = convert_to_lora(theirs, rank=rank, adapter_name="poet", progressbar=False)
    for path, layer in lora_layers(model).items():
        key = f"base_model.model.{path}.lora"
        delta = state[f"{key}_B.weight"] @ state[f"{key}_A.weight"]
        assert len(state[f"{key}_A.weight"]) == layer.r
        torch.testing.assert_close(layer.delta().detach(), delta, rtol=1e-3, atol=1e-5)


def test_a_product_is_decomposed_from_its_factors_as_the_matrix_is():
    generator = torch.Generator().manual_seed(0)
    for rows, columns, r in ((40, 30, 5), (6, 30, 8), (30, 6, 8)):
        A, B = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
        U, S, Vh = decompose_product(A, B)
        torch.testing.assert_close(U @ torch.diag(S) @ Vh, B.double() @ A.double())
        torch.testing.assert_close(S, decompose(B.double() @ A.double())[1][: len(S)], rtol=1e-9, atol=1e-9)
        assert rank_for(S, energy=1.0) == min(rows, columns, r)

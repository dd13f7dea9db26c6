"""A merge rounds once, keeps to four bits only when told how, and refuses NaN before any layer changes."""

import copy
import weakref

import pytest
import torch

from labkit import models
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.merging import merge, unload, unmerge
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.lora.cases import give, logits, make_model, peft_model, randomize

PATH = "model.layers.0.mlp.up_proj"


def adapted(dtype=torch.float32, variant="lora"):
    model = make_model().to(dtype)
    return randomize(add_lora(model, LoRAConfig(r=4, alpha=12, variant=variant)))


def over_four_bits(dtype=torch.float32):
    model = make_model().to(dtype)
    quantize_model(model, progress=False)
    return randomize(add_lora(model, LoRAConfig(r=4, alpha=12)))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(
        torch.allclose(now[name], tensor, rtol=0, atol=0, equal_nan=True) for name, tensor in before.items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_merge_rounds_once_like_pefts_and_pefts_safe_merge_rounds_twice(dtype):
    """PEFT's `safe_merge` rounds the correction to the weight's dtype first, and so loses more of it."""
    model = adapted(dtype)
    sums = {n: (m.base.weight.float() + m.delta()).detach() for n, m in lora_layers(model).items()}
    theirs = {}
    for safe in (False, True):
        peft = peft_model(make_model().to(dtype))
        give(model, peft)
        peft.merge_adapter(safe_merge=safe)
        theirs[safe] = dict(peft.get_base_model().named_modules())
    merge(model, safe=True)
    errors = [0.0, 0.0]
    for name, layer in lora_layers(model).items():
        mine, once, twice = layer.base.weight, *(theirs[s][name].base_layer.weight for s in (False, True))
        assert torch.equal(mine, sums[name].to(dtype)) and torch.equal(mine, once)
        for i, weight in enumerate((mine, twice)):
            errors[i] += (weight.double() - sums[name].double()).square().sum().item()
    assert errors[0] < errors[1]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_merged_again_after_an_unmerge_every_bit_is_the_same(variant):
    model = adapted(variant=variant)
    before = weights_of(model)
    first = weights_of(merge(model))
    assert not same_weights(model, before)
    assert same_weights(unmerge(model), before)
    assert same_weights(merge(model), first)


def test_a_second_merge_is_refused_and_changes_nothing():
    model = merge(adapted())
    before = weights_of(model)
    with pytest.raises(ValueError, match="merged already"):
        merge(model)
    assert same_weights(model, before)


def test_unloaded_into_16_bits_the_sum_is_rounded_once_and_the_whole_model_is_cast():
    model = adapted()
    layer = lora_layers(model)[PATH]
    wanted = (layer.base.weight + layer.delta()).bfloat16()
    unload(model, dtype=torch.bfloat16)
    assert torch.equal(model.get_submodule(PATH).weight, wanted)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model).isfinite().all()


def test_qloras_rule_adds_to_the_dequantized_weight_and_rounds_once_to_16_bits():
    model = over_four_bits(torch.bfloat16)
    layer = lora_layers(model)[PATH]
    wanted = (layer.base.weight.dequantize(torch.float32) + layer.delta()).bfloat16()
    unload(model, dequantize=True)
    assert type(model.get_submodule(PATH)) is torch.nn.Linear
    assert torch.equal(model.get_submodule(PATH).weight, wanted)


def test_unloading_lets_go_of_each_old_weight_and_writes_to_none_that_a_caller_holds():
    model = adapted()
    held = lora_layers(model)[PATH].base.weight
    before = held.clone()
    old = [weakref.ref(m.base.weight) for n, m in lora_layers(model).items() if n != PATH]
    unload(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert torch.equal(held, before) and not any(one() is not None for one in old)


def test_unloading_never_holds_a_second_copy_of_the_model(monkeypatch):
    model = adapted()
    old = [weakref.ref(layer.base.weight) for layer in lora_layers(model).values()]
    alive = []
    merged_weight = LoRALinear.merged_weight

    def counted(layer, weight):
        alive.append(sum(one() is not None for one in old))
        return merged_weight(layer, weight)

    monkeypatch.setattr(LoRALinear, "merged_weight", counted)
    unload(model)
    assert alive == list(range(14, 0, -1)), "each is let go of before the next is merged"


@pytest.mark.parametrize("quantized", [False, True])
def test_an_interrupted_unloading_computes_the_same_and_goes_on_where_it_was(monkeypatch, quantized):
    model = over_four_bits() if quantized else adapted()
    before, whole = logits(model), weights_of(unload(copy.deepcopy(model), dequantize=quantized))
    calls = iter(range(14))
    merged_weight = LoRALinear.merged_weight

    def interrupted(layer, weight):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return merged_weight(layer, weight)

    with monkeypatch.context() as patch:
        patch.setattr(LoRALinear, "merged_weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unload(model, dequantize=quantized)
    assert len(lora_layers(model)) == 9
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    assert same_weights(unload(model, dequantize=quantized), whole)


@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m"])
def test_a_merge_in_fp32_leaves_the_logits_of_a_trained_model_within_1e_5_of_their_size(name):
    model, tokenizer = models.load(name, torch.float32)
    randomize(add_lora(model, LoRAConfig(r=16)))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.data *= 0.05 * layer.base.weight.norm() / layer.delta().norm()
        ids = tokenizer(
            "The customer was charged twice and wants the money back.", return_tensors="pt"
        ).input_ids
        unmerged = model(ids).logits
        merged = unload(model)(ids).logits
    assert 0 < (merged - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    assert not lora_layers(model)


def test_merged_into_the_original_weight_each_sum_is_quantized_once_and_can_be_undone():
    model, original = over_four_bits(), make_model()
    before = logits(model)
    layer = lora_layers(model)[PATH]
    wanted = quantize(original.get_submodule(PATH).weight + layer.delta())
    merge(model, requantize=True, originals=original)
    assert torch.equal(layer.base.packed, wanted.packed)
    naive = merge(over_four_bits(), requantize=True)
    assert not torch.equal(lora_layers(naive)[PATH].base.packed, wanted.packed)
    assert torch.equal(logits(unmerge(model)), before)


def test_originals_of_another_model_are_refused_and_nothing_changes():
    model = over_four_bits()
    before = weights_of(model)
    packed = make_model()
    quantize_model(packed, progress=False)
    narrow, shallow = make_model(), make_model()
    narrow.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    shallow.model.layers = shallow.model.layers[:1]
    cases = [
        (make_model(seed=1), "of another model"),
        (narrow, "192 x 64"),
        (shallow, "has no layer model.layers.1"),
        (packed, "full precision"),
        (adapted(), "adapters; give the model before them"),
    ]
    for original, message in cases:
        with pytest.raises(ValueError, match=message):
            merge(model, requantize=True, originals=original)
        assert same_weights(model, before) and not lora_layers(model)[PATH].is_merged
    with pytest.raises(ValueError, match="Leave originals out"):
        merge(adapted(), originals=make_model())


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("act", [merge, unload])
def test_factors_that_are_not_finite_are_refused_before_any_layer_changes(act, bad, part):
    model = adapted()
    getattr(list(lora_layers(model).values())[-1], part).data[0, 0] = bad
    before = weights_of(model)
    with pytest.raises(ValueError, match=rf"{part} of model.layers.1.* holds NaN or infinity"):
        act(model)
    assert same_weights(model, before) and len(lora_layers(model)) == 14


@pytest.mark.parametrize("act", [merge, unload])
def test_a_sum_that_fp16_cannot_hold_is_refused_if_asked_and_infinite_if_not(act):
    model = adapted(torch.float16)
    list(lora_layers(model).values())[-1].lora_B.data[0] = 1e7
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"above the 6.55e\+04 that float16 ends at"):
        act(model, safe=True)
    assert same_weights(model, before)
    careless = act(copy.deepcopy(model))
    assert any(not t.isfinite().all() for t in careless.state_dict().values())
    unload(model.float(), safe=True)
    assert all(t.isfinite().all() for t in model.state_dict().values())

"""Merging changes no output, unmerging no bit, unloading leaves a plain model; what cannot be done is refused."""

import copy

import pytest
import torch
from torch import nn

from labkit.lora.adapters import add_adapter, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import adapter_strength, merge, unload, unmerge, unmerged
from labkit.lora.mounting import adapters_of
from labkit.lora.qlora import add_qlora
from labkit.models.stand_in import StandIn
from labkit.models.walk import adapters_in
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.lora.cases import give, logits, make_gpt2, make_model, peft_model, randomize

IDS = torch.arange(40).view(2, 20)


def randomize_B(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


def test_merge_computes_the_same_and_unmerge_is_exact(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    randomize_B(small_llama)
    before = {name: layer.base.weight.clone() for name, layer in lora_layers(small_llama).items()}
    with torch.no_grad():
        before_merge = small_llama(IDS).logits
        torch.testing.assert_close(merge(small_llama)(IDS).logits, before_merge, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="merged already"):
            merge(small_llama)
        assert torch.equal(unmerge(small_llama)(IDS).logits, before_merge)
    assert all(
        torch.equal(layer.base.weight, before[name]) for name, layer in lora_layers(small_llama).items()
    )


def test_merging_into_four_bits_is_refused(small_llama):
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    with pytest.raises(ValueError, match="4-bit layer.*dequantize_model"):
        merge(small_llama)


def test_merging_into_four_bits_can_be_asked_for_and_undone(small_llama):
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    randomize_B(small_llama)
    with torch.no_grad():
        adapted = small_llama(IDS).logits
        merged = merge(small_llama, requantize=True)(IDS).logits
        assert not torch.equal(merged, adapted), "the sixteen levels took their part"
        for layer in lora_layers(small_llama).values():
            whole = layer.base_before_merge.dequantize() + layer.delta()
            again = quantize(whole).dequantize()
            assert torch.equal(layer.base.weight.dequantize(), again)
        assert torch.equal(unmerge(small_llama)(IDS).logits, adapted)


def test_strength_of_what_is_no_sum_is_refused(small_llama):
    add_lora(small_llama, LoRAConfig(r=4, variant="dora"))
    with pytest.raises(ValueError, match="not of that form"), adapter_strength(small_llama, 0.5):
        pass


def test_strength_zero_is_the_base(small_llama):
    with torch.no_grad():
        base = small_llama(IDS).logits
        add_lora(small_llama, LoRAConfig(r=4))
        randomize_B(small_llama)
        adapted = small_llama(IDS).logits
        with adapter_strength(small_llama, 0):
            assert torch.equal(small_llama(IDS).logits, base)
        assert torch.equal(small_llama(IDS).logits, adapted)
        assert not torch.equal(adapted, base)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_weights_from_before_a_merge_can_be_looked_at_and_the_merged_ones_come_back(
    small_llama, quantized
):
    if quantized:
        quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    randomize_B(small_llama)
    with torch.no_grad():
        adapted = small_llama(IDS).logits
        merged = merge(small_llama, requantize=quantized)(IDS).logits
        weights = {name: layer.base.weight for name, layer in lora_layers(small_llama).items()}
        with pytest.raises(KeyError), unmerged(small_llama):
            assert torch.equal(small_llama(IDS).logits, adapted)
            raise KeyError("also after an error")
        assert torch.equal(small_llama(IDS).logits, merged)
        layers = lora_layers(small_llama)
        assert all(layers[name].base.weight is weight for name, weight in weights.items())
        with unmerged(unmerge(small_llama)):
            assert torch.equal(small_llama(IDS).logits, adapted)


STARTS = [("lora", "default"), ("dora", "default"), ("lora", "pissa"), ("lora", "olora")]


def is_plain(model):
    kinds = {type(m) for m in model.modules()}
    return (
        not any(issubclass(k, StandIn) for k in kinds)
        and not adapters_of(model).by_name
        and not adapters_in(model)
    )


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize(("variant", "init"), STARTS)
def test_unloaded_merged_it_is_peft_s_merge_and_unload(variant, init, merged_before):
    config = LoRAConfig(r=4, alpha=12, variant=variant, init=init)
    model = randomize(add_lora(make_model(), config))
    theirs = peft_model(make_model(), variant, init_lora_weights=True if init == "default" else init)
    give(model, theirs)
    if merged_before:
        merge(model)
    assert unload(model) is model and is_plain(model)
    unloaded = theirs.merge_and_unload()
    assert list(model.state_dict()) == list(unloaded.state_dict())
    for name, weight in unloaded.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", ["mounted", "merged", "put away", "one of two"])
@pytest.mark.parametrize(("variant", "init"), STARTS)
def test_unloaded_unmerged_it_is_the_base_bit_for_bit(variant, init, state):
    model = randomize(
        add_lora(make_model(), LoRAConfig(r=4, variant=variant, init=init, modules_to_save=["lm_head"]))
    )
    if state == "one of two":
        add_adapter(model, "second", LoRAConfig(r=2))
    {"merged": merge, "put away": lambda m: use_adapter(m, None)}.get(state, lambda m: m)(model)
    unload(model, merged=False)
    assert is_plain(model) and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in make_model().state_dict().items())


@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_an_unloaded_model_saves_loads_and_is_adapted_like_any_other(make, tmp_path):
    model = randomize(add_lora(make(), LoRAConfig(r=4)))
    before = logits(merge(model))
    unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), before)
    assert torch.equal(logits(add_lora(model, LoRAConfig(r=2))), before)


@pytest.mark.parametrize("init", ["default", "pissa", "loftq"])
@pytest.mark.parametrize("make", [make_model, make_gpt2])
def test_a_dequantized_model_has_the_layers_that_it_was_loaded_with(make, init, tmp_path):
    model = randomize(add_qlora(make(), LoRAConfig(r=4, init=init)))
    adapted = logits(model)
    unload(model, dequantize=True).save_pretrained(tmp_path)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in make().named_modules()
    ]
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again), adapted, rtol=1e-4, atol=1e-5)


def quantized(init="default"):
    model = make_model()
    if init != "default":
        return randomize(add_qlora(model, LoRAConfig(r=4, init=init)))
    quantize_model(model, progress=False)
    return randomize(add_lora(model, LoRAConfig(r=4)))


def test_over_four_bits_unloading_asks_what_is_wanted_and_does_that():
    model = quantized()
    adapted, bare = logits(model), logits(unload(quantized(), merged=False))
    for refuse in (lambda: unload(model), lambda: merge(model)):
        with pytest.raises(ValueError, match="4-bit layer"):
            refuse()
    assert torch.equal(logits(model), adapted) and lora_layers(model)
    requantized = logits(merge(model, requantize=True))
    assert torch.equal(logits(unload(copy.deepcopy(model))), requantized), (
        "it is merged: its layers stay in 4 bits"
    )
    assert torch.equal(logits(unload(copy.deepcopy(model), merged=False)), bare)
    unload(unmerge(model), dequantize=True)
    assert is_plain(model) and {type(m) for n, m in model.named_modules() if n.endswith("proj")} == {
        nn.Linear
    }
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    base = unload(quantized(), merged=False, dequantize=True)
    torch.testing.assert_close(logits(base), bare, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, QuantLinear) for m in base.modules())


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_base_that_was_not_kept_is_not_unloaded_and_its_merge_is(init):
    model = quantized(init)
    adapted = logits(model)
    with pytest.raises(ValueError, match="weights from before were not kept"):
        unload(model, merged=False)
    assert torch.equal(logits(model), adapted) and lora_layers(model)
    torch.testing.assert_close(logits(unload(model, dequantize=True)), adapted, rtol=1e-4, atol=1e-5)
    assert is_plain(model)


def test_there_must_be_something_to_unload_and_it_must_be_ours():
    with pytest.raises(
        ValueError, match="LlamaForCausalLM has no LoRA adapter to take off; it is plain already"
    ):
        unload(make_model())
    with pytest.raises(ValueError, match=r"PEFT's adapters.*merge_and_unload"):
        unload(peft_model(make_model()))
    model = use_adapter(add_lora(make_model(), LoRAConfig(r=2)), None)
    with pytest.raises(ValueError, match=r"no adapter is mounted.*use_adapter.*one of default.*merged=False"):
        unload(model)

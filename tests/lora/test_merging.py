"""Merging changes no output, unmerging no bit, and what cannot be merged or scaled is refused."""

import pytest
import torch

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import adapter_strength, merge, unmerge, unmerged
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize

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

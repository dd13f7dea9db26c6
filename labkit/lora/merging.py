"""Merging: add each correction to its base weight, `W + s B A`, and take it out again, exactly.

Nothing merges on its own, as `.eval()` does in some libraries: `merge` and `unmerge` are calls that you
write. `unmerged` is for a look at the weights from before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from labkit.lora.dora import DoRALinear
from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRALinear
from labkit.quant.layer_kinds import dense_weight, is_four_bit, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor, quantize


def merge(model: nn.Module, requantize: bool = False) -> nn.Module:
    """Add each correction to its base weight, in place, so the adapter costs nothing in the forward pass.

    The weights from before are kept for `unmerge`, which is then exact; that doubles their memory.

    Args:
        model: with adapters.
        requantize: merge into 4-bit bases too: dequantize, add, and quantize again, which changes the output.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter, it is merged already, or a base is in 4 bits (nothing is changed
            then).
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter to merge; call add_lora or load_adapter first"
        )
    for name, layer in layers.items():
        if layer.is_merged:
            raise ValueError(f"the adapter is merged already ({name}); unmerge it first")
        if is_four_bit(layer.base) and not (requantize and isinstance(layer.base, QuantLinear)):
            raise ValueError(
                f"{name} is a 4-bit layer: its sixteen levels cannot take up a small correction without "
                "changing the output. Call dequantize_model(model) first and merge into the 16- or 32-bit "
                "weights; or, knowing that, merge(model, requantize=True)."
            )
    with torch.no_grad():
        for layer in layers.values():
            merge_layer(layer)
    return model


def merge_layer(layer: LoRALinear) -> None:
    """Put the merged weight where the base's is, and keep that one."""
    base, merged = layer.base, layer.merged_weight(dense_weight(layer.base))  # (out, in)
    if isinstance(base, QuantLinear):
        layer.base_before_merge = base.weight
        again = quantize(merged, base.codebook, base.blocksize, base.double_quant)
        layer.base = four_bit_like(base, again)
    else:
        layer.base_before_merge = base.weight.detach()
        base.weight = nn.Parameter(merged.T if is_transposed(base) else merged, requires_grad=False)


def four_bit_like(layer: QuantLinear, weight: QuantizedTensor) -> QuantLinear:
    """The frozen `layer` with another weight."""
    return QuantLinear(weight, layer.bias, layer.compute_dtype).train(layer.training).requires_grad_(False)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: put back the very base weights that it kept. In place; returns `model`.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.is_merged]
    if not merged:
        raise ValueError(f"{type(model).__name__} has no merged adapter to unmerge")
    for layer in merged:
        unmerge_layer(layer)
    return model


def unmerge_layer(layer: LoRALinear) -> None:
    """Put back the base's weight that `merge_layer` kept."""
    if isinstance(layer.base, QuantLinear):
        layer.base = four_bit_like(layer.base, layer.base_before_merge)
    else:
        layer.base.weight = nn.Parameter(layer.base_before_merge, requires_grad=False)
    layer.base_before_merge = None


@contextmanager
def unmerged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the base has its weights from before a merge; then the very merged ones are back."""
    kept = [
        (layer, layer.base, layer.base.weight, layer.base_before_merge)
        for layer in lora_layers(model).values()
        if layer.is_merged
    ]
    for layer, *_ in kept:
        unmerge_layer(layer)
    try:
        yield model
    finally:
        for layer, base, weight, before in kept:
            layer.base, layer.base_before_merge = base, before
            if not isinstance(base, QuantLinear):
                base.weight = weight


@contextmanager
def adapter_strength(model: nn.Module, factor: float) -> Iterator[nn.Module]:
    """Within the block the corrections count `factor` times: 0 gives the base model, 1 the adapted one.

    Raises:
        ValueError: there is no adapter, it is merged, or its output is not a sum of the model's own and a
            correction (DoRA; PiSSA and its like, whose base is not the model's).
    """
    layers = lora_layers(model).values()
    if not layers or any(layer.is_merged for layer in layers):
        raise ValueError("adapter_strength needs an adapter that is not merged; add one, or unmerge it first")
    if any(isinstance(layer, DoRALinear) or layer.has_own_base for layer in layers):
        raise ValueError(
            "adapter_strength scales a correction that is added to the base, and this adapter is not of "
            "that form. For PiSSA, OLoRA: labkit.to_plain_lora(model) first. For all: "
            "labkit.disabled(model) is strength 0"
        )
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling *= factor
        yield model
    finally:
        for layer, scaling in zip(layers, before):
            layer.scaling = scaling

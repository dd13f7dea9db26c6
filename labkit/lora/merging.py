"""Merging: add each correction to its base weight, `W + s B A`, and take it out again, exactly.

Nothing merges on its own, as `.eval()` does in some libraries: `merge` and `unmerge` are calls that you
write. `unmerged` is for a look at the weights from before. `unload` ends the adapter's time: what is left is a
model without any of our layers, which saves, loads and is adapted as any other.

Agrees with: PEFT `merge_and_unload` and `unload`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from labkit.lora.dora import DoRALinear
from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import (
    RECORD,
    adapters_of,
    check_base_kept,
    check_standing,
    mounted_adapter,
    refuse_adapted,
    unmount,
)
from labkit.models.surgery import swap_modules
from labkit.models.walk import unwrap
from labkit.quant.layer_kinds import dense_weight, holds_weight, is_four_bit, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model
from labkit.quant.tensor import quantize


@torch.inference_mode(False)  # merged weights made in it could never take part in training
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
            f"{type(unwrap(model)).__name__} has no LoRA adapter to merge; call add_lora or load_adapter first"
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
    check_weights_held(layers)
    check_standing(model)
    with torch.no_grad():
        for layer in layers.values():
            merge_layer(layer)
    return model


def check_weights_held(layers: Mapping[str, LoRALinear]) -> None:
    """Raise a `ValueError` if a base has no weight that a merged one could be put in place of."""
    for name, layer in layers.items():
        if not holds_weight(layer.base):
            raise ValueError(
                f"the weight of {name} is computed at each call (a {type(layer.base).__name__}), so nothing can be merged "
                "into it; remove its parametrization first, with torch.nn.utils.parametrize.remove_parametrizations"
            )


def merge_layer(layer: LoRALinear) -> None:
    """Put the merged weight where the base's is, and keep that one aside."""
    base = layer.base
    before: nn.Module
    merged = layer.merged_weight(dense_weight(base))  # (out, in)
    if isinstance(base, QuantLinear):
        before = base
        again = quantize(merged, base.codebook, base.blocksize, base.double_quant)
        layer.base = QuantLinear.in_place_of(base, again, base.compute_dtype).requires_grad_(False)
    else:
        before = nn.Module()  # a box, so that the weight moves and is cast with the layer
        before.weight = base.weight
        base.weight = nn.Parameter(merged.T if is_transposed(base) else merged, requires_grad=False)
    layer.aside = (before,)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: put back the very base weights that it kept. In place; returns `model`.

    Raises:
        ValueError: nothing is merged.
    """
    merged = [layer for layer in lora_layers(model).values() if layer.is_merged]
    if not merged:
        raise ValueError(f"{type(unwrap(model)).__name__} has no merged adapter to unmerge")
    for layer in merged:
        unmerge_layer(layer)
    return model


def unmerge_layer(layer: LoRALinear) -> None:
    """Put back what `merge_layer` kept of the base."""
    (before,) = layer.aside
    if isinstance(before, QuantLinear):
        layer.base = before.train(layer.base.training)
    else:
        layer.base.weight = before.weight
    layer.aside = ()


@contextmanager
def unmerged(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the base has its weights from before a merge; then the very merged ones are back."""
    kept = [
        (layer, layer.base, layer.base.weight, layer.aside)
        for layer in lora_layers(model).values()
        if layer.is_merged
    ]
    for layer, *_ in kept:
        unmerge_layer(layer)
    try:
        yield model
    finally:
        for layer, base, weight, aside in kept:
            layer.base, layer.aside = base, aside
            if not isinstance(base, QuantLinear):
                base.weight = weight


def unload(model: nn.Module, merged: bool = True, dequantize: bool = False) -> nn.Module:
    """Take every adapter off for good: a plain model again, with no layer of LoRA and no record of one.

    What was frozen stays frozen. The result can be saved with `save_pretrained`, if no layer is in 4 bits.

    Args:
        model: with adapters; changed in place.
        merged: keep what the mounted adapter does, in the weights, and the modules that trained in full.
            False: the base model as it was, without any of it.
        dequantize: turn every 4-bit layer into an `nn.Linear`, before merging into it.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter; for `merged=True` none is mounted, or a base is in 4 bits and
            `dequantize` is off; for `merged=False` the base's weights were not kept. Nothing is changed then.
    """
    adapters, adapter = adapters_of(model), mounted_adapter(model)
    if not adapters.by_name:
        refuse_adapted(model, "unload")
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no LoRA adapter to take off; it is plain already"
        )
    check_standing(model)
    if merged and adapter is None:
        raise ValueError(
            "no adapter is mounted, so there is nothing to merge: call labkit.use_adapter(model, name) first, with one "
            f"of {', '.join(adapters.by_name)}; or ask for the base with unload(model, merged=False)"
        )
    if merged:
        packed = [
            name for name, layer in adapter.layers.items() if is_four_bit(layer.base) and not layer.is_merged
        ]
        if packed and not (
            dequantize and all(isinstance(adapter.layers[n].base, QuantLinear) for n in packed)
        ):
            raise ValueError(
                f"{packed[0]} is a 4-bit layer, which cannot take up a small correction without changing the output; "
                "give dequantize=True for a model in 16 or 32 bits, or merged=False for the 4-bit base alone. (Layers "
                "of other libraries cannot be dequantized here.)"
            )
        check_weights_held(adapter.layers)
        if dequantize:
            dequantize_model(model)
        if not adapter.is_merged:
            merge(model)
        swap_modules(model, {name: layer.base for name, layer in adapter.layers.items()})
    elif adapter is not None:
        check_base_kept(model)
        if adapter.is_merged:
            unmerge(model)
        unmount(model)
    if dequantize and not merged:
        dequantize_model(model)
    delattr(unwrap(model), RECORD)
    return model


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

"""Merging: add each correction to its base weight, `W + s B A`, and take it out again, exactly.

Nothing merges on its own, as `.eval()` does in some libraries: `merge` and `unmerge` are calls that you
write. `unmerged` is for a look at the weights from before. `unload` ends the adapter's time: what is left is a
model without any of our layers, which saves, loads and is adapted as any other.

The sum is taken in fp32 and rounded once, to the dtype of the weight. Four bits are another matter: a small
correction does not move a weight from one of sixteen levels to the next. `labkit.lora.survival` measures what
is left of it.

Agrees with: PEFT `merge_and_unload` and `unload`. In 16 bits PEFT's `safe_merge` rounds the correction too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from labkit.lora.dora import DoRALinear
from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import (
    RECORD,
    Adapter,
    adapters_of,
    check_base_kept,
    check_standing,
    mounted_adapter,
    refuse_adapted,
    unmount,
)
from labkit.lora.sums import (
    check_factors,
    check_weights_held,
    fp32_weight,
    merged_base,
    merged_sum,
    original_weight,
)
from labkit.models.surgery import swap_modules
from labkit.models.walk import unwrap
from labkit.quant.layer_kinds import is_four_bit, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model


@torch.inference_mode(False)  # merged weights made in it could never take part in training
@torch.no_grad()
def merge(
    model: nn.Module, requantize: bool = False, safe: bool = False, originals: nn.Module | None = None
) -> nn.Module:
    """Add each correction to its base weight, in place, so the adapter costs nothing in the forward pass.

    The weights from before are kept for `unmerge`, which is then exact; that doubles their memory.

    Args:
        model: with adapters.
        requantize: merge into 4-bit bases too: dequantize, add, and quantize again, which changes the output.
        safe: refuse merged weights that are NaN or infinite, and not only such factors.
        originals: the base before it was put in 4 bits. With `requantize`, the corrections are added to its
            weights instead, and each sum is quantized once.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter, it is merged already, a base is in 4 bits, `originals` is another
            model, or NaN or infinity would be merged. Nothing is changed then.
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
    check_factors(layers)
    made: dict[str, nn.Module] = {}  # all of them before the first layer changes
    for name, layer in layers.items():
        weight = fp32_weight(layer.base) if originals is None else original_weight(originals, name, layer)
        made[name] = merged_base(layer.base, merged_sum(layer, weight, safe=name if safe else None))
    for name, layer in layers.items():
        put_merged(layer, made[name])
    return model


def put_merged(layer: LoRALinear, merged: nn.Module) -> None:
    """Put the merged weight where the base's is, and keep that one aside."""
    base = layer.base
    if isinstance(base, QuantLinear):
        before: nn.Module = base
        layer.base = merged
    else:
        before = nn.Module()  # a box, so that the weight moves and is cast with the layer
        before.weight, base.weight = base.weight, merged.weight
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


def unload(
    model: nn.Module,
    merged: bool = True,
    dequantize: bool = False,
    safe: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Take every adapter off for good: a plain model again, with no layer of LoRA and no record of one.

    What was frozen stays frozen. The result can be saved with `save_pretrained`, if no layer is in 4 bits. One
    layer after the other is merged and lets go of its old weight, so there is never a second copy of the model.

    Args:
        model: with adapters; changed in place.
        merged: keep what the mounted adapter does, in the weights, and the modules that trained in full.
            False: the base model as it was, without any of it.
        dequantize: turn every 4-bit layer into an `nn.Linear`, before merging into it: QLoRA's rule.
        safe: refuse merged weights that are NaN or infinite, and not only such factors; takes the sums twice.
        dtype: of the whole model afterwards, such as torch.bfloat16: the sums are rounded to it once. None
            leaves every dtype as it is.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter; for `merged=True` none is mounted, a base is in 4 bits and
            `dequantize` is off, or NaN or infinity would be merged; for `merged=False` the base's weights
            were not kept. Nothing is changed then.
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
        merge_for_good(model, adapter, safe, dtype)
    elif adapter is not None:
        check_base_kept(model)
        if adapter.is_merged:
            unmerge(model)
        unmount(model)
    if dequantize:
        dequantize_model(model)
    delattr(unwrap(model), RECORD)
    return model if dtype is None else model.to(dtype)


@torch.inference_mode(False)
@torch.no_grad()
def merge_for_good(model: nn.Module, adapter: Adapter, safe: bool, dtype: torch.dtype | None) -> None:
    """Put a plain layer, with the correction in its weight, in place of each of the adapter's; 4-bit ones dequantized.

    Where an interrupt ends it, the layers that are done are plain, the others as before, and the outputs the
    same: another call goes on there.
    """
    check_weights_held(adapter.layers)
    plain = {name: layer.base for name, layer in adapter.layers.items() if layer.is_merged}
    layers = {name: layer for name, layer in adapter.layers.items() if not layer.is_merged}
    check_factors(layers)
    dtypes = {name: dtype or layer.base.weight.dtype for name, layer in layers.items()}
    for name, layer in layers.items() if safe else ():
        merged_sum(layer, fp32_weight(layer.base), dtypes[name], safe=name)
    try:
        for name, layer in layers.items():
            merged = merged_sum(layer, fp32_weight(layer.base), dtypes[name])
            base = layer.base.to_linear() if isinstance(layer.base, QuantLinear) else layer.base
            base.weight = nn.Parameter(merged.T if is_transposed(base) else merged, requires_grad=False)
            plain[name] = base
    finally:
        swap_modules(model, plain)
        for name in plain:
            del adapter.modules[name]


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

"""The sum of a base weight and a correction: what it is added to, in which dtype, and when it is refused.

    32 or 16 bits    W + s B A in fp32, rounded once
    4 bits, naive    Q(Q(W) + s B A): below half a gap between levels, the correction is lost
    4 bits, again    Q(W + s B A): the correction stays, on a base with other rounding errors than it was trained on
    QLoRA's rule     Q(W) + s B A in 16 bits, unquantized: `labkit.unload(model, dequantize=True)`

Source: QLoRA (Dettmers et al. 2023), equation 5.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import standing
from labkit.models.walk import adapters_in
from labkit.quant.layer_kinds import dense_weight, holds_weight, is_four_bit, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import quantize


def check_weights_held(layers: Mapping[str, LoRALinear]) -> None:
    """Raise a `ValueError` if a base has no weight that a merged one could be put in place of."""
    for name, layer in layers.items():
        if not holds_weight(layer.base):
            raise ValueError(
                f"the weight of {name} is computed at each call (a {type(layer.base).__name__}), so nothing can be merged "
                "into it; remove its parametrization first, with torch.nn.utils.parametrize.remove_parametrizations"
            )


def check_factors(layers: Mapping[str, LoRALinear]) -> None:
    """Raise a `ValueError` if an adapter holds NaN or infinity, which spreads over all that it is added to."""
    for name, layer in layers.items():
        bad = [part for part, t in layer.named_parameters(recurse=False) if not t.isfinite().all()]
        if bad:
            raise ValueError(
                f"{bad[0]} of {name} holds NaN or infinity, as after a run that diverged; nothing was changed. Load an "
                "earlier checkpoint of the adapter"
            )


def fp32_weight(base: nn.Module) -> Tensor:
    """The weight that a correction is added to, (out, in): a 4-bit one without a rounding to 16 bits on the way."""
    return base.weight.dequantize(torch.float32) if isinstance(base, QuantLinear) else dense_weight(base)


def original_weight(originals: nn.Module, name: str, layer: LoRALinear) -> Tensor:
    """The weight that the 4-bit base of `layer` was made from, (out, in).

    Raises:
        ValueError: `originals` has no such layer in full precision, or the base of `layer` was not made from it.
    """
    if not isinstance(layer.base, QuantLinear) or layer.has_own_base:
        raise ValueError(
            f"originals are for corrections of a 4-bit base, and {name} is not one: its base is in full precision, or "
            f"was made together with the adapter. Leave originals out"
        )
    if adapters_in(originals):
        raise ValueError(
            f"originals has {' and '.join(adapters_in(originals))} adapters; give the model before them"
        )
    try:
        there = standing(originals, name)
    except KeyError:
        raise ValueError(f"originals has no layer {name}; give the model that was put in 4 bits") from None
    shape = (layer.out_features, layer.in_features)
    if is_four_bit(there) or tuple(dense_weight(there).shape) != shape:
        raise ValueError(
            f"{name} of originals must be in full precision and {shape[0]} x {shape[1]}; give the model from before "
            "quantize_model"
        )
    weight, mine = dense_weight(there), layer.base
    again = quantize(weight.to(mine.dtype), mine.codebook, mine.blocksize, mine.double_quant)
    if not torch.equal(again.packed, mine.packed):
        raise ValueError(
            f"{name} of originals does not give the 4-bit weight that the adapter stands on: it is of another model, or "
            "it has been trained since. Give the model that quantize_model was called on"
        )
    return weight.float()


def merged_sum(
    layer: LoRALinear, weight: Tensor, dtype: torch.dtype | None = None, safe: str | None = None
) -> Tensor:
    """`weight` and the correction of `layer` together, (out, in), summed in at least fp32 and rounded once.

    Args:
        layer: not merged.
        weight: what the correction is added to, (out, in).
        dtype: of the sum; None for that of `weight`.
        safe: the layer's name, to have NaN and infinity in the sum refused; or None.
    """
    dtype = dtype or weight.dtype
    merged = layer.merged_weight(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(dtype)
    if safe is not None and not merged.isfinite().all():
        raise ValueError(
            f"the merged weight of {safe} would hold NaN or infinity: the base does, or the sum is above the "
            f"{torch.finfo(dtype).max:.3g} that {str(dtype).removeprefix('torch.')} ends at. Nothing was merged. Merge "
            "in float32 or bfloat16 (model.to(dtype) first), or load the base again"
        )
    return merged


def merged_base(base: nn.Module, merged: Tensor) -> nn.Module:
    """What is to hold `merged`, (out, in): a `QuantLinear` like a 4-bit `base`, else a box for the weight."""
    if isinstance(base, QuantLinear):
        again = replace(quantize(merged, base.codebook, base.blocksize, base.double_quant), dtype=base.dtype)
        return QuantLinear.in_place_of(base, again, base.compute_dtype).requires_grad_(False)
    box = nn.Module()
    box.weight = nn.Parameter(merged.T if is_transposed(base) else merged, requires_grad=False)
    return box

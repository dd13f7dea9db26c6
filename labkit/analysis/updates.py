"""What training changed: each linear layer's update, under one name for full fine-tuning, LoRA and QLoRA.

    full fine-tuning   dW = W - W_0
    LoRA               dW = scaling B A                           the base is frozen
    DoRA               dW = m/n (W_0 + scaling B A) - W_0         which has full rank
    QLoRA              dW = scaling B A, beside dequantize(quantize(W_0)) - W_0, which training did not do

The quantization error has full rank and is often larger than the update. A spectrum of "tuned minus original"
of a QLoRA model shows that error rather than what was learned, so the parts have names here. `with_update`
goes the other way: it puts a change into a model for as long as a loss is measured.

Source: LoRA (Hu et al. 2021), section 4.1; QLoRA (Dettmers et al. 2023), equation 5.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.checks import check_choice
from labkit.lora.dora import DoRALinear
from labkit.lora.layer import LoRALinear
from labkit.models.surgery import is_output_layer
from labkit.quant.layer_kinds import dense_weight, is_linear, is_transposed
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import QuantizedTensor

PARTS = ("update", "error", "total")


@dataclass(frozen=True)
class Factored:
    """A matrix of low rank as a product that is never multiplied out: `left` (m, r) times `right` (r, n)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """The matrix itself, (m, n)."""
        return self.left @ self.right


def find_updates(
    base: nn.Module, tuned: nn.Module, part: str = "update", factored: bool = False
) -> dict[str, Tensor | Factored]:
    """What training changed in each linear layer but the output layer, under one name for every method.

    Args:
        base: the model before training.
        tuned: after it: all weights changed (full fine-tuning), or with LoRA, or with LoRA on a 4-bit base
            (QLoRA).
        part: "update", what training did: W - W_0, or for an adapter what it adds to its frozen base;
            "error", what quantization did before training: dequantized base - W_0, zero without quantization;
            "total", both: what `tuned` computes with, minus W_0.
        factored: give updates of adapters as `Factored`; only for part "update", and not for DoRA.

    Returns:
        {layer name: (out, in)} in at least fp32. For a model with adapters, "update" has only the layers that
        have one.

    Raises:
        ValueError: an unknown part, other layers or shapes, or an adapter on another base than `base`.
    """
    check_choice("part", part, PARTS)
    if factored and part != "update":
        raise ValueError(f"part={part!r} has no factors, its rank is full; leave out factored=True")
    before, after = linear_layers(base), linear_layers(tuned)
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise ValueError(
            f"base and tuned must have the same linear layers; only one of them has: {', '.join(odd[:5])}"
        )
    adapted = [name for name, layer in after.items() if isinstance(layer, LoRALinear)]
    if factored and any(isinstance(after[name], DoRALinear) for name in adapted):
        raise ValueError(
            "DoRA's update has no factors: it stretches the whole weight; leave out factored=True"
        )
    found: dict[str, Tensor | Factored] = {}
    for name in adapted if adapted and part == "update" else before:
        layer, start = after[name], frozen_weight(before[name])
        if (layer.out_features, layer.in_features) != tuple(start.shape):
            raise ValueError(
                f"{name} is {tuple(start.shape)} in base and {(layer.out_features, layer.in_features)} in tuned"
            )
        found[name] = of_layer(name, layer, start, part, factored)
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of `model` except the output layer: plain, 4-bit, Conv1D, or with an adapter.

    A layer with an adapter comes under its own name, not under that of the base inside it.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if is_linear(base_of(module)) and not is_output_layer(model, module)
    }
    return {name: m for name, m in layers.items() if not name.endswith(".base") or name[:-5] not in layers}


def base_of(layer: nn.Module) -> nn.Module:
    """The base's own layer inside one with an adapter; a plain layer itself."""
    return getattr(layer, "base", layer)


def frozen_weight(layer: nn.Module) -> Tensor:
    """What the layer starts from, (out, in), in at least fp32: dequantized, and without a merged adapter."""
    if not isinstance(layer, LoRALinear) or not layer.is_merged:
        return at_least_fp32(dense_weight(base_of(layer)))
    kept = layer.base_before_merge
    if isinstance(kept, QuantizedTensor):
        return kept.dequantize(torch.float32)
    return at_least_fp32(kept.T if is_transposed(layer.base) else kept)


def of_layer(name: str, layer: nn.Module, start: Tensor, part: str, factored: bool) -> Tensor | Factored:
    """The `part` of one layer of the tuned model; `start` is the base's weight."""
    now = frozen_weight(layer)
    quantized = isinstance(base_of(layer), QuantLinear)
    if not isinstance(layer, LoRALinear):
        cause = "error" if quantized else "update"
        return now - start if part in (cause, "total") else torch.zeros_like(start)
    if part == "error":
        return now - start
    if part == "total":
        return now - start + change(layer, now)
    if not quantized and not torch.equal(now, start):
        raise ValueError(
            f"the frozen weight of {name} is not that of base, so the adapter alone is not the update; give the base "
            "that the adapter was trained on, in the same dtype, or ask for part='total' (PiSSA changes its base on "
            "purpose)"
        )
    if factored:
        return Factored((layer.scaling * layer.lora_B).detach(), layer.lora_A.detach())
    return change(layer, now)


def change(layer: LoRALinear, frozen: Tensor) -> Tensor:
    """What an adapter adds to its base's weight `frozen`, (out, in)."""
    if not isinstance(layer, DoRALinear):
        return layer.delta().detach()
    merged = dense_weight(layer.base) if layer.is_merged else layer.merged_weight(frozen)
    return at_least_fp32(merged.detach()) - frozen


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def with_update(model: nn.Module, changes: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Within the block each linear layer named in `changes` has that matrix added to its weight.

    After it the very weights from before are back, even after an error.

    Raises:
        ValueError: a name that is not a linear layer with a plain weight, or another shape. Nothing is
            changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, change in changes.items():
        if name not in layers or layers[name].weight.shape != change.shape:
            found = tuple(layers[name].weight.shape) if name in layers else "no plain linear layer"
            raise ValueError(f"the change of {name!r} is {tuple(change.shape)}, but the model has: {found}")
    kept = {name: layers[name].weight.data for name in changes}
    try:
        for name, change in changes.items():
            layers[name].weight.data = kept[name] + change.to(kept[name])
        yield model
    finally:
        for name, weight in kept.items():
            layers[name].weight.data = weight

"""What training changed: each linear layer's update, under one name for full fine-tuning, LoRA and QLoRA.

    full fine-tuning   dW = W - W_0
    LoRA               dW = scaling B A                           the base is frozen
    DoRA               dW = m/n (W_0 + scaling B A) - W_0         which has full rank
    (IA)^3             dW = diag(l) W_0 - W_0, or W_0 diag(l) - W_0
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

from labkit.alternatives.ia3 import IA3Linear
from labkit.checks import check_choice
from labkit.lora.dora import DoRALinear
from labkit.lora.layer import LoRALinear
from labkit.lora.mounting import adapters_of, mounted_adapter
from labkit.models.stand_in import StandIn
from labkit.models.walk import adapters_in, unwrap, walk
from labkit.quant.layer_kinds import dense_weight, is_conv1d, is_linear, widths
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
        tuned: after it: all weights changed (full fine-tuning), or with LoRA or (IA)^3, merged or not, over the
            base in full precision or in 4 bits (QLoRA).
        part: "update", what training did: W - W_0, or for an adapter what it adds to its frozen base;
            "error", what quantization did before training: dequantized base - W_0, zero without quantization;
            "total", both: what `tuned` computes with, minus W_0.
        factored: give updates of adapters as `Factored`; only for part "update", and not for DoRA.

    Returns:
        {layer name: (out, in)} in at least fp32. For a model with adapters, "update" has only the layers that
        have one, or that train in full beside it (`modules_to_save`).

    Raises:
        ValueError: an unknown part, other layers or shapes, an adapter on another base than `base`, one that is put
            aside or not of labkit, or a method that changes no weight.
    """
    check_choice("part", part, PARTS)
    if factored and part != "update":
        raise ValueError(f"part={part!r} has no factors, its rank is full; leave out factored=True")
    check_adapters(base, tuned)
    before, after = linear_layers(base), linear_layers(tuned)
    if set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise ValueError(
            f"base and tuned must have the same linear layers; only one of them has: {', '.join(odd[:5])}"
        )
    adapted = [name for name, layer in after.items() if isinstance(layer, StandIn)]
    if factored and any(isinstance(after[name], (DoRALinear, IA3Linear)) for name in adapted):
        raise ValueError(
            "the update of DoRA or (IA)^3 has no factors: it stretches the whole weight; leave out factored=True"
        )
    in_full = [name for name in after if trains_in_full(tuned, name)]
    names = [name for name in after if name in adapted or name in in_full] if adapted else list(before)
    found: dict[str, Tensor | Factored] = {}
    for name in names if part == "update" else before:
        layer, start = after[name], frozen_weight(before[name])
        shape = widths(base_of(layer))[::-1]
        if shape != tuple(start.shape):
            raise ValueError(f"{name} is {tuple(start.shape)} in base and {shape} in tuned")
        found[name] = of_layer(name, layer, start, part, factored)
    return found


def check_adapters(base: nn.Module, tuned: nn.Module) -> None:
    """Raise a `ValueError` unless all that changed in `tuned` is in weights, where it can be found."""
    there = adapters_in(base)
    if there:
        raise ValueError(
            f"base has {' and '.join(there)} adapters, which would be left out; give the model before them"
        )
    adapters, inner = adapters_of(tuned), unwrap(tuned)
    method = getattr(inner, "added_method", None)  # see labkit.alternatives.methods
    if (adapters.by_name and adapters.active is None) or (method is not None and not method.mounted):
        raise ValueError(
            "the adapter of tuned is put aside, so it computes what the base does; put it back first"
        )
    kinds = adapters_in(tuned)
    if "PEFT's adapters" in kinds:
        raise ValueError(
            "tuned has PEFT's adapters, which find_updates does not read: save them and load them with "
            "labkit.load_adapter, or give what PEFT's merge_and_unload returns"
        )
    elsewhere = [kind for kind in kinds if kind not in ("LoRA", "IA3")]
    if elsewhere:
        raise ValueError(
            f"{' and '.join(elsewhere)} changes no weight of the base, so there is no update to find"
        )


def trains_in_full(model: nn.Module, name: str) -> bool:
    """Is the layer a copy that trains in full beside a mounted adapter, or inside one?"""
    adapter = mounted_adapter(model)
    saved = [] if adapter is None else [n for n in adapter.modules if n not in adapter.layers]
    return any(name == one or name.startswith(f"{one}.") for one in saved)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of `model` except the output layer: plain, 4-bit, Conv1D, or with an adapter.

    A layer comes under its own name, whatever is around it or the model, and with the adapter that stands in for it.
    """
    return {
        layer.name: model.get_submodule(layer.paths[0])
        for layer in walk(model)
        if is_linear(layer.module) and not layer.is_output
    }


def base_of(layer: nn.Module) -> nn.Module:
    """The base's own layer inside one with an adapter; a plain layer itself."""
    return unwrap(layer)


def frozen_weight(layer: nn.Module) -> Tensor:
    """What the layer starts from, (out, in), in at least fp32: dequantized, and without a merged adapter."""
    base = base_of(layer)
    kept = layer.aside[0].weight if isinstance(layer, StandIn) and layer.aside else None
    if kept is None:
        return at_least_fp32(dense_weight(base))
    if isinstance(kept, QuantizedTensor):
        return kept.dequantize(torch.float32)
    return at_least_fp32((kept.T if is_conv1d(base) else kept).detach())


def of_layer(name: str, layer: nn.Module, start: Tensor, part: str, factored: bool) -> Tensor | Factored:
    """The `part` of one layer of the tuned model; `start` is the base's weight."""
    now = frozen_weight(layer)
    quantized = isinstance(base_of(layer), QuantLinear)
    if not isinstance(layer, StandIn):
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


@torch.no_grad()
def change(layer: nn.Module, frozen: Tensor) -> Tensor:
    """What an adapter adds to its base's weight `frozen`, (out, in)."""
    if isinstance(layer, LoRALinear) and not isinstance(layer, DoRALinear):
        return layer.delta().detach()
    if layer.is_merged:
        return at_least_fp32(dense_weight(layer.base)) - frozen
    if isinstance(layer, DoRALinear):
        return at_least_fp32(layer.merged_weight(frozen)) - frozen
    return layer.stretched(frozen) - frozen


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
    layers = {
        name: layer
        for name, layer in linear_layers(model).items()
        if isinstance(layer, nn.Linear) or is_conv1d(layer)
    }
    for name, change in changes.items():
        shape = widths(layers[name])[::-1] if name in layers else "no plain linear layer"
        if shape != tuple(change.shape):
            raise ValueError(f"the change of {name!r} is {tuple(change.shape)}, but the model has: {shape}")
    kept = {name: layers[name].weight.data for name in changes}
    try:
        for name, change in changes.items():
            stored = change.T if is_conv1d(layers[name]) else change
            layers[name].weight.data = kept[name] + stored.to(kept[name])
        yield model
    finally:
        for name, weight in kept.items():
            layers[name].weight.data = weight

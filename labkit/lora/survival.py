"""How much of an update survives a merge: what the weight changed by, measured along what it was to change by.

    share = <W_merged - W, dW> / <dW, dW>        1: all of it; 0: none
    rho   = rms(dW) / rms(W)                     how large the update is beside the weight

A 4-bit weight lies on one of sixteen levels, and an update has to carry it over half the gap to the next. So at
rho = 0.01 nearly nothing survives in NF4, and at 0.2 nearly everything. 16 bits are finer by far, and what they
lose is the rounding error, `error`, of about 0.0017 / rho in bf16. Distance is not loss: a merge with the
smaller error may be the one without the update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.lora.inject import lora_layers
from labkit.lora.merging import unmerged
from labkit.models.walk import unwrap
from labkit.quant.layer_kinds import dense_weight


@dataclass(frozen=True)
class Survival:
    """What a merge did to one update, or to those of a whole model.

    Attributes:
        share: of the update that is in the merged weight, by projection.
        rho: the size of the update beside that of the weight, as root mean squares.
        error: how far the merged weight is from the sum, in lengths of the update.
    """

    share: float
    rho: float
    error: float


def survival(weight: Tensor, merged: Tensor, delta: Tensor) -> Survival:
    """What is left of `delta` in `merged`, which was to be `weight + delta`.

    Args:
        weight: before the merge; of a 4-bit layer, dequantized.
        merged: after it, of the same shape.
        delta: the update.

    Raises:
        ValueError: the shapes differ, or a `delta` of zeros, of which there is no share.
    """
    return Sums.of(weight, merged, delta).survival()


def merged_survival(model: nn.Module) -> dict[str, Survival]:
    """`survival` for each layer of a model with a merged adapter; the whole model's is under the name "".

    Returns:
        By the layer's own name. A layer whose correction is zero is left out.

    Raises:
        ValueError: nothing is merged, or every correction is zero.
    """
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.is_merged}
    if not layers:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no merged adapter; call labkit.merge(model) first, and "
            "not unload, which lets go of the weights from before"
        )
    after = {name: dense_weight(layer.base) for name, layer in layers.items()}
    found: dict[str, Survival] = {}
    whole = Sums()
    with torch.no_grad(), unmerged(model):
        for name, layer in layers.items():
            delta = layer.delta()
            if delta.any():
                sums = Sums.of(dense_weight(layer.base), after[name], delta)
                found[name], whole = sums.survival(), whole + sums
    return {"": whole.survival()} | found


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of one or more weights, in float64, from which a `Survival` is computed."""

    along: float = 0.0  # <W_merged - W, dW>
    updates: float = 0.0  # <dW, dW>
    weights: float = 0.0  # <W, W>
    errors: float = 0.0  # |W_merged - W - dW|^2

    @classmethod
    def of(cls, weight: Tensor, merged: Tensor, delta: Tensor) -> "Sums":
        if not weight.shape == merged.shape == delta.shape:
            raise ValueError(
                f"weight, merged and delta must have one shape, not {tuple(weight.shape)}, {tuple(merged.shape)}, "
                f"{tuple(delta.shape)}"
            )
        w, d = weight.detach().double(), delta.detach().double()
        change = merged.detach().double() - w
        squares = (d.square().sum(), w.square().sum(), (change - d).square().sum())
        return cls((change * d).sum().item(), *(each.item() for each in squares))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values())))

    def survival(self) -> Survival:
        if not self.updates:
            raise ValueError(
                "the update is zero, so there is no share of it that could survive; train the adapter, or load "
                "a trained one"
            )
        rho = (self.updates / self.weights) ** 0.5 if self.weights else float("inf")
        return Survival(self.along / self.updates, rho, (self.errors / self.updates) ** 0.5)

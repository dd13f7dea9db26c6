"""How many directions does a task need? Training in a random subspace of all weights at once.

    theta = theta_0 + P z            theta: (D,)   z: (d,), which alone trains   P: (D, d), random, frozen

The smallest d that reaches 90 % of what full training reaches is the task's *intrinsic dimension*, d_90. LoRA
looks for few directions inside each matrix, and finds the best ones; this looks for few directions in the
whole model, and takes what chance gives. It is the harder test, and a control for "low rank works", because
here nothing is chosen.

How P is made is said at `Offset`.

Sources: Li et al. 2018, "Measuring the Intrinsic Dimension of Objective Landscapes", section 2; Aghajanyan et
al. 2020, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning"; the sparse P is
a count sketch (Charikar et al. 2002) with balanced buckets.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from labkit.checks import is_whole
from labkit.models.surgery import is_output_layer
from labkit.models.walk import adapters_in


class Offset(nn.Module):
    """The parametrization of one weight: `weight + P z`, with its own rows of P and the z that all share.

    Each weight follows one coordinate of z, with a random sign, and each coordinate moves D / d weights. The
    columns of P are divided by sqrt(D / d), which makes them orthonormal: |P z| = |z|, and with d = D nothing
    is lost but the names of the weights. A dense Gaussian P, as in the definition, has D d numbers, 12 GB at
    D = 3 million and d = 1000; this one has 5 bytes per weight, whatever d is. The papers' Fastfood transform
    needs no memory for P, but several passes of D log D in each step. All three keep d / D of a gradient's
    energy on average.

    Args:
        z: (d,) the coordinates.
        weight: what it is added to; only its shape and device are used.
        first: how many weights of the model come before this one.
        scale: of the columns of P, 1 / sqrt(D / d).
        generator: of the rows.
    """

    def __init__(self, z: nn.Parameter, weight: Tensor, first: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.z, self.scale = z, scale
        # balanced: the weights of the model take the coordinates in turn, shuffled within each matrix
        coordinate = (first + torch.randperm(weight.numel(), generator=generator)) % len(z)  # (n,)
        sign = torch.randint(0, 2, (weight.numel(),), generator=generator, dtype=torch.int8) * 2 - 1  # (n,)
        self.register_buffer("coordinate", coordinate.int().to(weight.device), persistent=False)
        self.register_buffer("sign", sign.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) to (out, in)."""
        moved = self.z.index_select(0, self.coordinate) * self.sign * self.scale
        return weight + moved.view_as(weight).to(weight.dtype)


def add_subspace(model: nn.Module, d: int, seed: int) -> nn.Module:
    """Freeze `model` and let it move only along d random directions of its linear weights.

    z starts at zero, so the model is still what it was. Biases, norms, embeddings and the output layer stay
    frozen.

    Args:
        model: changed in place; its only trainable parameter is then z, (d,) fp32.
        d: dimensions, 1 to the number of weights D.
        seed: of P. The same seed, model and d give the same P.

    Returns:
        `model`.

    Raises:
        ValueError: d is out of range, there is a subspace already, or no linear layer. Nothing is changed
            then.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and not is_output_layer(model, m)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer with a plain weight to move")
    if any(parametrize.is_parametrized(layer, "weight") for layer in layers):
        raise ValueError(
            f"{type(model).__name__} is in a subspace already; load a fresh model to start again"
        )
    there = adapters_in(model)
    if there:
        raise ValueError(
            f"{type(model).__name__} has {' and '.join(there)} adapters, which would be frozen; load a fresh model"
        )
    size = sum(layer.weight.numel() for layer in layers)
    if not is_whole(d) or d > size:
        raise ValueError(
            f"d={d!r} directions among {size:,} weights; choose a whole number from 1 to {size:,}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    z = nn.Parameter(torch.zeros(d, dtype=torch.float32, device=layers[0].weight.device))
    generator, first = torch.Generator().manual_seed(seed), 0
    for layer in layers:
        offset = Offset(z, layer.weight, first, math.sqrt(d / size), generator)
        first += layer.weight.numel()
        # unsafe skips a trial run, which would only cost a copy of the weight
        parametrize.register_parametrization(layer, "weight", offset, unsafe=True)
    return model


def remove_subspace(model: nn.Module) -> nn.Module:
    """Write theta_0 + P z into the weights, as plain parameters again; in place. Returns `model`.

    Raises:
        ValueError: the model is in no subspace.
    """
    layers = [m for m in model.modules() if parametrize.is_parametrized(m, "weight")]
    if not layers:
        raise ValueError(f"{type(model).__name__} is in no subspace; call add_subspace first")
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def matching_lr(model: nn.Module, lr: float) -> float:
    """The rate of z at which Adam's step moves each weight as far as `lr` does in full fine-tuning.

    That is lr sqrt(D / d): a step of z by lr moves each weight by only lr / sqrt(D / d).

    Raises:
        ValueError: the model is in no subspace.
    """
    offset = next((m for m in model.modules() if isinstance(m, Offset)), None)
    if offset is None:
        raise ValueError(f"{type(model).__name__} is in no subspace; call add_subspace first")
    return lr / offset.scale

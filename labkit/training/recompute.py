"""Make the output of an activation function again in the backward pass, instead of keeping it.

A Llama's MLP computes  h = act(g) * u.  Autograd keeps g for the derivative of act, and both factors, act(g) and u, for that of
the product. But act(g) follows from g, which is kept anyway: so it is dropped, and made again when the backward pass asks for it.
That saves T f numbers a layer, a sixth of all that SmolLM2 keeps under LoRA, for about 1 % of the time of a step. (Gradient
checkpointing drops everything within a block, for a third or more of the time.)

How: autograd passes each tensor that it keeps to a *pack hook*, and what that returned to an *unpack hook*. A forward hook marks the
output of an activation function with what it was made of, and the mark goes with the output; where a marked tensor would be
kept, that is kept instead.

Source: selective activation recomputation, "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al.
2022), section 5, which does the same for attention.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class Recipe:
    """An activation function and its input; in what is kept, the input as the hooks of a caller packed it."""

    function: nn.Module
    argument: Any


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """A forward pass of `model` within the block keeps no output of its activation functions for the backward pass.

    Losses and gradients are the same to the last bit. Blocks under gradient checkpointing keep nothing anyway, and are as without.
    """
    with ExitStack() as stack:
        for function in filter(is_remade, model.modules()):
            stack.callback(function.register_forward_hook(mark).remove)
        stack.enter_context(saved_tensors_hooks(*hooks_within(*callers_hooks())))
        yield


def is_remade(module: nn.Module) -> bool:
    """Is it a function of one number whose derivative keeps the input, and not the output, as that of relu?"""
    from transformers.activations import (
        GELUActivation,
        GELUTanh,
        SiLUActivation,
    )  # slow to import, and there with a model

    known = (nn.SiLU, nn.GELU, SiLUActivation, GELUActivation, GELUTanh)
    return isinstance(module, known) and not getattr(module, "inplace", False)


def mark(function: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
    """A forward hook: write on the output what it was made of."""
    if output.requires_grad:
        output.recipe = Recipe(function, arguments[0].detach())


def hooks_within(outer_pack: Callable, outer_unpack: Callable) -> tuple[Callable, Callable]:
    """Our two hooks, which hand on what they keep to those of the caller."""

    def pack(tensor: Tensor) -> Any:
        recipe = getattr(tensor, "recipe", None)
        return outer_pack(tensor) if recipe is None else replace(recipe, argument=outer_pack(recipe.argument))

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, Recipe):
            return outer_unpack(kept)
        with torch.no_grad():
            return kept.function(outer_unpack(kept.argument))

    return pack, unpack


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def callers_hooks() -> tuple[Callable, Callable]:
    """The hooks that are in force. PyTorch calls only the innermost: without this, `save_on_cpu` around a step would do nothing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) or (unchanged, unchanged)

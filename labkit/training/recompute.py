"""Make the output of an activation function, or of a whole block, again in the backward pass, instead of keeping it.

A Llama's MLP computes  h = act(g) * u.  Autograd keeps g for the derivative of act, and act(g) and u for that
of the product. But act(g) follows from g: so it is dropped, and made again when it is needed. For T tokens
and f neurons that saves T f numbers per layer, a sixth of all that SmolLM2 keeps under LoRA, for about 1 % of
a step's time.

How: autograd passes each tensor that it keeps to a *pack hook*, and hands what that returned to an *unpack
hook*. A forward hook marks the output of an activation function with the function and its input; the mark is
kept in its place. Whole blocks are transformers' own affair, and only switched here.

Source: "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al. 2022), section 5,
on attention.
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
    """How to make an activation again: the function, and its input as the caller's hooks packed it."""

    function: nn.Module
    argument: Any


@contextmanager
def recompute_activations(model: nn.Module) -> Iterator[None]:
    """Within the block, a forward pass of `model` keeps no output of its activation functions for backward.

    Losses and gradients are the same to the last bit. Blocks under gradient checkpointing keep nothing
    anyway, and are left alone.
    """
    with ExitStack() as stack:
        for function in filter(is_remade, model.modules()):
            stack.callback(function.register_forward_hook(mark).remove)
        stack.enter_context(saved_tensors_hooks(*hooks_within(*callers_hooks())))
        yield


def checkpoint_blocks(model: nn.Module) -> None:
    """From now on keep only the input of each block, and run the block again in the backward pass.

    Not in the re-entrant way, which trains nothing over a frozen embedding.
    """
    wanted = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(wanted)
    else:  # its name in transformers before 5.23
        model.gradient_checkpointing_enable(wanted)


def keep_blocks(model: nn.Module) -> None:
    """From now on keep the activations of each block for the backward pass, as usual."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()


def is_remade(module: nn.Module) -> bool:
    """Is it an activation function whose derivative needs its input? (relu's needs its output instead.)"""
    # slow to import, but a model has imported it already
    from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

    known = (nn.SiLU, nn.GELU, SiLUActivation, GELUActivation, GELUTanh)
    return isinstance(module, known) and not getattr(module, "inplace", False)


def mark(function: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
    """A forward hook: note on the output what it was made of."""
    if output.requires_grad:
        output.recipe = Recipe(function, arguments[0].detach())


def hooks_within(outer_pack: Callable, outer_unpack: Callable) -> tuple[Callable, Callable]:
    """Our pack and unpack hooks, which pass what they keep through those of the caller."""

    def pack(tensor: Tensor) -> Any:
        recipe = getattr(tensor, "recipe", None)
        return outer_pack(tensor) if recipe is None else replace(recipe, argument=outer_pack(recipe.argument))

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, Recipe):
            return outer_unpack(kept)
        with torch.no_grad():
            return kept.function(outer_unpack(kept.argument))

    return pack, unpack


def detached(tensor: Tensor) -> Tensor:
    """What is kept must not refer to the graph that keeps it: a backward pass that fails would never be freed."""
    return tensor.detach()


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def callers_hooks() -> tuple[Callable, Callable]:
    """The hooks in force now: PyTorch calls only the innermost, and `save_on_cpu` may be another."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) or (detached, unchanged)

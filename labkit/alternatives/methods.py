"""What a method puts into a frozen model, and how to leave it out again.

A method beside LoRA either swaps layers of the base for layers of its own, or stands before the text.
`AddedMethod` is the one record of that, kept on the model as `model.added_method`. Leaving the method out for
a while (`base_only`), taking it off for good (`remove`) and counting it (`labkit.alternatives.cost`) then
work alike for all of them.

A model carries one method at a time: each freezes everything it finds, so a second one would silently freeze
the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from labkit.alternatives.virtual_tokens import VirtualTokens
from labkit.lora import adapters
from labkit.lora.mounting import mounted_adapter
from labkit.models.surgery import replace_module


@dataclass
class AddedMethod:
    """What a method has put into a model.

    Attributes:
        config: as given to `add_prompt` and its like.
        layers: by full name, the layers that stand in place of the base's own; each holds that one as its
            `base`.
        tokens: what stands before the text; None for a method that changes layers.
        base_before_merge: by full name, the base's own layers while (IA)^3 is merged. They are kept here
            because a child of the merged layer would be counted and saved with it.
        mounted: does the model compute with the method? False within `base_only`.
    """

    config: Any
    layers: dict[str, nn.Module] = field(default_factory=dict)
    tokens: VirtualTokens | None = None
    base_before_merge: dict[str, nn.Module] = field(default_factory=dict)
    mounted: bool = False

    @property
    def positions(self) -> int:
        """Positions of the context that are lost to the text, as the model is now."""
        return self.tokens.length if self.tokens is not None and self.mounted else 0


def method_of(model: nn.Module) -> AddedMethod | None:
    """The method that was added to `model`, mounted or not; None if there is none."""
    return getattr(model, "added_method", None)


def require_method(model: nn.Module) -> AddedMethod:
    """The method that `model` computes with.

    Raises:
        ValueError: there is none.
    """
    added = method_of(model)
    if added is None or not added.mounted:
        raise ValueError(
            f"{type(model).__name__} has none of the methods beside LoRA; "
            "call add_prompt, add_prefix, add_bottleneck or add_ia3"
        )
    return added


def check_unadapted(model: nn.Module, method: str) -> None:
    """Raise a `ValueError` if `model` has LoRA or a method already, so `method` cannot be added."""
    present = method_of(model)
    if present is not None or any(".lora_" in name for name, _ in model.named_parameters()):
        carries = "LoRA adapters" if present is None else type(present.config).__name__
        raise ValueError(
            f"{type(model).__name__} has {carries} already, so {method} cannot be added; load a fresh base model, "
            "or take the other off with labkit.alternatives.methods.remove"
        )


def install(model: nn.Module, added: AddedMethod) -> nn.Module:
    """Freeze `model` and give it a method; in place. Returns `model`."""
    model.requires_grad_(False)
    model.added_method = added
    mount(model, added)
    return model


def mount(model: nn.Module, added: AddedMethod) -> None:
    """Put the method where the base's own layers are, or before the text."""
    for name, layer in added.layers.items():
        replace_module(model, name, layer)
    if added.tokens is not None:
        added.tokens.attach(model)
    added.mounted = True


def unmount(model: nn.Module, added: AddedMethod) -> None:
    """Put the base's own layers back, with the weights they had before any merge."""
    for name, layer in added.layers.items():
        replace_module(model, name, added.base_before_merge.get(name, layer.base))
    if added.tokens is not None:
        added.tokens.detach(model)
    added.mounted = False


@contextmanager
def base_only(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is its base alone, bit for bit, even while (IA)^3 is merged.

    A model with LoRA is handed to `labkit.lora.adapters.base_only`.

    Raises:
        ValueError: there is no method to leave out; for LoRA see there.
    """
    if mounted_adapter(model) is not None:
        with adapters.base_only(model):
            yield model
        return
    added = require_method(model)
    unmount(model, added)
    try:
        yield model
    finally:
        mount(model, added)


def remove(model: nn.Module) -> nn.Module:
    """Take the method off for good, in place: the base as it was, still frozen. Returns `model`.

    Raises:
        ValueError: there is none.
    """
    unmount(model, require_method(model))
    del model.added_method
    return model

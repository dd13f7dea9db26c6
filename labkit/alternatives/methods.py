"""What a method puts into a frozen model, whether it does anything there, and how to leave it out again.

A method beside LoRA either swaps layers of the base for layers of its own, or stands before the text.
`AddedMethod` is the one record of that, kept on the model as `model.added_method`. Leaving the method out for
a while (`base_only`), taking it off for good (`remove`) and counting it (`labkit.alternatives.cost`) then
work alike for all of them.

A model carries one method at a time: each freezes everything it finds, so a second one would silently freeze
the first.

*A method that does nothing* looks like a slow start: a model may pass a layer by. So every part of a method notes
that it was used, and the first whole forward pass is an error if a kind of part was not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from labkit.alternatives.virtual_tokens import VirtualTokens
from labkit.lora import adapters
from labkit.lora.mounting import mounted_adapter
from labkit.models.surgery import replace_module
from labkit.models.walk import adapters_in, own_name, unwrap


@dataclass
class AddedMethod:
    """What a method has put into a model.

    Attributes:
        config: as given to `add_prompt` and its like.
        layers: by path, the layers that stand in place of the base's own; each holds that one as its `base`.
        tokens: what stands before the text; None for a method that changes layers.
        mounted: does the model compute with the method? False within `base_only`.
        seen_at_work: has a whole forward pass used every kind of part?
        handle: of the hook that looks.
    """

    config: Any
    layers: dict[str, nn.Module] = field(default_factory=dict)
    tokens: VirtualTokens | None = None
    mounted: bool = False
    seen_at_work: bool = False
    handle: Any = None

    @property
    def positions(self) -> int:
        """Positions of the context that are lost to the text, as the model is now."""
        return self.tokens.length if self.tokens is not None and self.mounted else 0

    @property
    def name(self) -> str:
        """In a word: IA3, Prompt, Prefix or Bottleneck."""
        return type(self.config).__name__.removesuffix("Config")

    @property
    def settings(self) -> dict[str, Any]:
        """The method and its configuration in values that JSON can hold: what identifies it in a run."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
        return {"method": self.name} | values

    def idle(self, model: nn.Module) -> list[str]:
        """What has not been used since the method was added, in words; [] if every kind of part has.

        Of the layers of one name, as `k_proj`, one must have been: of experts, only a few see a given text.
        """
        if self.tokens is not None:
            return [] if self.tokens.is_used else [f"the {self.tokens.length} virtual tokens"]
        used: dict[str, bool] = {}
        for path, layer in self.layers.items():
            kind = own_name(model, path).rpartition(".")[2]
            used[kind] = used.get(kind, False) or layer.is_used
        return [f"every {kind}" for kind, was in used.items() if not was]

    def check_at_work(self, model: nn.Module) -> None:
        """Raise a `ValueError` if a whole forward pass, which just ended, used no part of a kind."""
        if self.seen_at_work or not self.mounted:
            return
        idle = self.idle(model)
        if idle:
            raise ValueError(
                f"{self.name} has no effect on {type(model).__name__}: a whole forward pass went by {', '.join(idle)}, "
                "so nothing would be trained there. Take it off with labkit.alternatives.methods.remove(model), "
                "and adapt other layers, or use LoRA"
            )
        self.seen_at_work = True

    def look(self, model: nn.Module, arguments: tuple, output: object) -> None:
        """The forward hook of the model that calls `check_at_work`; not while it is compiled, and nothing is done."""
        if not torch.compiler.is_compiling():
            self.check_at_work(model)


def method_of(model: nn.Module) -> AddedMethod | None:
    """The method that was added to `model`, mounted or not; None if there is none."""
    return getattr(unwrap(model), "added_method", None)


def require_method(model: nn.Module) -> AddedMethod:
    """The method that `model` computes with.

    Raises:
        ValueError: there is none.
    """
    added = method_of(model)
    if added is None or not added.mounted:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has none of the methods beside LoRA; "
            "call add_prompt, add_prefix, add_bottleneck or add_ia3"
        )
    return added


def check_unadapted(model: nn.Module, method: str) -> None:
    """Raise a `ValueError` if `model` has LoRA or a method already, so `method` cannot be added.

    Adapters of PEFT count, and parametrizations, such as `labkit.analysis.subspace`: they would be frozen.
    """
    added = method_of(model)
    present = adapters_in(model) if added is None else [type(added.config).__name__]
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        present.append("a parametrization")
    if present:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has {' and '.join(present)} already, so {method} cannot be added; load a "
            "fresh base model, or take the other off: labkit.alternatives.methods.remove, labkit.remove_adapter, "
            "or what made it"
        )


def install(model: nn.Module, added: AddedMethod) -> nn.Module:
    """Freeze `model` and give it a method; in place. Returns `model`."""
    inner = unwrap(model)
    inner.requires_grad_(False)
    inner.added_method = added
    added.handle = inner.register_forward_hook(added.look)
    mount(inner, added)
    return model


def mount(model: nn.Module, added: AddedMethod) -> None:
    """Put the method where the base's own layers are, or before the text.

    The base may have changed since the method was last mounted: been quantized, moved, or set to training.
    """
    for path, layer in added.layers.items():
        there = model.get_submodule(path)
        layer.put_over(there)
        replace_module(model, path, layer)
    if added.tokens is not None:
        added.tokens.attach(model)
    added.mounted = True


def unmount(model: nn.Module, added: AddedMethod) -> None:
    """Put the base's own layers back, with the weights they had before any merge."""
    for path, layer in added.layers.items():
        replace_module(model, path, layer.plain_base())
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
    unmount(unwrap(model), added)
    try:
        yield model
    finally:
        mount(unwrap(model), added)


def remove(model: nn.Module) -> nn.Module:
    """Take the method off for good, in place: the base as it was, still frozen. Returns `model`.

    Raises:
        ValueError: there is none.
    """
    added, inner = require_method(model), unwrap(model)
    unmount(inner, added)
    added.handle.remove()
    del inner.added_method
    return model

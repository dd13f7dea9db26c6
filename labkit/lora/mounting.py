"""Mounting an adapter: putting its layers where the base's stand, and taking them out again.

A model's adapters are in one record, `ModelAdapters`, kept at one attribute of the model. An adapter is
*mounted* while the model computes with it. Nothing is copied or computed to mount one: modules of the base
are swapped for its own, and the base's are never changed.
"""

from dataclasses import dataclass, field

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.layer import LoRALinear
from labkit.models.surgery import replace_module

RECORD = "lora_adapters"  # the attribute of a model that holds its `ModelAdapters`


@dataclass
class Adapter:
    """A named adapter of a model: what it puts in place of which modules, and what was there.

    Attributes:
        config: as given.
        modules: by full name, a `LoRALinear`, or a copy of a module that trains in full (`modules_to_save`).
        originals: the base's own modules that a layer here does not have as its `base`, by full name: those
            of copies, and those that PiSSA and its like made another base from. None if a 4-bit start did not
            keep them.
        start: how to make the base again that was not kept: {"origin": the fingerprint of the model before,
            "quantization": settings}.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    originals: dict[str, nn.Module] | None
    start: dict | None = None

    @property
    def layers(self) -> dict[str, LoRALinear]:
        """The layers with a correction, by full name: `modules` without those that train in full."""
        return {name: module for name, module in self.modules.items() if isinstance(module, LoRALinear)}

    @property
    def is_merged(self) -> bool:
        return any(layer.is_merged for layer in self.layers.values())

    @property
    def keeps_base(self) -> bool:
        """Are the base's own modules still there, so that the adapter can be taken out?"""
        return self.originals is not None

    def base_modules(self) -> dict[str, nn.Module]:
        """The modules of the base model that this adapter replaces."""
        return {n: m.base for n, m in self.modules.items() if n not in self.originals} | self.originals


@dataclass
class ModelAdapters:
    """The adapters of a model.

    Attributes:
        by_name: all of them, mounted or not.
        active: the name of the one that is mounted; None for the base alone.
    """

    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None


def adapters_of(model: nn.Module) -> ModelAdapters:
    """The record of the adapters of `model`; an empty one, which the model does not keep, if it has none."""
    return getattr(model, RECORD, None) or ModelAdapters()


def mounted_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with; None for the base alone."""
    adapters = adapters_of(model)
    return adapters.by_name.get(adapters.active)


def attach(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Give `model` an adapter that was made for its base, and mount it; the first one freezes the model.

    Raises:
        ValueError: see `unmount`. Nothing is changed then.
    """
    if mounted_adapter(model) is not None:
        unmount(model)
    if not adapters_of(model).by_name:
        model.requires_grad_(False)
        setattr(model, RECORD, ModelAdapters())
    adapters_of(model).by_name[name] = adapter
    mount(model, name)


def mount(model: nn.Module, name: str) -> None:
    """Put the modules of the adapter `name` where those of the base are.

    The base may have changed since the adapter was last mounted: been quantized, moved, or set to training.
    """
    adapters = adapters_of(model)
    adapter = adapters.by_name[name]
    for path, module in adapter.modules.items():
        there = model.get_submodule(path)
        if path in adapter.originals:
            adapter.originals[path] = there
        else:
            module.base = there
        move_beside(module.train(there.training), there)
        replace_module(model, path, module)
    adapters.active = name


def move_beside(module: nn.Module, there: nn.Module) -> None:
    """Move `module` to the device of `there`."""
    tensors = [*there.parameters(), *there.buffers()]
    if any(t.device != tensors[0].device for t in module.parameters()):
        module.to(tensors[0].device)


def unmount(model: nn.Module) -> None:
    """Put the base's own modules back where those of the mounted adapter are.

    Raises:
        ValueError: the adapter is merged, or the base that it changed is not at hand.
    """
    adapters, adapter = adapters_of(model), mounted_adapter(model)
    if adapter.is_merged:
        raise ValueError(f"the adapter {adapters.active!r} is merged into the base; unmerge it first")
    if not adapter.keeps_base:
        raise ValueError(
            f"the adapter {adapters.active!r} (init={adapter.config.init!r}) and its 4-bit base were made "
            "together: the weights from before were not kept, and the base alone is another model. Load a "
            "fresh base for other adapters"
        )
    for path, module in adapter.base_modules().items():
        replace_module(model, path, module.train(adapter.modules[path].training))
    adapters.active = None

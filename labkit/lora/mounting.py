"""Mounting an adapter: putting its layers where the base's stand, and taking them out again.

A model's adapters are in one record, `ModelAdapters`, kept at one attribute of the innermost model. An adapter
is *mounted* while the model computes with it. Nothing is copied or computed to mount one: modules of the base
are swapped for its own, and the base's are never changed.

What is not mounted is outside the model, where `.to()` does not reach. So it is noted where its place was, on
which device and in which dtype; when it comes back, it is given the moves and casts that its place got
meanwhile.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.layer import LoRALinear
from labkit.models.surgery import swap_modules
from labkit.models.walk import adapters_in, path_of, stood_in_for, unwrap
from labkit.quant.linear import QuantLinear

RECORD = "lora_adapters"  # the attribute of a model that holds its `ModelAdapters`


@dataclass(frozen=True)
class Place:
    """Where a module computes: `device`, and the `dtype` of its weights; None if it has none."""

    device: torch.device | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, module: nn.Module) -> "Place":
        """The place of `module`, or of what it stands in for."""
        module = unwrap(module)
        tensors = [*module.parameters(), *module.buffers()]
        weights = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        dtype = module.dtype if isinstance(module, QuantLinear) else next(iter(weights), None)
        return cls(tensors[0].device if tensors else None, dtype)

    def follow(self, now: "Place", module: nn.Module) -> None:
        """Give `module`, which was put aside when its place was here, the moves and casts from here to `now`."""
        if now.device != self.device:
            module.to(now.device)
        if now.dtype != self.dtype:
            module.to(now.dtype)


@dataclass
class Adapter:
    """A named adapter of a model: what it puts in place of which modules, and what was there.

    Attributes:
        config: as given.
        modules: by own name (see `labkit.models.walk`), a `LoRALinear`, or a copy of a module that trains in
            full (`modules_to_save`).
        originals: the base's own modules that a layer here does not have as its `base`, by own name: those
            of copies, and those that PiSSA and its like made another base from. None if a 4-bit start did not
            keep them.
        start: how to make the base again that was not kept: {"origin": the fingerprint of the model before,
            "quantization": settings}.
        places: by own name, where each module's witness was when this adapter was last mounted or put aside.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    originals: dict[str, nn.Module] | None
    start: dict | None = None
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LoRALinear]:
        """The layers with a correction, by full name: `modules` without those that train in full."""
        return {name: module for name, module in self.modules.items() if isinstance(module, LoRALinear)}

    def witnesses(self) -> dict[str, str]:
        """By own name, for each module, the layer whose moves and casts tell of those of the model.

        A layer of the base moves with the model. A copy that trains in full may be cast by itself: it is no
        witness.
        """
        layers = self.layers
        return {name: name if name in layers else next(iter(layers), name) for name in self.modules}

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
    return getattr(unwrap(model), RECORD, None) or ModelAdapters()


def mounted_adapter(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with; None for the base alone."""
    adapters = adapters_of(model)
    return adapters.by_name.get(adapters.active)


def standing(model: nn.Module, name: str) -> nn.Module:
    """What is in `model` where the module of this own name belongs: itself, or what stands in for it."""
    return model.get_submodule(path_of(model, name))


def attach(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Give `model` an adapter that was made for its base, and mount it; the first one freezes the model.

    Raises:
        ValueError: the name cannot be one; see `unmount`. Nothing is changed then.
    """
    check_name(name)
    if mounted_adapter(model) is not None:
        unmount(model)
    if not adapters_of(model).by_name:
        model.requires_grad_(False)
        setattr(unwrap(model), RECORD, ModelAdapters())
    adapters_of(model).by_name[name] = adapter
    mount(model, name)


def check_name(name: str) -> None:
    """Raise a `ValueError` if `name` cannot be the name of an adapter."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name={name!r}: give the adapter a name without dots")


def mount(model: nn.Module, name: str) -> None:
    """Put the modules of the adapter `name` where those of the base are.

    The base may have changed since the adapter was last mounted: been quantized, moved, cast, or set to
    training.
    """
    adapters = adapters_of(model)
    adapter = adapters.by_name[name]
    witnesses = adapter.witnesses()
    now = {path: Place.of(standing(model, witness)) for path, witness in witnesses.items()}
    for path, module in adapter.modules.items():
        there = standing(model, path)
        adapter.places.get(path, now[path]).follow(now[path], module)
        if path in adapter.originals:
            adapter.originals[path] = there
        if isinstance(module, LoRALinear) and not module.has_own_base:
            module.base = unwrap(there)
        module.train(there.training)
    swap_modules(model, adapter.modules)
    adapter.places = {path: Place.of(adapter.modules[witness]) for path, witness in witnesses.items()}
    adapters.active = name


def unmount(model: nn.Module) -> None:
    """Put the base's own modules back where those of the mounted adapter are.

    Raises:
        ValueError: the adapter is merged, or the base that it changed is not at hand.
    """
    adapters, adapter = adapters_of(model), mounted_adapter(model)
    if adapter.is_merged:
        raise ValueError(f"the adapter {adapters.active!r} is merged into the base; unmerge it first")
    check_base_kept(model)
    check_standing(model)
    base, witnesses = adapter.base_modules(), adapter.witnesses()
    for path, module in adapter.modules.items():
        if path in adapter.originals:
            adapter.places[path].follow(Place.of(adapter.modules[witnesses[path]]), base[path])
        base[path].train(module.training)
    swap_modules(model, base)
    adapter.places = {path: Place.of(base[witness]) for path, witness in witnesses.items()}
    adapters.active = None


def check_base_kept(model: nn.Module) -> None:
    """Raise a `ValueError` if the base alone, without the mounted adapter, is not at hand."""
    adapters, adapter = adapters_of(model), mounted_adapter(model)
    if not adapter.keeps_base:
        raise ValueError(
            f"the adapter {adapters.active!r} (init={adapter.config.init!r}) and its 4-bit base were made "
            "together: the weights from before were not kept, and the base alone is another model. Load a "
            "fresh base for other adapters"
        )


def check_standing(model: nn.Module) -> None:
    """Raise a `ValueError` if a module of the mounted adapter is not where it was put.

    `resize_token_embeddings`, for one, puts a new layer in the place of an old one, whatever that was.
    """
    adapter = mounted_adapter(model)
    for name, module in adapter.modules.items() if adapter else ():
        there = standing(model, name)
        while there is not module and (child := stood_in_for(there)) is not None:
            there = there.get_submodule(child)
        if there is not module:
            raise ValueError(
                f"{name} is not the layer that the adapter {adapters_of(model).active!r} put there: something replaced it "
                "since, such as resize_token_embeddings. Load the base again, change it first, and add the adapter then"
            )


def refuse_adapted(model: nn.Module, wanted: str) -> None:
    """Raise a `ValueError` if `model` carries adapters of any kind, which `wanted` would freeze or hide.

    Args:
        model: any module.
        wanted: what cannot be done, for the message: "add_lora".
    """
    carried = adapters_in(model)
    if not carried:
        return
    ways = {
        "LoRA": "put a second one beside it with labkit.add_adapter(model, name, config), or take it off with "
        "labkit.unload(model)",
        "adapters of a bank": "unload them from their AdapterBank",
        "PEFT's adapters": "take them off with PEFT's unload() or merge_and_unload()",
    }
    other = "take it off with labkit.alternatives.methods.remove(model)"
    words = " and ".join({"LoRA": "LoRA adapters"}.get(one, one) for one in carried)
    raise ValueError(
        f"{type(unwrap(model)).__name__} has {words} already, which {wanted} would freeze or hide: "
        f"{ways.get(carried[0], other)}, or load a fresh base model"
    )

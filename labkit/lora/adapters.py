"""Several adapters on one base: named, switched in no time, and turned off.

The base is held once. An adapter is a handful of small layers that stand in place of layers of the base; to
switch is to mount other layers, and nothing is copied or computed. Where an adapter has no layer, the base's
own stands: so the model without an adapter (`base_only`) runs as fast as it ever did, and gives its very
outputs.

    add_adapter(model, "poet", config)     beside those that are there, which stay as they are
    use_adapter(model, "clerk")            the one that the model computes with, trains, merges and saves
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import make_adapter
from labkit.lora.mounting import adapters_of, attach, mount, unmount
from labkit.models.walk import unwrap


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The adapters of `model`, mounted or not: names and configs."""
    return {name: adapter.config for name, adapter in adapters_of(model).by_name.items()}


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is mounted; None for the base alone."""
    return adapters_of(model).active


def add_adapter(model: nn.Module, name: str, config: LoRAConfig) -> nn.Module:
    """Make a new adapter beside those that `model` has, and mount it; in place. Returns `model`.

    Raises:
        ValueError: the name is taken, the mounted adapter is merged, or see `labkit.add_lora`. Nothing is
            changed then.
    """
    if not adapter_configs(model):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no adapter yet; begin with labkit.add_lora(model, config, {name!r})"
        )
    check_new(model, name)
    with base_only(model):
        adapter = make_adapter(model, config)
    attach(model, name, adapter)
    return model


def use_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Mount the adapter `name` in place of the mounted one, or with None the base alone. Returns `model`.

    Raises:
        ValueError: there is no adapter of this name, the mounted one is merged, or the base it changed is not
            at hand.
    """
    if name is not None:
        check_known(model, [name])
    now = active_adapter(model)
    if name == now:
        return model
    if now is not None:
        unmount(model)
    if name is not None:
        mount(model, name)
    return model


@contextmanager
def base_only(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is its base alone, without its adapter.

    Raises:
        ValueError: see `use_adapter`.
    """
    before = active_adapter(model)
    use_adapter(model, None)
    try:
        yield model
    finally:
        use_adapter(model, before)


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget the adapter `name`; if it is mounted, the base alone is left. In place; returns `model`.

    Raises:
        ValueError: see `use_adapter`.
    """
    check_known(model, [name])
    if active_adapter(model) == name:
        use_adapter(model, None)
    del adapters_of(model).by_name[name]
    return model


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a `ValueError` that says which adapters there are, if one of `names` is not among them."""
    known = adapter_configs(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no adapter {unknown[0]!r}; there are: {', '.join(known) or 'none'}")


def check_new(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` if `name` is taken, or cannot be the name of an adapter."""
    if name in adapter_configs(model):
        raise ValueError(
            f"there is an adapter named {name!r} already; choose another name, or remove_adapter it first"
        )
    if not isinstance(name, str) or "." in name or not name:
        raise ValueError(f"name={name!r}: give the adapter a name, text without dots")

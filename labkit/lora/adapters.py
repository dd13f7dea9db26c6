"""Several adapters on one base: named, switched in no time, and combined.

The base is held once. An adapter is a handful of small layers that stand in place of layers of the base; to switch is to
put other layers there, and nothing is copied or computed. Where an adapter has no layer, the base's own stands: so the
model without an adapter (`disabled`) runs as fast as it ever did, and gives its very outputs.

    add_adapter(model, "poet", config)     beside those that are there, which stay as they are
    use_adapter(model, "clerk")            the one that the model computes with, trains, merges and saves
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import Adapter, lora_layers, make_adapter, put_in_place
from labkit.models.surgery import replace_module


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The adapters of `model`, in place or not: names and configs."""
    return {name: adapter.config for name, adapter in getattr(model, "lora_adapters", {}).items()}


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that is in place; None for the base alone."""
    return getattr(model, "lora_active", None)


def add_adapter(model: nn.Module, name: str, config: LoRAConfig) -> nn.Module:
    """Make a new adapter beside those that `model` has, and put it in place.

    Raises:
        ValueError: the name is taken, the adapter in place is merged, or see `labkit.add_lora`. Nothing is changed then.
    """
    if not adapter_configs(model):
        raise ValueError(
            f"{type(model).__name__} has no adapter yet; begin with labkit.add_lora(model, config, {name!r})"
        )
    check_new(model, name)
    with disabled(model):
        adapter = make_adapter(model, config)
    return attach(model, name, adapter)


def attach(model: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """Give `model` an adapter that was made for it, and put it in place; the first one freezes the model."""
    if not adapter_configs(model):
        model.requires_grad_(False)
        model.lora_adapters, model.lora_active = {}, None
    model.lora_adapters[name] = adapter
    return use_adapter(model, name)


def use_adapter(model: nn.Module, name: str | None) -> nn.Module:
    """Put the adapter `name` in place of the one that is there; None for the base alone. In place; returns `model`.

    Raises:
        ValueError: there is none of this name, the one in place is merged, or the base it changed is not at hand.
    """
    if name is not None and name not in adapter_configs(model):
        raise ValueError(
            f"there is no adapter {name!r}; there are: {', '.join(adapter_configs(model)) or 'none'}"
        )
    now = active_adapter(model)
    if name == now:
        return model
    if now is not None:
        take_out(model)
    if name is not None:
        adapter = model.lora_adapters[name]
        for path, module in adapter.modules.items():
            there = model.get_submodule(path)
            if path in adapter.originals:
                adapter.originals[path] = there
            else:
                module.base = (
                    there  # which may have been quantized or moved while this adapter was not in place
                )
            move_beside(module.train(there.training), there)
        put_in_place(model, name)
    return model


def move_beside(module: nn.Module, there: nn.Module) -> None:
    """Move `module` to the device of `there`."""
    tensors = [*there.parameters(), *there.buffers()]
    if any(t.device != tensors[0].device for t in module.parameters()):
        module.to(tensors[0].device)


def take_out(model: nn.Module) -> None:
    """Put the base's own modules back."""
    name = active_adapter(model)
    adapter: Adapter = model.lora_adapters[name]
    if any(layer.merged_from is not None for layer in lora_layers(model).values()):
        raise ValueError(f"the adapter {name!r} is merged into the base; unmerge it first")
    if adapter.originals is None:
        raise ValueError(
            f"the adapter {name!r} (init={adapter.config.init!r}) is one with its 4-bit base: the weights from before were not kept, "
            "and the base without it is another model. Load a fresh base for other adapters"
        )
    for path, module in adapter.base_modules().items():
        replace_module(model, path, module.train(adapter.modules[path].training))
    model.lora_active = None


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block `model` is its base alone.

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
    """Forget the adapter `name`; if it is in place, the base alone is left. In place; returns `model`.

    Raises:
        ValueError: see `use_adapter`.
    """
    if name not in adapter_configs(model):
        raise ValueError(
            f"there is no adapter {name!r}; there are: {', '.join(adapter_configs(model)) or 'none'}"
        )
    if active_adapter(model) == name:
        use_adapter(model, None)
    del model.lora_adapters[name]
    return model


def check_new(model: nn.Module, name: str) -> None:
    if name in adapter_configs(model):
        raise ValueError(
            f"there is an adapter named {name!r} already; choose another name, or remove_adapter it first"
        )
    if "." in name or not name:
        raise ValueError(f"name={name!r}: give the adapter a name without dots")

"""Putting adapters into a model: make a layer for each target, freeze the base, and swap the layers in.

An adapter is a handful of modules that stand where modules of the base stood. `Adapter` remembers both, so that it can be taken out,
swapped for another and saved; the base's own modules are never changed.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from labkit.lora.config import LoRAConfig, pattern_matches
from labkit.lora.dora import DoRALinear
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.starts import RANDOM_STARTS, olora, pissa
from labkit.lora.targets import matching_layers, saved_names
from labkit.models.surgery import replace_module
from labkit.quant.linears import is_four_bit, widths


@dataclass
class Adapter:
    """A named adapter of a model: what it puts in place of which modules, and what was there.

    Attributes:
        config: as given.
        modules: by full name, a `LoRALinear`, or a copy of a module that trains in full (`modules_to_save`).
        originals: the base's own modules that a layer here does not have as its `base`, by full name: those of copies, and
            those that PiSSA and its like made another base from. None when a 4-bit start did not keep them.
        start: how to make the base again that was not kept: {"origin": the fingerprint of the model before,
            "quantization": settings}.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    originals: dict[str, nn.Module] | None
    start: dict | None = None

    def base_modules(self) -> dict[str, nn.Module]:
        """The modules of the base model that this adapter replaces."""
        return {n: m.base for n, m in self.modules.items() if n not in self.originals} | self.originals


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Freeze `model` and put a `LoRALinear` in place of each linear layer that `config.targets` names.

    Returns:
        `model` itself, changed in place; its output is what it was, because B starts at zero.

    Raises:
        ValueError: the model has adapters already, the targets match no layer, or the rank is too high for one.
            Nothing is changed then.
    """
    if lora_layers(model) or getattr(model, "lora_adapters", None):
        raise ValueError(
            f"{type(model).__name__} has LoRA adapters already; load a fresh base model to start again, or put a second "
            "one beside the first with labkit.add_adapter(model, name, config)"
        )
    if hasattr(model, "method_config"):
        raise ValueError(
            f"{type(model).__name__} is adapted by {type(model.method_config).__name__} already, which this would freeze; "
            "call labkit.alternatives.methods.remove(model) first, or load a fresh base model"
        )
    adapter = make_adapter(model, config)  # may raise: before any change
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lora_adapters = {name: adapter}
    put_in_place(model, name)
    return model


def make_adapter(model: nn.Module, config: LoRAConfig, names: list[str] | None = None) -> Adapter:
    """The layers of a new adapter, not yet in the model; `names`, full and exact, in place of `config.targets`.

    Raises:
        ValueError: see `add_lora`.
    """
    if names is None:  # what was saved may have more rank than it needs: PiSSA as plain LoRA of rank 2r
        names = matching_layers(model, config.targets, config.modules_to_save)
        check_ranks(model, config, names)
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(pattern_matches(key, name) for name in names):
            raise ValueError(
                f"the pattern {key!r} matches none of the {len(names)} layers that targets chose"
            )
    base = {name: model.get_submodule(name) for name in (*names, *saved_names(model, config.modules_to_save))}
    modules = {
        name: make_layer(base[name], config.for_layer(name))
        if name in names
        else copy.deepcopy(base[name]).requires_grad_(True)
        for name in base
    }
    for name, module in modules.items():
        module.train(base[name].training)
    changed = {
        n: base[n] for n, m in modules.items() if not isinstance(m, LoRALinear) or m.base is not base[n]
    }
    return Adapter(config, modules, changed)


def check_ranks(model: nn.Module, config: LoRAConfig, names: list[str]) -> None:
    for name in names:
        r, (inputs, outputs) = config.for_layer(name).r, widths(model.get_submodule(name))
        if r > min(inputs, outputs):
            raise ValueError(
                f"r={r} is above {min(inputs, outputs)}, the smaller side of a {outputs} x {inputs} layer ({name}); "
                "a matrix has no higher rank than that. Choose a smaller r, or leave this layer out of targets."
            )


def adapter_in_place(model: nn.Module) -> Adapter | None:
    """The adapter that `model` computes with; None for the base alone."""
    return getattr(model, "lora_adapters", {}).get(getattr(model, "lora_active", None))


def put_in_place(model: nn.Module, name: str) -> None:
    """Put the modules of an adapter where those of the base are."""
    adapter = model.lora_adapters[name]
    for path, module in adapter.modules.items():
        replace_module(model, path, module)
    model.lora_config, model.lora_active = adapter.config, name


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model`, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def make_layer(base: nn.Module, config: LoRAConfig) -> LoRALinear:
    """The layer of `config`'s variant over `base`, with its start made.

    Raises:
        ValueError: the variant or the start does not work on this kind of layer.
    """
    kind = type(base).__name__
    if isinstance(base, nn.Embedding):
        if config.variant.endswith("dora") or config.init not in RANDOM_STARTS[:2]:
            raise ValueError(
                f"variant={config.variant!r}, init={config.init!r} cannot adapt {kind}: an embedding is looked up, not "
                "multiplied; 'lora' and 'rslora' with init='default' can"
            )
        return LoRAEmbedding(base, config)
    if config.init.startswith("loftq"):
        raise ValueError(
            f"init={config.init!r} fits the adapter to what quantization loses: call labkit.add_qlora(model, config) on a "
            "full-precision model"
        )
    if config.init not in RANDOM_STARTS and is_four_bit(base):
        raise ValueError(
            f"init={config.init!r} splits a weight before it is quantized, and this {kind} is in 4 bits already: load the model "
            "in full precision and call labkit.add_qlora(model, config), which quantizes afterwards"
        )
    if config.init not in RANDOM_STARTS and config.variant.endswith("dora"):
        raise ValueError(
            f"init={config.init!r} changes the base, whose row norms DoRA starts from; use variant='lora' or 'rslora'"
        )
    layer = (DoRALinear if config.variant.endswith("dora") else LoRALinear)(base, config)
    if config.init.startswith("pissa"):
        pissa(layer, int(config.init.rpartition("_")[2]) if "niter" in config.init else None)
    elif config.init == "olora":
        olora(layer)
    return layer


@contextmanager
def base_in_place(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the base's own modules stand where adapters were; a merged weight stays merged."""
    adapter = adapter_in_place(model)
    kept = adapter.base_modules() if adapter is not None and adapter.originals is not None else {}
    for path, module in kept.items():
        replace_module(model, path, module)
    try:
        yield model
    finally:
        for path in kept:
            replace_module(model, path, adapter.modules[path])

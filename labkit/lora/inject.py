"""Injecting LoRA: make a layer for each target, freeze the base, and mount the layers.

`add_lora` is the whole of it in a few lines; `make_adapter` makes the layers without touching the model, so
that an error changes nothing, and `labkit.lora.mounting` puts them where the base's stand.
"""

import copy

import torch
from torch import nn

from labkit.lora.config import LoRAConfig, pattern_matches
from labkit.lora.dora import DoRALinear
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.mounting import Adapter, attach, refuse_adapted, standing
from labkit.lora.starts import olora, pissa
from labkit.lora.targets import matching_layers, saved_names, tell_fused
from labkit.models.walk import own_name, unwrap
from labkit.quant.layer_kinds import holds_weight, is_four_bit, widths


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Freeze `model` and put a `LoRALinear` in place of each linear layer that `config.targets` names.

    Returns:
        `model` itself, changed in place; its output is what it was, because B starts at zero.

    Raises:
        ValueError: the model has adapters already, of any kind, ours or PEFT's, mounted or put aside; the targets
            match no layer; or the rank is too high for one. Nothing is changed then.
    """
    check_arguments(model, config)
    refuse_adapted(model, "add_lora")
    attach(model, name, make_adapter(model, config))
    return model


def check_arguments(model: object, config: object) -> None:
    """Raise a `TypeError` unless these are a model and a `LoRAConfig`."""
    if not isinstance(model, nn.Module):
        hint = (
            "; models.load returns a pair: model, tokenizer = models.load(…)"
            if isinstance(model, tuple)
            else ""
        )
        raise TypeError(f"model is a {type(model).__name__}, and must be a PyTorch module{hint}")
    if not isinstance(config, LoRAConfig):
        hint = "; write LoRAConfig(**config)" if isinstance(config, dict) else ""
        raise TypeError(f"config is a {type(config).__name__}, and must be a LoRAConfig{hint}")


@torch.inference_mode(False)  # what is made in it can never train
def make_adapter(model: nn.Module, config: LoRAConfig, names: list[str] | None = None) -> Adapter:
    """The layers of a new adapter, not yet mounted.

    Args:
        model: the base, with no adapter mounted.
        config: see `labkit.LoRAConfig`.
        names: own names of the layers to adapt, instead of what `config.targets` means.

    Raises:
        ValueError: see `add_lora`.
    """
    if names is None:
        tell_fused(model, config.targets, config.modules_to_save)
    names, saved = places_for(model, config, names)
    base = {name: standing(model, name) for name in (*names, *saved)}
    modules = {name: make_layer(unwrap(base[name]), config.for_layer(name)) for name in names}
    modules |= {name: copy.deepcopy(base[name]).requires_grad_(True) for name in saved}
    for name, module in modules.items():
        module.train(base[name].training)
    changed = {
        n: base[n] for n, m in modules.items() if not isinstance(m, LoRALinear) or m.base is not base[n]
    }
    return Adapter(config, modules, changed)


def places_for(
    model: nn.Module, config: LoRAConfig, names: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """Own names of the layers to adapt and of the modules to train in full; all that can be checked is.

    Args:
        model, config, names: as for `make_adapter`.

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
    for name in names:
        check_layer(name, unwrap(standing(model, name)), config)
    return names, saved_names(model, config.modules_to_save)


def check_ranks(model: nn.Module, config: LoRAConfig, names: list[str]) -> None:
    for name in names:
        r, (inputs, outputs) = config.for_layer(name).r, widths(unwrap(standing(model, name)))
        if r > min(inputs, outputs):
            raise ValueError(
                f"r={r} is above {min(inputs, outputs)}, the smaller side of a {outputs} x {inputs} layer "
                f"({name}); a matrix has no higher rank than that. Choose a smaller r, or leave this layer "
                "out of targets."
            )


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model`, by own name: the one that the innermost model gives (`labkit.models.walk`)."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {own_name(model, path): module for path, module in found.items()}


def check_layer(name: str, base: nn.Module, config: LoRAConfig) -> None:
    """Raise a `ValueError` if the variant or the start of `config` does not work on `base`, called `name`."""
    kind = type(base).__name__
    if isinstance(base, nn.Embedding):
        if config.is_dora or config.init not in ("default", "gaussian"):
            raise ValueError(
                f"variant={config.variant!r}, init={config.init!r} cannot adapt {kind}: an embedding is "
                "looked up, not multiplied; 'lora' and 'rslora' with init='default' can"
            )
        return
    if config.is_loftq:
        raise ValueError(
            f"init={config.init!r} fits the adapter to what quantization loses: call "
            "labkit.add_qlora(model, config) on a full-precision model"
        )
    if config.starts_from_weight and is_four_bit(base):
        raise ValueError(
            f"init={config.init!r} splits a weight before it is quantized, and this {kind} is in 4 bits "
            "already: load the model in full precision and call labkit.add_qlora(model, config), which "
            "quantizes afterwards"
        )
    if config.starts_from_weight and config.is_dora:
        raise ValueError(
            f"init={config.init!r} changes the base, whose row norms DoRA starts from; use variant='lora' "
            "or 'rslora'"
        )
    if config.starts_from_weight and not holds_weight(base):
        raise ValueError(
            f"init={config.init!r} splits the weight of {name}, which is computed at each call (a {kind}); remove its "
            "parametrization first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if config.starts_from_weight and not base.weight.is_meta and not base.weight.isfinite().all():
        raise ValueError(
            f"init={config.init!r} splits the weight of {name}, which holds NaN or infinity; load the model again, or "
            "leave this layer out of targets"
        )


def make_layer(base: nn.Module, config: LoRAConfig) -> LoRALinear:
    """The layer of `config`'s variant over `base`, with its start made; see `check_layer`."""
    if isinstance(base, nn.Embedding):
        return LoRAEmbedding(base, config)
    layer = DoRALinear(base, config) if config.is_dora else LoRALinear(base, config)
    if config.is_pissa:
        pissa(layer, config.start_iterations)
    elif config.starts_from_weight:
        olora(layer)
    return layer

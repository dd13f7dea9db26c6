"""Weights that an adapter depends on, and that whoever loads it may not have.

An adapter needs its base. What a pretrained model is given afterwards is in nobody else's base: the head of a
classifier, which `from_pretrained(…, num_labels=3)` makes at random, and the rows of new tokens. Without them the
adapter is a correction of other numbers. So they are saved with it, as PEFT does with a classifier's head and with
embeddings of another length, or, where a folder cannot hold them, named.
"""

import warnings
from pathlib import Path

from torch import nn

from labkit.files import reading
from labkit.lora.fingerprint import is_within
from labkit.lora.mounting import Adapter
from labkit.models.surgery import tied_partner
from labkit.models.walk import ADDED, is_a, output_layers, places, unwrap
from labkit.quant.linear import QuantLinear


def new_in(model: nn.Module, base: str) -> list[str]:
    """Own names of modules that are not in a pretrained base: heads beside the backbone, embeddings that were resized.

    Args:
        model: with its base in a backbone, as transformers' models for a task have it; [] for others.
        base: the folder of the base; if it is not on this machine, nothing is known of its vocabulary.
    """
    inner = unwrap(model)
    backbone = getattr(inner, "base_model_prefix", "")
    outputs = {id(layer) for layer in output_layers(inner)}
    found = [
        name
        for name, child in inner.named_children()
        if backbone in inner._modules
        and name != backbone
        and not outputs  # what stands beside an output layer, such as an encoder of images, was pretrained with it
        and has_weights(child)
        and not any(is_a(child, added) for added in ADDED)
    ]
    rows = vocabulary_of(base)
    tables = [(name, m) for name, _, m in places(inner) if isinstance(m, nn.Embedding) or id(m) in outputs]
    now = getattr(getattr(inner, "config", None), "vocab_size", None)
    if rows is not None and rows != now:
        found += [name for name, table in tables if now in table.weight.shape]
    return found


def has_weights(module: nn.Module) -> bool:
    """Is there a parameter in it, or a weight in 4 bits?"""
    return next(module.parameters(), None) is not None or any(
        isinstance(m, QuantLinear) for m in module.modules()
    )


def vocabulary_of(folder: str) -> int | None:
    """The vocab_size of the model in a folder; None if it does not say, or is not there."""
    try:
        config = reading.read_json(Path(folder) / "config.json") if folder else None
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def brought_along(model: nn.Module, adapter: Adapter, base: str) -> tuple[dict[str, nn.Module], list[str]]:
    """What the folder of an adapter holds beside it, and what it depends on and cannot hold, with a warning.

    Returns:
        (modules by own name, to be saved in full; own names of the others).
    """
    modules = {name: module for name, _, module in places(model)}
    found = new_in(model, base)
    new = [name for name in found if not is_within(name, adapter.modules)]
    whole = {name: modules[name] for name in new if can_be_saved(model, name, modules[name], adapter)}
    adapted = [name for name in adapter.layers if is_within(name, found)]
    alone = [name for name in (*new, *adapted) if name not in whole]
    tell_alone(alone)
    return whole, alone


def tell_alone(names: list[str]) -> None:
    """Warn of new weights that an adapter depends on, and that its folder does not hold; of none, say nothing."""
    if names:
        warnings.warn(
            f"the weights of {', '.join(names)} are new in this model (a head, or a vocabulary of another size) and not "
            "part of this adapter, which is nothing without them: it loads only onto this very base. Keep that with "
            "save_pretrained, or train these layers in full: LoRAConfig(modules_to_save=[…]), after "
            "untie_embeddings(model) where they are tied",
            stacklevel=4,  # the line that calls save_adapter
        )


def can_be_saved(model: nn.Module, name: str, module: nn.Module, adapter: Adapter) -> bool:
    """Can a folder hold this module whole? Not if its weight is tied or in 4 bits, or a layer in it is adapted."""
    return (
        tied_partner(model, module) is None
        and not any(isinstance(m, QuantLinear) for m in module.modules())
        and not any(is_within(layer, [name]) for layer in adapter.modules)
    )

"""Finding and replacing modules of a model: by name, by role (the output layer), by the weights they share.

In most small models the output layer's weight is the embedding's (**tied** embeddings): one tensor, held by
two modules. Changing one then changes both, so code that replaces or adapts a layer asks `tied_partner`
first.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from labkit.checks import nearest
from labkit.models.walk import output_layers, path_of, unwrap, walk


def is_output_layer(model: nn.Module, module: nn.Module) -> bool:
    """Is `module` the layer that makes logits (`lm_head`), of `model` or of one inside it, or stands in for it?

    Its weight is often the embedding's, tied.
    """
    layer = unwrap(module)
    return any(layer is output for output in output_layers(model))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def swap_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put each module of `new` where the one of its own name stands: in all places, if that is in several.

    Args:
        model: any module; names are those of the innermost model (see `labkit.models.walk`).
        new: modules by own name.

    Raises:
        KeyError: there is no module of a name. Nothing is changed then.
    """
    there = {name: model.get_submodule(path_of(model, name)) for name in new}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            holders.setdefault(id(module), []).append((parent, child))
    for name, module in new.items():
        for parent, child in holders[id(there[name])]:
            setattr(parent, child, module)


def detach_from_file(model: nn.Module, leave: set[int]) -> None:
    """Copy the parameters and buffers of `model`, one after the other, except those with an id in `leave`.

    The weights of a model that was loaded from a file are views of the file, mapped into memory as a whole,
    and one view keeps all of it there: without this, the embedding would hold on to every weight that was
    quantized.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in leave and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def ends_with(name: str, part: str) -> bool:
    """Do the last parts of a module's name equal `part`?

    >>> ends_with("layers.0.q_proj", "q_proj"), ends_with("layers.0.my_q_proj", "q_proj")
    (True, False)
    """
    return f".{name}".endswith(f".{part}")


def inside(name: str, parents: Sequence[str]) -> bool:
    """Is the module one of `parents` (names, or last parts of names), or inside one?"""
    parts = name.split(".")
    return any(ends_with(".".join(parts[:i]), p) for p in parents for i in range(1, len(parts) + 1))


def weight_holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that hold each parameter, by its id, and their own names; more than one where it is tied."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for layer in walk(model):
        for parameter in layer.module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((layer.name, layer.module))
    return holders


def tied_partner(
    model: nn.Module, module: nn.Module, holders: Mapping[int, list] | None = None
) -> str | None:
    """The own name of another module with the very same weight tensor, or None.

    Args:
        model: a model.
        module: a module of it.
        holders: `weight_holders(model)`, to look up many modules without walking the model for each.
    """
    layer = unwrap(module)
    weight = layer._parameters.get("weight")
    same = (weight_holders(model) if holders is None else holders).get(id(weight), ())
    return next((name for name, other in same if other is not layer), None)


def untie_embeddings(model: nn.Module) -> nn.Module:
    """Give the output layer a weight of its own, equal to the embedding's, in place.

    From then on it counts and is saved by itself.

    Returns:
        `model`; its output is unchanged.

    Raises:
        ValueError: the two are not tied.
    """
    output = next(iter(output_layers(model)), None)
    if output is None or tied_partner(model, output) is None:
        raise ValueError(
            f"the embedding and the output layer of {type(unwrap(model)).__name__} share no weight; nothing to untie"
        )
    with torch.no_grad():
        output.weight = nn.Parameter(output.weight.clone(), requires_grad=output.weight.requires_grad)
    unwrap(model).config.tie_word_embeddings = False
    return model


def no_match_message(
    given: str, name: str, model: nn.Module, linears: Iterable[str], besides: Iterable[str] = ()
) -> str:
    """The message about a name that matches no linear layer, with the nearest name and all that there are.

    Args:
        given: the setting, as the message shows it.
        name: the name in it.
        model: the model that was searched.
        linears: full names of its linear layers.
        besides: other names that would have been understood.
    """
    last_parts = list(dict.fromkeys(full.rpartition(".")[2] for full in linears))
    return (
        f"{given} matches no linear layer of {type(unwrap(model)).__name__}{nearest(name, [*last_parts, *besides])} "
        f"Its linear layers are named: {', '.join(last_parts) or 'none at all'}"
    )

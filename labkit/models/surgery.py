"""Finding and replacing modules of a model: by name, by role (the output layer), by the weights they share.

In most small models the output layer's weight is the embedding's (**tied** embeddings): one tensor, held by
two modules. Changing one then changes both, so code that replaces or adapts a layer asks `tied_partner`
first.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from labkit.checks import nearest


def is_output_layer(model: nn.Module, module: nn.Module) -> bool:
    """Is `module` the layer that makes logits (`lm_head`)? Its weight is often the embedding's, tied."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module is output


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


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
    """The modules that hold each weight tensor, by its id; more than one where weights are tied."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append((name, module))
    return holders


def tied_partner(
    model: nn.Module, module: nn.Module, holders: Mapping[int, list] | None = None
) -> str | None:
    """The name of another module with the very same weight tensor, or None.

    Args:
        model: a model.
        module: a module of it.
        holders: `weight_holders(model)`, to look up many modules without walking the model for each.
    """
    weight = module._parameters.get("weight")
    same = (weight_holders(model) if holders is None else holders).get(id(weight), ())
    return next((name for name, other in same if other is not module), None)


def untie_embeddings(model: nn.Module) -> nn.Module:
    """Give the output layer a weight of its own, equal to the embedding's, in place.

    From then on it counts and is saved by itself.

    Returns:
        `model`; its output is unchanged.

    Raises:
        ValueError: the two are not tied.
    """
    tied = hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None
    if not tied or tied_partner(model, model.get_output_embeddings()) is None:
        raise ValueError(
            f"the embedding and the output layer of {type(model).__name__} share no weight; nothing to untie"
        )
    output = model.get_output_embeddings()
    with torch.no_grad():
        output.weight = nn.Parameter(output.weight.clone(), requires_grad=output.weight.requires_grad)
    model.config.tie_word_embeddings = False
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
        f"{given} matches no linear layer of {type(model).__name__}{nearest(name, [*last_parts, *besides])} "
        f"Its linear layers are named: {', '.join(last_parts) or 'none at all'}"
    )

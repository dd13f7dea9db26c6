"""All or nothing: a change of a model that fails half-way is taken back.

Checks before a change are the first line. This is the second, for what shows only once the change is made: the
4-bit base that has to be made again from the model, to see whether it is that of an adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[nn.Module]:
    """If the block raises, `model` is put back together as it was: its modules, its parameters and which of
    them train, buffers, hooks and attributes.

    Values inside a tensor are not kept: the block may replace tensors, but not write into those of `model`.
    Until it ends, what it replaces stays in memory.
    """
    modules = [(module, snapshot(module)) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model
    except BaseException:
        for module, before in modules:
            restore(module, before)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        raise


def snapshot(module: nn.Module) -> dict[str, tuple[object, dict | None]]:
    """The attributes of a module, and what is in those that are dictionaries: its children, parameters, hooks."""
    return {
        name: (value, dict(value) if isinstance(value, dict) else None)
        for name, value in vars(module).items()
    }


def restore(module: nn.Module, before: dict[str, tuple[object, dict | None]]) -> None:
    """Give a module back what `snapshot` found."""
    vars(module).clear()
    for name, (value, inside) in before.items():
        vars(module)[name] = value
        if isinstance(value, dict) and inside is not None:
            value.clear()
            value.update(inside)

"""What the saved state of a run must be before any of it is taken: whole, finite, of the right shapes.

A file may have been cut, edited or written by another version. One tensor that is missing, or of one row
where there should be many, would be taken for a zero, or repeated, without a word. So every part is compared
with what this run would have made itself.
"""

import math

import torch
from torch import Tensor, nn

from labkit.checks import is_number, is_whole
from labkit.optim.saved_state import check_state
from labkit.training.history import BestWeights, EvaluationRecord, History, StepRecord


def different_tensors(saved: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> list[str]:
    """What differs between the trained parameters of a file and those of the run, in words."""
    there = {name: kind_of(value) for name, value in saved.items()}
    here = {name: kind_of(value) for name, value in parameters.items()}
    names = [name for name in (there | here) if there.get(name) != here.get(name)]
    if not names:
        return []
    (was, now), more = (one.get(names[0], "none") for one in (there, here)), len(names) - 1
    shown = f"trained parameters: {names[0]} {was} there, {now} here"
    return [shown + (f", and {more} more" if more else "")]


def kind_of(tensor: Tensor) -> str:
    """Shape and dtype, for a message.

    >>> kind_of(torch.zeros(2, 3))
    '(2, 3) float32'
    """
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def check_progress(state: dict, total: int) -> tuple[int, History]:
    """The steps done and the history, if they can be.

    Raises:
        ValueError, KeyError: they cannot.
    """
    done, steps, evals = state["steps_done"], state["steps"], state["evals"]
    if not is_whole(done) or done > total:
        raise ValueError(f"steps_done={done!r} is not one of the {total} steps of this run")
    if [check_record(record, StepRecord)["step"] for record in steps] != list(range(1, done + 1)):
        raise ValueError(f"it has records of {len(steps)} steps, and {done} were done")
    for record in evals:
        if check_record(record, EvaluationRecord)["step"] > done:
            raise ValueError(f"it has an evaluation after step {record['step']}, and {done} were done")
    if state["stopped"] not in ("finished", "early", "interrupted"):
        raise ValueError(f"stopped={state['stopped']!r}")
    known = {name: state[name] for name in vars(History()) if name in state}
    return done, History(**known)


def check_record(record: dict, kind: type) -> dict:
    """`record`, if it has what a record of this kind has, and finite numbers.

    Raises:
        ValueError: it has not.
    """
    fields = kind.__annotations__
    if not isinstance(record, dict) or record.keys() != fields.keys():
        raise ValueError(f"a {kind.__name__} has {', '.join(fields)}, and not {str(record)[:80]}")
    wrong = [name for name, value in record.items() if not is_number(value) or not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{wrong[0]}={record[wrong[0]]!r} in a {kind.__name__}")
    return record


def check_moments(
    tensors: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    done: int,
    history: History,
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by parameter, if it is what the optimizer keeps.

    A parameter that never had a gradient has no state.

    Raises:
        ValueError: a moment is missing, or of another dtype or shape, or a count of steps cannot be.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, *rest = key.split("/", 2)
        if kind == "optimizer":
            found.setdefault(rest[1], {})[rest[0]] = value
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in parameters.items():
        if name not in found and name in history.without_gradient:
            continue
        state = found.get(name, {})
        check_state(optimizer, p, state, groups[p], name)
        if not 1 <= state["step"].item() <= done or state["step"].item() % 1:
            raise ValueError(f"{name} took {state['step'].item()} steps, and the run {done}")
    return found


def check_best(
    tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], loss: float | None
) -> BestWeights | None:
    """The best weights so far, if there are any.

    Raises:
        ValueError: not those of all parameters.
    """
    weights = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
    if loss is None and not weights:
        return None
    wrong = different_tensors(weights, parameters)
    if wrong or not is_number(loss):
        raise ValueError(f"the best weights, of loss {loss!r}, are not those of the parameters: {wrong}")
    return BestWeights(loss, weights)


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raise a `ValueError` that names a tensor with NaN or infinite numbers."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} has numbers that are NaN or infinite")


def check_generators(tensors: dict[str, Tensor]) -> list[tuple[torch.Generator, Tensor]]:
    """The random generators of this machine, each with the state that the file has for it.

    Raises:
        RuntimeError, KeyError: a state that a generator does not take, or none for the CPU.
    """
    pairs = [(torch.default_generator, tensors["rng/cpu"])]
    if torch.cuda.is_available():
        torch.cuda.init()
        named = [(f"rng/cuda/{i}", one) for i, one in enumerate(torch.cuda.default_generators)]
        pairs += [(generator, tensors[name]) for name, generator in named if name in tensors]
    for generator, state in pairs:
        torch.Generator(generator.device).set_state(state)  # refuses what is none
    return pairs

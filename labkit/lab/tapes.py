"""Recorded results of a lesson's slow calls, played back in place of them.

Training and generating take the time in a lesson; everything else is quick. So a tape holds what these calls gave in
one cell, in their order: texts, the history of a run, and the weights that it trained. It plays for the very source
that it was recorded from; for any other, the cell runs as it stands.

    FOLDER/LESSON/CELL.json                   {"cell": sha256 of its source, "calls": [{"train": history, "weights": …}]}
    FOLDER/LESSON/CELL-0.safetensors          what call 0 trained, in the order of the model's parameters
    FOLDER                                    data/catch_up (committed, small), or catch_up in the cache (`make catch-up`)

Weights that no file holds become NaN: a section that wants them shows it at once, instead of a wrong number.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from labkit.files import new_file, read_json, read_tensors, write_json
from labkit.paths import cache_folder, data_folder
from labkit.training import evaluate, loop, shared_prefix
from labkit.training.history import History

FIELDS = ("steps", "evals", "left_out", "stopped", "held_out_left_out", "without_gradient")
MAX_BYTES = 6 * 2**20  # of a file of weights in data/
SLOW = {
    "train": loop.train,
    "generate": evaluate.generate,
    "generate_shared": shared_prefix.generate_shared,
}


def digest(source: str) -> str:
    return hashlib.sha256(source.strip().encode()).hexdigest()


def find_tape(lesson: str, cell: str, source: str) -> "Tape | None":
    """The tape of a cell, if there is one of this very source."""
    for folder in (cache_folder() / "catch_up", data_folder() / "catch_up"):
        path = folder / lesson / f"{cell}.json"
        try:
            found = read_json(path)
        except (FileNotFoundError, ValueError):
            continue
        if isinstance(found, dict) and found.get("cell") == digest(source):
            return Tape(path, found["calls"])
    return None


class Tape:
    """The recorded calls of one cell, played in order."""

    def __init__(self, path: Path, calls: list[dict]):
        self.path, self.calls, self.next = path, calls, 0

    def play(self, what: str, arguments: tuple) -> Any:
        """The result of the next call.

        Raises:
            LookupError: the cell calls something else than was recorded.
        """
        call = self.calls[self.next] if self.next < len(self.calls) else {}
        if what not in call:
            raise LookupError(f"{self.path} does not fit its cell any more; make it again: make catch-up")
        self.next += 1
        if what != "train":
            return call[what]
        trained = [p for p in arguments[0].parameters() if p.requires_grad]
        name, shipped = call.get("weights"), call.get("adapter")
        if shipped is not None:
            fill_from_adapter(arguments[0], data_folder() / shipped)
        elif name is None:
            fill(trained, None)
        else:
            tensors = read_tensors(self.path.parent / name)
            fill(trained, [tensors[f"{n:04}"] for n in range(len(tensors))])
        return History(**{field: call["train"][field] for field in FIELDS})


@torch.no_grad()
def fill(parameters: list[nn.Parameter], values: list[torch.Tensor] | None) -> None:
    """Put values into what trains; NaN for None.

    Raises:
        LookupError: other shapes than were recorded.
    """
    if values is not None and [p.shape for p in parameters] != [v.shape for v in values]:
        raise LookupError("the recorded weights have other shapes; make them again: make catch-up")
    for n, parameter in enumerate(parameters):
        parameter.fill_(float("nan")) if values is None else parameter.copy_(values[n])


@torch.no_grad()
def fill_from_adapter(model: nn.Module, folder: Path) -> None:
    """Put the factors of an adapter folder into a model that has adapters of the same ranks in the same places.

    Raises:
        LookupError: another model, or other places.
    """
    tensors = read_tensors(folder / "adapter_model.safetensors")
    trained = {f"base_model.model.{n}.weight": p for n, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in trained.items()} != {n: t.shape for n, t in tensors.items()}:
        raise LookupError(f"the adapter in {folder} does not fit this model")
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


@contextmanager
def in_place_of_slow_calls(namespace: dict, make: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """During the block a notebook's slow calls are what `make(name, function)` gives for them."""
    others = {function: make(name, function) for name, function in SLOW.items()}
    homes = [(sys.modules["labkit"], "train"), (evaluate, "generate"), (shared_prefix, "generate_shared")]
    by_name = [(name, value) for name, value in namespace.items() if callable(value) and is_in(value, others)]
    try:
        for module, name in homes:
            setattr(module, name, others[SLOW[name]])
        for name, function in by_name:
            namespace[name] = others[function]
        yield
    finally:
        for module, name in homes:
            setattr(module, name, SLOW[name])
        back = {other: function for function, other in others.items()}
        for name, value in namespace.items():  # also what the block itself has imported
            if callable(value) and is_in(value, back):
                namespace[name] = back[value]


def is_in(value: object, functions: dict) -> bool:
    return any(value is function for function in functions)


def playing(namespace: dict, tape: Tape):
    """During the block slow calls come from `tape`."""
    return in_place_of_slow_calls(
        namespace, lambda what, _: lambda *arguments, **options: tape.play(what, arguments)
    )


class Recorder:
    """Runs slow calls and notes what they give, for a tape."""

    def __init__(self, adapter: str | None = None) -> None:
        """`adapter`: do not train, take the factors of this folder in data/."""
        self.adapter = adapter
        self.calls: list[dict] = []
        self.weights: dict[int, list[torch.Tensor]] = {}

    def make(self, what: str, function: Callable) -> Callable:
        def called(*arguments: Any, **options: Any) -> Any:
            if what == "train" and self.adapter:
                fill_from_adapter(arguments[0], data_folder() / self.adapter)
                given = History(stopped="recorded")
                self.calls.append({"train": {f: getattr(given, f) for f in FIELDS}, "adapter": self.adapter})
                return given
            given = function(*arguments, **options)
            if what == "train":
                trained = [p for p in arguments[0].parameters() if p.requires_grad]
                self.weights[len(self.calls)] = [
                    p.detach().to("cpu", torch.float16, copy=True) for p in trained
                ]
                self.calls.append(
                    {"train": {field: getattr(given, field) for field in FIELDS}, "weights": None}
                )
            else:
                self.calls.append({what: given})
            return given

        return called

    def write(self, path: Path, source: str, at_most: int) -> int:
        """Write the tape, with weights in fp16 where they take at most so many bytes; gives the bytes written."""
        total = 0
        for n, tensors in self.weights.items():
            if sum(t.nbytes for t in tensors) <= at_most:
                name = f"{path.stem}-{n}.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                with new_file(path.parent / name) as part:
                    save_file({f"{i:04}": t.contiguous() for i, t in enumerate(tensors)}, part)
                self.calls[n]["weights"] = name
                total += (path.parent / name).stat().st_size
        write_json(path, {"cell": digest(source), "calls": self.calls}, indent=None)
        return total + path.stat().st_size

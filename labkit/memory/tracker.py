"""Watch every tensor of a training step come and go: the bookkeeping behind `simulate` and, for the components, `measure`.

PyTorch calls a dispatch mode for each operation below autograd, in the forward pass, in the backward pass, and in the optimizer.
This one looks at what comes out. Memory belongs to a *storage* (views share one), so storages are counted; a weak reference
to it says when it is gone. What a tensor is follows from when it was made and whether it lived on:

- made in the forward pass and still there at its end: an activation, kept for the backward pass; which kind, from the module
  that was running;
- put into `.grad`: a gradient (a hook says so);
- anything else: temporary.

It sees tensors, not what an operation takes for itself inside: those bytes only the allocator knows; see `labkit.memory.measurement`.
PyTorch's own `torch.distributed._tools.mem_tracker.MemTracker` works the same way, but keeps no time line, and tells
activations from temporaries by module and not by whether the backward pass needs them.
"""

import re
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.memory.ledger import Timeline

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Entry:
    """The life of a storage: bytes, the module and phase that made it, what it is, and the events of its birth and death."""

    bytes: int
    module: str
    phase: str
    label: str | None
    born: int
    died: int | None = None
    is_input: bool = False  # a mask, or the state of the random generator


class Tracker(TorchDispatchMode):
    """Record the storages of everything that is made inside `with tracker:`.

    Args:
        model: its modules give activations their kind, its parameters their gradients' label.
        static: tensors that are there already, by component: {"weights/bf16": [...], …}.
        count_generator: count the states of the random generator that checkpointing keeps; they are in host memory.
    """

    def __init__(self, model: nn.Module, static: dict[str, Iterable[Tensor]], count_generator: bool = True):
        super().__init__()
        self.count_generator = count_generator
        self.model, self.phase = model, "forward"
        self.entries: list[Entry] = []
        self.alive: dict[int, Entry] = {}
        self.events = 0
        self.starts: list[tuple[str, int]] = []
        self.modules = [""]
        self.done = False
        for label, tensors in static.items():
            for tensor in tensors:
                self.see(tensor, label)

    def see(self, tensor: Tensor, label: str | None = None) -> None:
        """Count the storage of `tensor`, once."""
        storage = tensor.untyped_storage()
        key, n = storage._cdata, storage.nbytes()
        if n == 0 or key in self.alive:
            return
        self.events += 1
        entry = Entry(
            n, self.modules[-1], self.phase, label, self.events, is_input=tensor.dtype == torch.bool
        )
        self.alive[key] = entry
        self.entries.append(entry)
        weakref.finalize(storage, self.gone, key).atexit = False

    def gone(self, key: int) -> None:
        if self.done:
            return
        self.events += 1
        self.alive.pop(key).died = self.events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def run(self, func, args, kwargs):
        """Carry out an operation; a simulation does so without numbers."""
        return func(*args, **kwargs)

    @contextmanager
    def watch(self):
        """Within the block, know which module runs, and which tensors are gradients."""
        names = {module: name for name, module in self.model.named_modules()}
        handles = []

        def enter(module, _):
            self.modules.append(names[module])

        def leave(module, *_):
            self.modules.pop()

        for module in names:
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(self.is_gradient))
        original = torch.get_rng_state

        def get_rng_state():  # makes a tensor without an operation that could be watched
            state = original()
            if self.count_generator:
                self.see(state)
                self.alive[state.untyped_storage()._cdata].is_input = True
            return state

        try:
            with self, mock.patch("torch.get_rng_state", get_rng_state):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def is_gradient(self, parameter: nn.Parameter) -> None:
        entry = self.alive.get(parameter.grad.untyped_storage()._cdata)
        if entry is not None:
            entry.label = "gradients/of all that trains"

    def start(self, phase: str) -> None:
        """Say which phase of the step begins."""
        if phase == "backward":  # all that is left of the forward pass now is there for the backward pass
            for entry in self.alive.values():
                if entry.label is None:
                    entry.label = f"activations/{kind_of(entry)}"
        self.phase = phase
        self.modules = [""]
        self.starts.append((phase, self.events))

    def finish(self) -> "Record":
        """All that was seen; what goes after this is not."""
        self.done = True
        for entry in self.entries:
            entry.label = entry.label or "temporary/tensors"
        return Record(list(self.entries), self.events, list(self.starts))


@dataclass
class Record:
    """The storages of a step, each with its label."""

    entries: list[Entry]
    events: int
    starts: list[tuple[str, int]]

    def series(self, name: Callable[[str], str] = lambda label: label) -> dict[str, list[int]]:
        """Live bytes after every event, for each label, or each `name(label)`."""
        import numpy as np

        change: dict[str, np.ndarray] = {}
        for entry in self.entries:
            values = change.setdefault(name(entry.label), np.zeros(self.events + 2, dtype=np.int64))
            values[entry.born] += entry.bytes
            if entry.died is not None:
                values[entry.died] -= entry.bytes
        return {label: values.cumsum() for label, values in change.items()}

    def at(self, event: int) -> dict[str, int]:
        """Live bytes of each label after an event."""
        live: dict[str, int] = {}
        for entry in self.entries:
            if entry.born <= event and (entry.died is None or entry.died > event):
                live[entry.label] = live.get(entry.label, 0) + entry.bytes
        return live

    def peak(self) -> tuple[int, int]:
        """(bytes, event) of the most live bytes."""
        total = sum(self.series().values())
        event = int(total.argmax())
        return int(total[event]), event

    def largest(self) -> dict[str, int]:
        """The most bytes of each label at any one time."""
        return {label: int(values.max()) for label, values in self.series().items()}

    def phase_at(self, event: int) -> str:
        """The phase that an event belongs to."""
        return next((phase for phase, first in reversed(self.starts) if event > first), "before the step")

    def timeline(self) -> Timeline:
        """Live bytes by component."""
        series = self.series(lambda label: label.partition("/")[0])
        return Timeline({name: values.tolist() for name, values in series.items()}, list(self.starts))


def kind_of(entry: Entry) -> str:
    """Which kind of activation: where in the model it was made."""
    path = entry.module
    last = path.rpartition(".")[2]
    if entry.is_input or "rotary" in path or path == "model":
        return "inputs"
    if re.search(r"(^|\.)(self_attn|attn|attention)(\.|$)", path):
        return "attention"
    if re.search(r"(^|\.)(mlp|feed_forward|ffn)(\.|$)", path):
        return "mlp"
    if "norm" in last:
        return "norms"
    return "residual" if path and path != "lm_head" else "logits"

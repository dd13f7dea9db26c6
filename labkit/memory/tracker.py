"""Watch every tensor of a training step come and go: the bookkeeping behind `simulate` and `measure`.

PyTorch calls a dispatch mode for each operation below autograd. This one looks at what comes out. Memory
belongs to a *storage*, which views share, so storages are counted; a weak reference says when one is gone.
What it is follows from when it was made, and whether it lived on:

- made in the forward pass and still there at its end: an activation, whose kind follows from the module that
  made it;
- put into `.grad`: a gradient (a hook says so);
- anything else: temporary.

What an operation takes for itself inside, only the allocator sees: `labkit.memory.measurement`. PyTorch's own
`torch.distributed._tools.mem_tracker.MemTracker` works the same way, but keeps no time line, and separates
activations from temporaries by module, not by whether the backward pass needs them.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.memory.ledger import Timeline

PHASES = ("forward", "backward", "optimizer")


@dataclass
class TrackedTensor:
    """The life of the storage of a tensor.

    Attributes:
        bytes: of the storage.
        module, phase: when and where in the model it was made.
        label: its component and kind, "activations/mlp"; None until it is known.
        born, died: numbers of the events of its allocation and its release.
        is_input: is it a mask, or the state of the random generator?
    """

    bytes: int
    module: str
    phase: str
    label: str | None
    born: int
    died: int | None = None
    is_input: bool = False


class Tracker(TorchDispatchMode):
    """Record the storages of everything that is made inside `with tracker.watch():`.

    Args:
        model: its modules give activations their kind.
        static: tensors that exist already, by label: {"weights/others, bf16": [...], …}.
        count_generator: count the states of the random generator that checkpointing keeps, in host memory.
        device: the kind of device whose memory is counted, "cpu" or "cuda"; None for all of them. What is on the
            meta device has no memory.
    """

    def __init__(
        self,
        model: nn.Module,
        static: Mapping[str, Iterable[Tensor]],
        count_generator: bool = True,
        device: str | None = None,
    ):
        super().__init__()
        self.count_generator, self.device = count_generator, device
        self.model, self.phase = model, "forward"
        self.tensors: list[TrackedTensor] = []
        self.alive: dict[int, TrackedTensor] = {}  # by the address of the storage object
        self.waiting: dict[int, weakref.finalize] = {}  # for its release, by the same
        self.events = 0
        self.starts: list[tuple[str, int]] = []
        self.modules = [""]
        for label, tensors in static.items():
            for tensor in tensors:
                self.see(tensor, label)

    def see(self, tensor: Tensor, label: str | None = None) -> None:
        """Count the storage of `tensor`, once."""
        kind = tensor.device.type
        if kind == "meta" or self.device not in (None, kind):
            return
        storage = tensor.untyped_storage()
        key, n = storage._cdata, storage.nbytes()
        if n == 0 or key in self.alive:
            return
        self.events += 1
        is_input = tensor.dtype == torch.bool
        tracked = TrackedTensor(n, self.modules[-1], self.phase, label, self.events, is_input=is_input)
        self.alive[key] = tracked
        self.tensors.append(tracked)
        self.waiting[key] = weakref.finalize(storage, self.gone, key)
        self.waiting[key].atexit = False

    def gone(self, key: int) -> None:
        """The storage has been released."""
        self.events += 1
        self.alive.pop(key).died = self.events
        del self.waiting[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def run(self, func, args, kwargs):
        """Carry out an operation; a simulation answers some without numbers."""
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
            if self.count_generator and self.device in (None, "cpu"):
                self.see(state)
                self.alive[state.untyped_storage()._cdata].is_input = True
            return state

        try:
            with self, mock.patch("torch.get_rng_state", get_rng_state):
                yield self
        except BaseException:
            self.stop_waiting()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def is_gradient(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is complete."""
        tracked = self.alive.get(parameter.grad.untyped_storage()._cdata)
        if tracked is not None:
            tracked.label = "gradients/of all that trains"

    def start(self, phase: str) -> None:
        """Say which phase of the step begins."""
        if phase == "backward":  # what the forward pass has left is there for the backward pass
            for tracked in self.alive.values():
                if tracked.label is None:
                    tracked.label = f"activations/{kind_of(tracked)}"
        self.phase = phase
        self.modules = [""]
        self.starts.append((phase, self.events))

    def stop_waiting(self) -> None:
        """Leave the tensors that are alive: nothing of this tracker stays with them."""
        for finalizer in self.waiting.values():
            finalizer.detach()
        self.waiting.clear()

    def finish(self) -> "TensorRecord":
        """All that was seen; later releases are not."""
        self.stop_waiting()
        for tracked in self.tensors:
            tracked.label = tracked.label or "temporary/tensors"
        return TensorRecord(list(self.tensors), self.events, list(self.starts))


@dataclass
class TensorRecord:
    """The tensors of a step, each with its label.

    Attributes:
        tensors: in the order in which they were made.
        events: how many births and deaths there were.
        starts: (phase, the last event before it).
    """

    tensors: list[TrackedTensor]
    events: int
    starts: list[tuple[str, int]]

    def series(self, name: Callable[[str], str] = lambda label: label) -> dict[str, np.ndarray]:
        """Live bytes after every event, for each label, or each `name(label)`."""
        change: dict[str, np.ndarray] = {}
        for tracked in self.tensors:
            values = change.setdefault(name(tracked.label), np.zeros(self.events + 2, dtype=np.int64))
            values[tracked.born] += tracked.bytes
            if tracked.died is not None:
                values[tracked.died] -= tracked.bytes
        return {label: values.cumsum() for label, values in change.items()}

    def at(self, event: int) -> dict[str, int]:
        """Live bytes of each label after an event."""
        live: dict[str, int] = {}
        for tracked in self.tensors:
            if tracked.born <= event and (tracked.died is None or tracked.died > event):
                live[tracked.label] = live.get(tracked.label, 0) + tracked.bytes
        return live

    def peak(self) -> tuple[int, int]:
        """(bytes, event) of the most live bytes."""
        total = np.sum(list(self.series().values()), axis=0)
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


def kind_of(tracked: TrackedTensor) -> str:
    """Which kind of activation: where in the model it was made."""
    path = tracked.module
    last = path.rpartition(".")[2]
    if tracked.is_input or "rotary" in path or path == "model":
        return "inputs"
    if re.search(r"(^|\.)(self_attn|attn|attention)(\.|$)", path):
        return "attention"
    if re.search(r"(^|\.)(mlp|feed_forward|ffn)(\.|$)", path):
        return "mlp"
    if "norm" in last:
        return "norms"
    return "residual" if path and path != "lm_head" else "logits"

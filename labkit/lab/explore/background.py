"""A training run in a thread of its own, so that the notebook stays free meanwhile. One at a time.

Two runs at once would share the processors, PyTorch's random generator, and perhaps the model. What uses a model
that is being trained waits for the end of a step: `between_steps`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from labkit.analysis.spectra import singular_values
from labkit.analysis.updates import Factored
from labkit.checks import nearest
from labkit.data.records import records_of
from labkit.lab.interactive import running_kernel
from labkit.lora.dora import DoRALinear
from labkit.lora.inject import lora_layers
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.training.config import TrainConfig
from labkit.training.control import TrainControl
from labkit.training.history import History
from labkit.training.loop import train

RECENT = 10  # steps over which the speed is taken

_starting = threading.Lock()
_last: "BackgroundRun | None" = None  # the run that was started last, over or not


class UpdateSpectra:
    """Records the singular values of one layer's update after each step, as the callback of a `TrainControl`.

    They are computed from the factors, which takes about a millisecond (`labkit.analysis.spectra.svd`):

        spectra = UpdateSpectra(model)
        history = labkit.train(model, tokenizer, data, config, control=TrainControl(spectra))
        training_panel(model, tokenizer, data, config, recorded=history, spectra=spectra.by_step)

    Args:
        model: with LoRA adapters.
        layer: name of the layer; default: the one in the middle.

    Attributes:
        layer: its name; "" where the model has no layer whose update has factors.
        by_step: {after which step: singular values, falling}.

    Raises:
        ValueError: `layer` names no such layer.
    """

    def __init__(self, model: nn.Module, layer: str | None = None):
        layers = {name: one for name, one in lora_layers(model).items() if has_factors(one)}
        if layer is not None and layer not in layers:
            raise ValueError(
                f"layer={layer!r} is no layer of {type(model).__name__} with a plain LoRA update"
                + nearest(layer, layers)
            )
        names = list(layers)
        self.layer = layer or (names[len(names) // 2] if names else "")
        self.by_step: dict[int, list[float]] = {}
        self._module = layers.get(self.layer)

    def __call__(self, history: History) -> None:
        done = history.steps[-1]["step"] if history.steps else 0
        if done and done not in self.by_step:
            self.by_step[done] = self.now()

    def now(self) -> list[float]:
        """The singular values of the update as it is; [] without a layer."""
        if self._module is None:
            return []
        left, right = self._module.scaling * self._module.lora_B, self._module.lora_A
        return singular_values(Factored(left.detach(), right.detach())).tolist()


def has_factors(layer: LoRALinear) -> bool:
    """Is what training changes in this layer scaling B A, and nothing else?"""
    return not (isinstance(layer, (DoRALinear, LoRAEmbedding)) or layer.has_own_base or layer.is_merged)


class BackgroundRun:
    """One run of `labkit.train` in a thread of its own.

    Args:
        model, tokenizer, records, config, held_out: as for `train`, without its bar.
        layer: whose update is watched; see `UpdateSpectra`.
        on_change: called, in the thread of the run, after each step and evaluation, when the run stands, and when
            it is over. An error in it ends the run.

    Attributes:
        control: to pause, stop and steer it.
        spectra: an `UpdateSpectra`.
        error: what ended it, or None.
        cell: the notebook's cell that made it, where the front end tells.
        is_over: has it ended, in whatever way?
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        records: Sequence[dict],
        config: TrainConfig,
        held_out: Sequence[dict] | None,
        layer: str | None = None,
        on_change: Callable[[], None] = lambda: None,
    ):
        self.model, self.tokenizer, self.held_out = model, tokenizer, held_out
        self.records: list = records_of(records, "records")
        self.config = replace(config, progress=False)
        self.spectra = UpdateSpectra(model, layer)
        self.on_change, self.control = on_change, TrainControl(self.look)
        self.error: Exception | None = None
        self.cell = this_cell()
        self.thread: threading.Thread | None = None
        self.is_over = False

    @property
    def history(self) -> History | None:
        """What there is of the history so far."""
        return self.control.history

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        left_out = len(self.history.left_out) if self.history else 0
        return self.config.total_steps(len(self.records) - left_out)

    @property
    def is_on(self) -> bool:
        """Has it been started, and is it not over?"""
        return self.thread is not None and not self.is_over

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: it was started before, or another run is going on.
        """
        global _last
        with _starting:
            if self.thread is not None:
                raise RuntimeError("this run was started before; make another one")
            if _last is not None and _last.is_on:
                raise RuntimeError(f"another run is going on ({_last.progress()}); stop it first")
            _last = self
            # a daemon, or a kernel could not be shut down before the run is over
            self.thread = threading.Thread(target=self.work, name="training", daemon=True)
            self.thread.start()

    def work(self) -> None:
        """What the thread does."""
        try:
            train(self.model, self.tokenizer, self.records, self.config, self.held_out, control=self.control)
        except Exception as error:
            self.error = error
        self.is_over = True
        self.on_change()

    def look(self, history: History) -> None:
        self.spectra(history)
        self.on_change()

    def stop(self) -> None:
        """End it after the step under way, and wait for that."""
        self.control.stop()
        if self.thread is not None and threading.current_thread() is not self.thread:
            self.thread.join()

    def progress(self) -> str:
        done = len(self.history.steps) if self.history else 0
        return f"{done} of {self.total} steps"

    def tokens_per_second(self) -> float:
        """Over the last few steps; 0 before the first."""
        last = self.history.steps[-RECENT:] if self.history else []
        return sum(r["tokens"] for r in last) / max(sum(r["seconds"] for r in last), 1e-9) if last else 0.0

    def memory_bytes(self) -> int:
        """What PyTorch has allocated on the model's GPU; on a CPU, what the whole process has in memory."""
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device)
        import psutil  # type: ignore[import-untyped]  # it comes with ipykernel

        return psutil.Process().memory_info().rss


def running() -> BackgroundRun | None:
    """The run that is going on, if there is one."""
    return _last if _last is not None and _last.is_on else None


@contextmanager
def between_steps(model: nn.Module) -> Iterator[None]:
    """Within the block no step of a run in the background changes `model`: the run stands, if it is this one's."""
    run = running()
    if run is None or run.model is not model:
        yield
        return
    with run.control.between_steps():
        yield


def this_cell() -> str | None:
    """Which cell of the notebook runs now, where the front end says so."""
    try:
        return running_kernel().get_parent("shell")["metadata"]["cellId"]  # type: ignore[attr-defined]
    except (AttributeError, KeyError, TypeError):
        return None

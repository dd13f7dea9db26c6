"""Where the memory of a real training step goes: the rows of a ledger, from the run itself and not from a formula.

The step is taken three times, with a learning rate of zero, so that the model stays what it is:

1. to warm up: kernels are compiled, the optimizer makes its state;
2. under `labkit.memory.tracker`, which tells what each tensor is (weights, gradients, activations of which kind …);
3. under the allocator's own eyes: on a CPU PyTorch's profiler records every allocation and release with its size, on CUDA
   the caching allocator keeps the maximum. That is the peak. It also counts what operations take for themselves inside, which no
   formula here knows: the row "inside operations".

`resident` is the third witness: what the operating system saw, of a step in a process of its own.

Sources: `torch.profiler` (profile_memory), `torch.cuda.max_memory_allocated`; Linux's VmHWM.
"""

import gc
import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import SGD, AdamW

from labkit.data.batches import Batch
from labkit.lora.count import trainable
from labkit.lora.inject import lora_layers
from labkit.memory.ledger import Ledger, Row, Timeline
from labkit.memory.simulation import ledger_of, state_of, static_tensors
from labkit.memory.tracker import Tracker
from labkit.quant.linear import QuantLinear
from labkit.quant.scratch import use_scratch
from labkit.training.loss import supervised_loss


def measure(
    model: nn.Module,
    batch: Batch,
    optimizer: str | torch.optim.Optimizer = "adamw",
    checkpointing: bool = False,
    logits: str = "supervised",
    clip: float | None = 1.0,
) -> Ledger:
    """Measure one training step of `model` on `batch`.

    Args:
        model: any causal model, on a CPU or a GPU, adapted and quantized as it is to be trained; it is not changed.
        batch: see `make_batch`.
        optimizer: "adamw" (fused, as in `labkit.train`), "sgd", or an optimizer of the model's parameters, whose learning rates
            are zero during the measurement. One that pages or quantizes its state is measured as what it is.
        checkpointing, logits, clip: as in `TrainConfig`.

    Returns:
        A `Ledger`, with a time line; its peak is the allocator's.

    Raises:
        ValueError: nothing trains, the batch is on another device, or no such optimizer.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient; call add_lora, or unfreeze some")
    device = parameters[0].device
    if batch.ids.device != device:
        raise ValueError(
            f"the batch is on {batch.ids.device}, the model on {device}; use batch.to({str(device)!r})"
        )
    if isinstance(optimizer, str):
        kinds = {"adamw": AdamW, "sgd": SGD}
        if optimizer not in kinds:
            raise ValueError(
                f"optimizer={optimizer!r} is not known; choose 'adamw', 'sgd', or give an optimizer"
            )
        optimizer = kinds[optimizer](parameters, lr=0.0, weight_decay=0.0, fused=True)
    step = TrainingStep(model, batch, optimizer, parameters, checkpointing, logits, clip)
    with step.prepared():
        step()
        gc.collect()
        static = static_tensors(model, state_of(optimizer), batch)
        tracker = Tracker(model, static, count_generator=device.type == "cpu")
        with tracker.watch():
            step(tracker.start)
        ledger = ledger_of(
            tracker.finish(),
            title=step.title(),
            settings=step.settings(),
            counts=step.counts(),
            source="tensors of a real step",
        )
        step.clear()
        timeline, peak, phase = step.by_allocator()
    tracked = ledger.peak
    ledger.tensors, ledger.timeline = ledger.timeline, timeline
    formula = f"allocator's peak {peak:,} B, less {tracked:,} B of tensors"
    ledger.rows.append(
        Row("temporary", "inside operations", peak - tracked, peak - tracked, formula, step.source)
    )
    ledger.moment = phase
    return ledger


class TrainingStep:
    """One training step of a model, that can be taken again and again without changing it."""

    def __init__(self, model, batch, optimizer, parameters, checkpointing, logits, clip):
        self.model, self.batch, self.optimizer, self.parameters = model, batch, optimizer, parameters
        self.checkpointing, self.logits, self.clip = checkpointing, logits, clip
        self.device = batch.ids.device
        self.source = "torch.profiler" if self.device.type == "cpu" else "torch.cuda.max_memory_allocated"

    def __call__(self, phase: Callable[[str], None] = lambda name: None) -> None:
        phase("forward")
        loss = supervised_loss(self.model, self.batch, self.logits) / self.batch.n_supervised
        phase("backward")
        loss.backward()
        phase("optimizer")
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        del loss
        phase("end")
        self.clear()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def prepared(self):
        """Within the block, learning rates are zero, the model trains, and checkpointing is as wanted."""
        groups, training = self.optimizer.param_groups, self.model.training
        rates = [(g["lr"], g.get("weight_decay", 0.0)) for g in groups]
        generator = torch.get_rng_state()
        self.model.train()
        if self.checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        for group in groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        try:
            self.clear()
            with use_scratch():
                yield
        finally:
            self.clear()
            for group, (lr, decay) in zip(groups, rates):
                group["lr"], group["weight_decay"] = lr, decay
            if self.checkpointing:
                self.model.activation_checkpointing_disable()
                self.model.disable_input_require_grads()  # enabling it has put a hook on the embedding
            self.model.train(training)
            torch.set_rng_state(generator)

    def by_allocator(self) -> tuple[Timeline, int, str]:
        """The time line of the allocator, its peak, and the phase of the peak."""
        static = sum(storages([*static_all(self.model, self.optimizer, self.batch)]))
        if self.device.type == "cuda":
            return self.by_cuda(static)
        events, marks = allocations(self)
        live, now = [static], static
        for n in events:
            now += n
            live.append(now)
        peak = max(live)
        at = live.index(peak)
        phase = next((name for name, first in reversed(marks) if at > first), "before the step")
        return Timeline({"all": live}, marks), peak, phase

    def by_cuda(self, static: int) -> tuple[Timeline, int, str]:
        """Peaks of the phases from CUDA's caching allocator; `reserved` is what it took from the card."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device) - static  # what else lives there
        peaks: dict[str, int] = {}
        names: list[str] = []

        def phase(name: str) -> None:
            torch.cuda.synchronize(self.device)
            if names:
                peaks[names[-1]] = torch.cuda.max_memory_allocated(self.device) - before
            names.append(name)
            torch.cuda.reset_peak_memory_stats(self.device)

        self(phase)
        best = max(peaks, key=peaks.get)
        live = [static, *peaks.values()]
        return Timeline({"all": live}, [(name, i) for i, name in enumerate(peaks)]), peaks[best], best

    def title(self) -> str:
        kind = getattr(self.model.config, "name_or_path", "") or self.model.config.model_type
        B, S = self.batch.ids.shape
        check = ", checkpointing" if self.checkpointing else ""
        return f"{kind}: {self.method}, {B} × {S} tokens{check} (measured)"

    @property
    def method(self) -> str:
        if not lora_layers(self.model):
            return "full"
        return "qlora" if any(isinstance(m, QuantLinear) for m in self.model.modules()) else "lora"

    def settings(self) -> dict:
        return {
            "method": self.method,
            "optimizer": type(self.optimizer).__name__,
            "checkpointing": self.checkpointing,
            "logits": self.logits,
            "batch": self.batch.ids.shape[0],
            "sequence": self.batch.ids.shape[1],
            "n_supervised": self.batch.n_supervised,
            "device": str(self.device),
        }

    def counts(self) -> dict[str, int]:
        found = trainable(self.model)
        return {"parameters": found.total, "trainable": found.trainable}


def static_all(model, optimizer, batch):
    """Every tensor that is there before the step."""
    for tensors in static_tensors(model, state_of(optimizer), batch).values():
        yield from tensors


def storages(tensors) -> list[int]:
    """Bytes of the storages of tensors, each storage once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return list(found.values())


def allocations(step: Callable) -> tuple[list[int], list[tuple[str, int]]]:
    """Bytes of each allocation (> 0) and release (< 0) of a step on the CPU, in order, and where each phase begins."""
    from torch.profiler import ProfilerActivity, profile, record_function

    ranges: list = []

    def phase(name: str) -> None:
        if ranges:
            ranges.pop().__exit__(None, None, None)
        if name != "end":
            mark = record_function(f"labkit:{name}")
            mark.__enter__()
            ranges.append(mark)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(phase)
    events, marks = [], []
    found = [
        e
        for e in profiler.profiler.kineto_results.events()
        if e.name() == "[memory]" or e.name()[:7] == "labkit:"
    ]
    for event in sorted(found, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            events.append(event.nbytes())
        else:
            marks.append((event.name()[7:], len(events)))
    return events, marks

"""Where the memory of a real training step goes: the rows of a ledger, from the run and not from a formula.

The step is taken three times, with a learning rate of zero, and afterwards everything is as it was
(`labkit.memory.observing`):

1. to warm up: kernels are compiled, and the optimizer makes its state;
2. under `labkit.memory.tracker`, which says what each tensor is (a weight, a gradient, an activation …);
3. under the allocator's own eyes: on a CPU PyTorch's profiler records every allocation and release with its
   size, on CUDA the caching allocator keeps the maximum. That is the peak. It includes what operations take
   inside, which no formula here knows: the row "inside operations"; on CUDA also cuBLAS's workspaces, and what
   static blocks have too much (`labkit.memory.card`).

A third witness, besides the tensors and the allocator, is the operating system: `labkit.memory.resident`.

Sources: `torch.profiler` (profile_memory), `torch.cuda.max_memory_allocated`.
"""

import gc
import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import SGD, AdamW

from labkit.checks import check_choice, check_positive, not_known
from labkit.data.batches import Batch
from labkit.lora.count import trainable
from labkit.lora.inject import lora_layers
from labkit.memory import card
from labkit.memory.ledger import Ledger, LedgerRow, Timeline
from labkit.memory.observing import left_as_found
from labkit.memory.simulation import ledger_of, state_of, static_tensors
from labkit.memory.tracker import Tracker
from labkit.quant.linear import QuantLinear
from labkit.quant.scratch import use_scratch
from labkit.training.loss import LOGITS, supervised_loss
from labkit.training.recompute import checkpoint_blocks, keep_blocks

MARK = "labkit:"  # before the name of a phase, among the profiler's events
CHECKPOINTED = (
    "is_activation_checkpointing",
    "is_gradient_checkpointing",
)  # since transformers 5.23, and before


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
        model: any causal model, on a CPU or a GPU, adapted and quantized as it will be trained; it is
            afterwards as it was.
        batch: see `make_batch`.
        optimizer: "adamw" (fused, as in `labkit.train`), "sgd", or an optimizer of the model's parameters,
            which is afterwards as it was, like the gradients. One that pages or quantizes its state is
            measured as is.
        checkpointing, logits, clip: as in `TrainConfig`.

    Returns:
        A `Ledger`, with a time line; its peak is the allocator's.

    Raises:
        ValueError: nothing trains or is supervised, the batch is on another device, the optimizer is not known
            or not of this model, or a setting is out of its range.
    """
    check_choice("checkpointing", checkpointing, (True, False))
    check_choice("logits", logits, LOGITS)
    if clip is not None:
        check_positive("clip", clip, usual="None for no clipping")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient; call add_lora, or unfreeze some")
    device = parameters[0].device
    if batch.ids.device != device:
        raise ValueError(
            f"the batch is on {batch.ids.device}, the model on {device}; use batch.to({str(device)!r})"
        )
    if not batch.n_supervised:
        raise ValueError("no position of the batch is supervised, so there is no loss; see make_batch")
    if isinstance(optimizer, str):
        kinds = {"adamw": AdamW, "sgd": SGD}
        if optimizer not in kinds:
            raise not_known("optimizer", optimizer, kinds, usual="or give an optimizer")
        optimizer = kinds[optimizer](parameters, lr=0.0, weight_decay=0.0, fused=True)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer={optimizer!r} is neither a name nor an optimizer; see torch.optim")
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    if not stepped & set(parameters):
        raise ValueError("the optimizer has none of the model's parameters that train; make it of this model")
    step = TrainingStep(model, batch, optimizer, parameters, checkpointing, logits, clip)
    with step.prepared():
        step()
        gc.collect()
        static = static_tensors(model, state_of(optimizer), batch)
        tracker = Tracker(model, static, device=device.type)
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
    overhead = sum(step.overhead.values())
    if overhead:
        formula += f" and {overhead:,} B of overhead"
    inside = peak - tracked - overhead
    ledger.rows.append(LedgerRow("temporary", "inside operations", inside, inside, formula, step.source))
    ledger.rows += [LedgerRow("overhead", kind, n, n, "", step.source) for kind, n in step.overhead.items()]
    ledger.moment = phase
    return ledger


class TrainingStep:
    """One training step of a model that can be taken again and again without changing it.

    Attributes:
        overhead: of the last step that was taken under a card's allocator: bytes that are of no tensor, by kind.
    """

    def __init__(self, model, batch, optimizer, parameters, checkpointing, logits, clip):
        self.model, self.batch, self.optimizer, self.parameters = model, batch, optimizer, parameters
        self.checkpointing, self.logits, self.clip = checkpointing, logits, clip
        self.device = batch.ids.device
        self.overhead: dict[str, int] = {}
        self.source = "torch.profiler" if self.device.type == "cpu" else "torch.cuda.max_memory_allocated"

    def __call__(self, phase: Callable[[str], None] = lambda name: None) -> None:
        """Take the step; `phase` is told which part of it begins."""
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
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def prepared(self):
        """Within the block, learning rates are zero, the model trains, and checkpointing is as wanted; after it,
        everything is as it was."""
        with left_as_found(self.model, self.optimizer), use_scratch():
            self.model.train()
            if next((getattr(self.model, name) for name in CHECKPOINTED if hasattr(self.model, name)), False):
                keep_blocks(self.model)
                self.model.disable_input_require_grads()  # enabling it has put a hook on the embedding
            if self.checkpointing:
                checkpoint_blocks(self.model)
            for group in self.optimizer.param_groups:
                group.update({name: 0.0 for name in ("lr", "weight_decay") if name in group})
            yield

    def by_allocator(self) -> tuple[Timeline, int, str]:
        """The time line of the allocator, its peak, and the phase of the peak."""
        if self.device.type == "cuda":
            return self.by_cuda()
        static = sum(storages([*static_all(self.model, self.optimizer, self.batch)]))
        changes, marks = allocations(self)
        live = list(itertools.accumulate(changes, initial=static))
        peak = max(live)
        at = live.index(peak)
        phase = next((name for name, first in reversed(marks) if at > first), "before the step")
        return Timeline({"all": live}, marks), peak, phase

    def by_cuda(self) -> tuple[Timeline, int, str]:
        """The same from CUDA's caching allocator, which knows the peak of each phase only."""
        here = [t for t in static_all(self.model, self.optimizer, self.batch) if t.device == self.device]
        workspaces = card.free_workspaces(self.device)  # the step takes them again
        blocks = card.bytes_of_blocks(here, self.device)
        others = card.usage(self.device).allocated - blocks  # of others on this card
        self.overhead = {"workspaces of cuBLAS": workspaces, "static blocks": blocks - sum(storages(here))}
        peaks: dict[str, int] = {}
        names: list[str] = []

        def phase(name: str) -> None:
            torch.cuda.synchronize(self.device)
            if names:
                peaks[names[-1]] = card.usage(self.device, peak=True).allocated - others
            names.append(name)
            torch.cuda.reset_peak_memory_stats(self.device)

        self(phase)
        best = max(peaks, key=peaks.get)
        live = [blocks, *peaks.values()]
        return Timeline({"all": live}, [(name, i) for i, name in enumerate(peaks)]), peaks[best], best

    def title(self) -> str:
        """Of the ledger."""
        kind = getattr(self.model.config, "name_or_path", "") or self.model.config.model_type
        B, S = self.batch.ids.shape
        check = ", checkpointing" if self.checkpointing else ""
        return f"{kind}: {self.method}, {B} × {S} tokens{check} (measured)"

    @property
    def method(self) -> str:
        """ "full", "lora" or "qlora", by the layers of the model."""
        if not lora_layers(self.model):
            return "full"
        return "qlora" if any(isinstance(m, QuantLinear) for m in self.model.modules()) else "lora"

    def settings(self) -> dict:
        """Of the ledger."""
        return {
            "method": self.method,
            "optimizer": type(self.optimizer).__name__,
            "checkpointing": self.checkpointing,
            "logits": self.logits,
            "batch_size": self.batch.ids.shape[0],
            "max_length": self.batch.ids.shape[1],
            "n_supervised": self.batch.n_supervised,
            "device": str(self.device),
        }

    def counts(self) -> dict[str, int]:
        """Of the ledger."""
        found = trainable(self.model)
        return {"parameters": found.total, "trainable": found.trainable}


def static_all(model, optimizer, batch):
    """Every tensor that exists before the step."""
    for tensors in static_tensors(model, state_of(optimizer), batch).values():
        yield from tensors


def storages(tensors) -> list[int]:
    """Bytes of each storage of these tensors."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return list(found.values())


def allocations(step: Callable) -> tuple[list[int], list[tuple[str, int]]]:
    """Bytes of each allocation (> 0) and release (< 0) of a step on a CPU, and where the phases begin."""
    from torch.profiler import ProfilerActivity, profile, record_function

    ranges: list = []

    def phase(name: str) -> None:
        if ranges:
            ranges.pop().__exit__(None, None, None)
        if name != "end":
            mark = record_function(f"{MARK}{name}")
            mark.__enter__()
            ranges.append(mark)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(phase)
    changes: list[int] = []
    marks: list[tuple[str, int]] = []
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            changes.append(event.nbytes())
        elif event.name().startswith(MARK):
            marks.append((event.name().removeprefix(MARK), len(changes)))
    return changes, marks

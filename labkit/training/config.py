"""How to train: the settings of a run, checked when they are given, and the schedule of the learning rate."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from labkit.checks import check_choice, check_number, check_positive, check_whole, use_python_numbers
from labkit.data.batches import BATCHINGS
from labkit.training.loss import LOGITS
from labkit.training.optimizer import OPTIMIZERS

SCHEDULES = ("linear", "cosine", "constant")
BELOW = {"steps": 10**12, "epochs": 10**9, "seed": 2**32}  # more is a mistake, and overflows further down


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        lr: peak learning rate. For LoRA about ten times that of full fine-tuning.
        lora_plus: LoRA's B matrices train at this many times `lr` (LoRA+; its paper's value is 16).
        steps: optimizer steps; default: as many as `epochs` take.
        epochs: passes over the data, where `steps` is not given.
        batch_size: examples in a forward pass.
        accumulation: forward passes in a step.
        batching: how examples share a batch: "similar" in length and padded, "shuffled" and padded, "packed"
            into one row, or "packed, unmasked" (see `labkit.data.batches`).
        schedule: "linear" or "cosine" to zero, or "constant", after the warm-up.
        warmup: share of the steps in which the rate rises from zero to `lr`.
        clip: largest norm of the gradient of all parameters together; None for no clipping.
        weight_decay, betas, eps: of AdamW.
        optimizer: "adamw", or "adamw8bit" with its state in 8 bits.
        state_budget_bytes: how much of the optimizer's state stays in memory (`labkit.optim.paging`); None
            for all.
        seed: of the order of the data and of dropout.
        max_length: tokens; longer records are left out, with a warning, and reported in the history.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        logits: "supervised" positions only, or "all" (as most trainers do; the same loss, more work).
        eval_every: steps between measurements of the held-out loss.
        patience: stop after so many measurements without a new best, and go back to the weights of the best.
        checkpoint_folder: where to keep the state of the run; a killed or interrupted run, started again,
            goes on from there. One run at a time uses it.
        checkpoint_every: steps between checkpoints.
        progress: show a bar with loss and tokens per second.

    Raises:
        ValueError: a value is of the wrong type or out of its range.
    """

    lr: float = 1e-3
    lora_plus: float = 1.0
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
    batching: str = "similar"
    schedule: str = "linear"
    warmup: float = 0.05
    clip: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: str = "adamw"
    state_budget_bytes: int | None = None
    seed: int = 0
    max_length: int = 512
    checkpointing: bool = False
    logits: str = "supervised"
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_folder: str | Path | None = None
    checkpoint_every: int = 25
    progress: bool = True

    def __post_init__(self):
        use_python_numbers(self)
        for name in ("lr", "lora_plus", "epochs"):
            check_positive(name, getattr(self, name))
        for name in ("batch_size", "accumulation", "max_length", "checkpoint_every"):
            check_whole(name, getattr(self, name))
        for name in ("steps", "eval_every", "patience", "state_budget_bytes"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), usual="None is the default")
        check_whole("seed", self.seed, at_least=0)
        if self.clip is not None:
            check_positive("clip", self.clip, usual="None is for no clipping")
        check_number("warmup", self.warmup, at_least=0, below=1, usual="it is a share of the steps")
        for name in ("weight_decay", "eps"):
            check_number(name, getattr(self, name), at_least=0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas={self.betas!r} must be two numbers, such as (0.9, 0.999)")
        for beta in self.betas:
            check_number("betas", beta, at_least=0, below=1)
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        for name, limit in BELOW.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=0, below=limit)
        for name, allowed in (
            ("batching", BATCHINGS),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("logits", LOGITS),
            ("checkpointing", (True, False)),
            ("progress", (True, False)),
        ):
            check_choice(name, getattr(self, name), allowed)
        folder = self.checkpoint_folder
        if folder is not None and (not isinstance(folder, (str, os.PathLike)) or not str(folder)):
            raise ValueError(f"checkpoint_folder={folder!r} must be a path, or None")
        if self.patience and not self.eval_every:
            raise ValueError("patience counts evaluations: give eval_every too")

    def total_steps(self, n_examples: int) -> int:
        """Optimizer steps of a run over `n_examples`."""
        if self.steps is not None:
            return self.steps
        per_epoch = math.ceil(n_examples / self.batch_size) / self.accumulation
        return max(1, round(self.epochs * per_epoch))


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 0 … total - 1: rises over the warm-up, then falls by the schedule."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = (total - step) / max(1, total - warm)  # 1 after the warm-up, 1 / n at the last step
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.lr * factor[config.schedule]

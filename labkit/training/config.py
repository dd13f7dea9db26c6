"""DOC"""

import math
from dataclasses import dataclass
from pathlib import Path

from labkit.checks import check_choice, check_positive
from labkit.training.loss import LOGITS
from labkit.training.optimizer import OPTIMIZERS

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        lr: peak learning rate. For LoRA about ten times that of full fine-tuning.
        lora_plus: the rate of LoRA's B matrices is so many times lr (LoRA+; its paper's is 16).
        steps: optimizer steps; default: as many as `epochs` take.
        epochs: passes over the data, where `steps` is not given.
        batch_size: examples in a forward pass; accumulation: forward passes in a step.
        schedule: "linear" or "cosine" to zero, or "constant"; after `warmup`, a share of the steps, from zero up.
        clip: largest norm of the gradient of all parameters together; None for no clipping.
        weight_decay, betas, eps: of AdamW.
        optimizer: "adamw", or "adamw8bit" with its state in 8 bits; state_budget_bytes: page its state (`labkit.optim.paging`).
        seed: of the order of the data and of dropout.
        max_length: tokens; longer examples are left out and reported in the history.
        checkpointing: recompute activations in backward instead of keeping them.
        logits: "supervised" positions only, or "all" (as most trainers do; the same loss, more work).
        eval_every: steps between measurements of the held-out loss; patience: stop after so many without a new best,
            and go back to the weights of the best.
        checkpoint_folder: where to keep the state of the run; a killed run that is started again goes on from there.
        checkpoint_every: steps between checkpoints.
        progress: show a bar with loss and tokens per second.

    Raises:
        ValueError: a value is out of its range.
    """

    lr: float = 1e-3
    lora_plus: float = 1.0
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulation: int = 1
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
        positive = {
            n: getattr(self, n)
            for n in (
                "lr",
                "lora_plus",
                "epochs",
                "batch_size",
                "accumulation",
                "checkpoint_every",
                "max_length",
            )
        }
        positive |= {
            n: v for n in ("steps", "clip", "eval_every", "patience") if (v := getattr(self, n)) is not None
        }
        for name, value in positive.items():
            check_positive(name, value)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("logits", self.logits, LOGITS)
        if not 0 <= self.warmup < 1:
            raise ValueError(
                f"warmup={self.warmup!r} is a share of the steps: from 0 up to, not including, 1"
            )
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
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[
        config.schedule
    ]
    return config.lr * factor

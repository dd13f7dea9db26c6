"""What a training run leaves behind: a record of each step and each evaluation, and why the run stopped."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

from torch import Tensor

from labkit.checks import needed


class StepRecord(TypedDict):
    """One optimizer step."""

    step: int  # from 1
    loss: float  # mean over the supervised tokens, in nats
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # prompts and completions
    supervised: int  # those of completions
    seconds: float


class EvaluationRecord(TypedDict):
    """One measurement of the held-out loss."""

    step: int  # after which it was taken
    loss: float  # mean over the supervised tokens, in nats
    tokens: int  # how many they are


class BestWeights(NamedTuple):
    """The lowest held-out loss so far, and the trained parameters, by name, at that moment."""

    loss: float
    weights: dict[str, Tensor]


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite.

    `.history` has the steps before; `.checkpoint` is the folder of the last checkpoint, or None.
    """

    def __init__(self, message: str, history: "History", checkpoint_folder: Path | None):
        super().__init__(message)
        self.history, self.checkpoint = history, checkpoint_folder


class TrainingWarning(UserWarning):
    """Something in a run is not as it should be, and the run goes on."""


def say(message: str) -> None:
    """Warn whoever called `train`."""
    warnings.warn(message, TrainingWarning, stacklevel=4)


@dataclass
class History:
    """What happened in a run.

    Attributes:
        steps: a record of each optimizer step.
        evals: a record of each measurement of the held-out loss.
        left_out: indices of the records that were longer than `max_length`.
        stopped: "finished", "early" (no new best held-out loss for long enough), or "interrupted".
        held_out_left_out: as `left_out`, of the held-out records.
        without_gradient: names of parameters that train, and never had a gradient.
    """

    steps: list[StepRecord] = field(default_factory=list)
    evals: list[EvaluationRecord] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    stopped: str = "finished"
    held_out_left_out: list[int] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.steps]

    @property
    def seconds(self) -> float:
        """Time in training steps, without evaluations and checkpoints."""
        return sum(record["seconds"] for record in self.steps)

    @property
    def tokens_per_second(self) -> float:
        return sum(record["tokens"] for record in self.steps) / max(self.seconds, 1e-9)

    def to_frame(self):
        """The steps as a pandas DataFrame, with the held-out loss in `held_out` where it was measured."""
        pd = needed("pandas", "History.to_frame")
        held_out = {record["step"]: record["loss"] for record in self.evals}
        return pd.DataFrame([{**record, "held_out": held_out.get(record["step"])} for record in self.steps])

"""DOC"""

from dataclasses import dataclass, field
from pathlib import Path


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite. `.history` holds the steps before; `.checkpoint` the last good one, or None."""

    def __init__(self, message: str, history: "History", checkpoint_folder: Path | None):
        super().__init__(message)
        self.history, self.checkpoint = history, checkpoint_folder


@dataclass
class History:
    """What happened: one dict per step (step, loss, lr, grad_norm, tokens, supervised, seconds), one per evaluation."""

    steps: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    stopped: str = "finished"

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]

    @property
    def seconds(self) -> float:
        """Time in training steps, without evaluations and checkpoints."""
        return sum(row["seconds"] for row in self.steps)

    @property
    def tokens_per_second(self) -> float:
        return sum(row["tokens"] for row in self.steps) / max(self.seconds, 1e-9)

    def to_frame(self):
        """The steps as a pandas DataFrame, with the held-out loss in the column `held_out` where it was measured."""
        import pandas as pd

        held_out = {row["step"]: row["loss"] for row in self.evals}
        return pd.DataFrame([{**row, "held_out": held_out.get(row["step"])} for row in self.steps])

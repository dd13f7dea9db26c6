"""One training loop for full fine-tuning, LoRA and QLoRA, its loss, exact resume, and what a model gets
right.

Read `loop` and `run` first, then `loss`; `chunked_loss` is the fast path of the same call. For data of
your own: `suggestion`, `judging`.
"""

from labkit.training.config import TrainConfig, learning_rate
from labkit.training.control import TrainControl
from labkit.training.evaluate import generate, held_out_loss, text_loss
from labkit.training.history import History, TrainingDiverged, TrainingWarning
from labkit.training.judging import choose_metric
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.metrics import bits_learned, classification_accuracy, score_json
from labkit.training.optimizer import make_optimizer, parameter_groups
from labkit.training.suggestion import measure_speed, suggest_settings

__all__ = [
    "History",
    "TrainConfig",
    "TrainControl",
    "TrainingDiverged",
    "TrainingWarning",
    "bits_learned",
    "choose_metric",
    "classification_accuracy",
    "generate",
    "held_out_loss",
    "learning_rate",
    "make_optimizer",
    "measure_speed",
    "parameter_groups",
    "score_json",
    "suggest_settings",
    "supervised_loss",
    "text_loss",
    "train",
]

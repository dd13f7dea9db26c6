"""One training loop for full fine-tuning, LoRA and QLoRA, its loss, exact resume, and what a model gets
right.

Read `loop` and `run` first, then `loss`; `chunked_loss` is the fast path of the same call.
"""

from labkit.training.config import TrainConfig, learning_rate
from labkit.training.control import TrainControl
from labkit.training.evaluate import generate, held_out_loss, text_loss
from labkit.training.history import History, TrainingDiverged, TrainingWarning
from labkit.training.loop import train
from labkit.training.loss import supervised_loss
from labkit.training.metrics import bits_learned, classification_accuracy, score_json
from labkit.training.optimizer import make_optimizer, parameter_groups

__all__ = [
    "History",
    "TrainConfig",
    "TrainControl",
    "TrainingDiverged",
    "TrainingWarning",
    "bits_learned",
    "classification_accuracy",
    "generate",
    "held_out_loss",
    "learning_rate",
    "make_optimizer",
    "parameter_groups",
    "score_json",
    "supervised_loss",
    "text_loss",
    "train",
]

"""One run of an experiment: a config in, numbers out.

A sweep is many of these. Everything that decides the numbers is in `RunConfig`, and nothing else is: a run
with the same config, data and package versions gives the same numbers again.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from labkit import models
from labkit.files.reading import sha256
from labkit.lora.count import trainable
from labkit.sweeps.config import RunConfig
from labkit.sweeps.fitting import fit
from labkit.sweeps.tasks import TASKS
from labkit.training.history import History

SETTINGS = (".json", ".jinja", ".model", ".txt")  # files of a model that are no weights


@dataclass(frozen=True)
class RunResult:
    """What came out of a run.

    Attributes:
        model: trained.
        history: None for method "none".
        metrics: the numbers.
        wrong: the indices of test items that were not right, where a task keeps them; two runs are compared item by
            item with them.
    """

    model: nn.Module
    history: History | None
    metrics: dict[str, float]
    wrong: list[int] | None = None


def run(config: RunConfig) -> RunResult:
    """Train and measure.

    Returns:
        A `RunResult`. Its metrics include `parameters` (how many trained), and if any did, `train_loss` (mean
        over the last tenth of the steps, nats per token), `tokens` and `train_seconds`.

    Raises:
        ValueError, labkit.models.ModelUnavailable: see `labkit.sweeps.fitting.prepare`.
        labkit.TrainingDiverged: the loss became NaN or infinite.
    """
    task = TASKS[config.task]
    model, tokenizer, history = fit(config, task.records(config))
    metrics: dict[str, float] = {"parameters": trainable(model).trainable}
    if history is not None:
        last = history.losses[-max(1, len(history.losses) // 10) :]
        metrics |= {
            "train_loss": sum(last) / len(last),
            "tokens": sum(row["tokens"] for row in history.steps),
            "train_seconds": round(history.seconds, 2),
        }
    measured = task.measure(model, tokenizer, config)
    wrong = measured.pop("wrong", None)
    return RunResult(model, history, metrics | measured, wrong)


def data_hash(config: RunConfig) -> str:
    """A short hash of the data and the base weights that the run's numbers rest on."""
    return _data_hash(
        config.task, config.model, config.examples, config.seed if config.task == "facts" else 0
    )


@cache
def _data_hash(task: str, model: str, examples: int | None, seed: int) -> str:
    config = RunConfig(task=task, model=model, examples=examples, seed=seed)
    text = json.dumps([weights_hash(model), TASKS[task].data(config)], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def weights_hash(model: str) -> str:
    """The sha256 of a base model's weights: of its source if known, else of the files in its folder."""
    if model in models.SOURCES:
        return models.SOURCES[model].sha256
    folder = models.shipped(model) if model in models.SHIPPED else Path(model).expanduser()
    return "+".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))) or model


@cache
def settings_hash(model: str) -> str | None:
    """A short hash of what a model in a folder of yours has beside its weights: config, tokenizer, chat template.

    None for a model that is known by name, whose files are known too.
    """
    folder = Path(model).expanduser()
    if model in models.SOURCES or model in models.SHIPPED or not folder.is_dir():
        return None
    kept = sorted(p for p in folder.iterdir() if p.suffix in SETTINGS and p.is_file())
    return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in kept).encode()).hexdigest()[:16]

"""One run of an experiment: a flat config in, numbers out.

A sweep is many of these, so everything that decides the numbers stands in `RunConfig`, and nothing else does: a run on the
same config, data and package versions gives the same numbers again. A task is data with a real metric:

    austen      prose that tiny-llama never saw: test loss, and the loss on two old domains, in nats a token
    spectra     the same training, and what it did to the weights: ranks, directions, intruders, each beside its control
    sql         questions to SQL over schemas that training never showed: share of queries whose execution is right
    sql_more    the same, with as many databases to train on again
    tickets     support messages to JSON: share right in every field
    facts       random numbers to remember: bits learned
    docstrings  which package is this docstring from: accuracy
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from labkit import models
from labkit.beyond_lora import SIZED, add_ia3
from labkit.data import sql
from labkit.data.docstrings import load_docstrings
from labkit.data.facts import make_facts
from labkit.data.passages import load_austen, load_held_out
from labkit.data.tickets import load_tickets, ticket_chat
from labkit.hardware import best_device, product_dtype
from labkit.lora.config import LoRAConfig
from labkit.lora.count import trainable
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.models.fetching import sha256
from labkit.subspace import add_subspace, matching_lr
from labkit.train import History, TrainConfig, train
from labkit.training.evaluate import chat_prompts, generate, held_out_loss, text_loss
from labkit.training.metrics import bits_learned, classification_accuracy, score_json
from labkit.update_numbers import effect_numbers, spectral_numbers
from labkit.updates import updates

METHODS = ("full", "lora", "qlora", "subspace", "ia3", *SIZED, "none")
OLD_DOMAINS = ("kjv", "pydocs")  # tiny-llama was pretrained on their training text
OLD_BYTES = 12_000  # of each old domain, to measure in a second
TEST_PASSAGES = 60  # of the test novel: 8,000 tokens
TWIN = 1000  # added to the seed of a run for the second run that it is compared with


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run; a row of a table.

    Args:
        task: a name in `TASKS`.
        model: a name or folder for `labkit.models.load`.
        method: "full" (every parameter trains), "lora", "qlora" (LoRA over NF4 with double quantization), "subspace" (`d`
            random directions, see `labkit.subspace`), "prompt", "prefix", "bottleneck", "ia3" (see `labkit.beyond_lora`), or
            "none" (the base model, only measured).
        r, alpha, targets, variant, init, dropout: see `labkit.LoRAConfig`.
        embeddings: train the embedding matrix, which these models share with the output layer; default: only with "full".
        d: dimension of the random subspace.
        size: tokens of a soft prompt or prefix, width of bottleneck adapters.
        examples: train on the first so many records; default: on all.
        lr, steps, batch_size, schedule, warmup, clip, lora_plus: see `labkit.TrainConfig`; in a subspace `lr` is the step of a
            weight, and z gets `labkit.subspace.matching_lr`.
        seed: of the start of the adapter, the order of the data, the random subspace, and `facts`.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """

    task: str = "austen"
    model: str = "tiny-llama"
    method: str = "lora"
    r: int = 8
    alpha: float = 16
    targets: str = "all-linear"
    variant: str = "lora"
    init: str = "default"
    dropout: float = 0.0
    embeddings: bool | None = None
    d: int | None = None
    examples: int | None = None
    lr: float = 1e-3
    steps: int = 100
    batch_size: int = 8
    schedule: str = "linear"
    warmup: float = 0.05
    clip: float | None = 1.0
    seed: int = 0
    lora_plus: float = 1.0
    size: int | None = None

    def __post_init__(self):
        for name, value, allowed in (("task", self.task, tuple(TASKS)), ("method", self.method, METHODS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; choose one of {allowed}")
        for name, value in (("examples", self.examples), ("d", self.d), ("size", self.size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if (self.method == "subspace") != (self.d is not None):
            raise ValueError(
                f"method={self.method!r} with d={self.d}: d goes with method='subspace', and only with it"
            )
        if (self.method in SIZED) != (self.size is not None):
            raise ValueError(
                f"method={self.method!r} with size={self.size}: size goes with {', '.join(SIZED)}, and only with them"
            )
        if self.task == "facts" and self.examples is None:
            raise ValueError("task='facts' draws as many facts as you ask for: give examples, such as 256")
        if not isinstance(self.targets, str):
            raise ValueError(
                f"targets={self.targets!r} must be a text here: a preset, a layer name, or a regular expression"
            )
        if self.lora_plus != 1 and self.method not in ("lora", "qlora"):
            raise ValueError(
                f"lora_plus={self.lora_plus!r} is a rate for LoRA's B; method={self.method!r} has none"
            )
        if self.init.startswith("loftq") and self.method != "qlora":
            raise ValueError(
                f"init={self.init!r} fits the adapter to a 4-bit base; it goes with method='qlora'"
            )
        self.adapter(), self.training()  # their own checks

    @classmethod
    def from_dict(cls, values: dict) -> "RunConfig":
        """A config from a table of a TOML file or a line of results.

        Raises:
            ValueError: a key that no run has.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such setting of a run; it has {', '.join(known)}")
        return cls(**values)

    def adapter(self) -> LoRAConfig:
        return LoRAConfig(self.r, self.alpha, self.dropout, self.targets, self.variant, self.init)

    def training(self) -> TrainConfig:
        same = ("lr", "steps", "batch_size", "schedule", "warmup", "clip", "seed", "lora_plus")
        return TrainConfig(**{name: getattr(self, name) for name in same}, max_length=192, progress=False)

    def __str__(self) -> str:
        changed = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return ", ".join(changed) or "defaults"


@dataclass(frozen=True)
class Task:
    """Records to train on, and a measurement of the trained model: {metric: number}."""

    records: Callable[[RunConfig], list[dict]]
    measure: Callable[[nn.Module, object, RunConfig], dict[str, float]]
    data: Callable[[RunConfig], object]  # all data that decides the numbers, for its hash


def measure_austen(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    losses = {
        "validation_loss": load_austen("validation"),
        "test_loss": load_austen("test")[:TEST_PASSAGES],
    }
    losses |= {f"{domain}_loss": load_held_out(domain, OLD_BYTES) for domain in OLD_DOMAINS}
    return {name: text_loss(model, tokenizer, records, 32)[0] for name, records in losses.items()}


def measure_spectra(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    base, _ = models.load(config.model, torch.float32, best_device())
    twin, _, _ = fit(replace(config, seed=config.seed + TWIN))

    def loss(any_model: nn.Module) -> float:
        return text_loss(any_model, tokenizer, load_austen("validation"), 32)[0]

    return (
        {"validation_loss": loss(model)}
        | spectral_numbers(base, model, twin, config.seed)
        | effect_numbers(base, updates(base, model), loss, config.seed)
    )


def sql_records(config: RunConfig, split: str = "train") -> list[dict]:
    form = "plain" if config.model == "tiny-llama" else "chat"
    return [sql.sql_record(item, form) for item in sql.load_questions(split)]


def measure_sql(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    loss, _ = held_out_loss(model, tokenizer, sql_records(config, "validation"), 32)
    items, records = sql.load_questions("test"), sql_records(config, "test")
    prompts = [r["prompt"] for r in records] if "prompt" in records[0] else chat_prompts(records, tokenizer)
    score = sql.score_sql(generate(model, tokenizer, prompts, 48, 100, progress=False), items)
    return {"validation_loss": loss, "execution": score.execution_accuracy, "exact_match": score.exact_match}


def measure_tickets(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    loss, _ = held_out_loss(model, tokenizer, [ticket_chat(t) for t in load_tickets("validation")], 16)
    gold = load_tickets("test")
    answers = generate(
        model, tokenizer, chat_prompts([ticket_chat(t) for t in gold], tokenizer), progress=False
    )
    score = score_json(answers, [ticket["label"] for ticket in gold])
    return {"validation_loss": loss, "exact_match": score.exact_match}


def measure_facts(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    bits = bits_learned(model, tokenizer, make_facts(config.examples, config.seed))
    counted = trainable(model).trainable
    return {"bits": bits, "bits_per_parameter": bits / counted if counted else math.nan}


def measure_docstrings(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    return {
        f"{split}_accuracy": classification_accuracy(model, tokenizer, load_docstrings(split))
        for split in ("train", "validation", "test")
    }


TASKS = {
    "austen": Task(
        lambda config: load_austen("train"),
        measure_austen,
        lambda config: (
            [load_austen(s) for s in ("train", "validation", "test")]
            + [load_held_out(domain, OLD_BYTES) for domain in OLD_DOMAINS]
        ),
    ),
    "spectra": Task(
        lambda config: load_austen("train"),
        measure_spectra,
        lambda config: [load_austen(split) for split in ("train", "validation")],
    ),
    "sql": Task(
        sql_records,
        measure_sql,
        lambda config: [sql_records(config, s) for s in ("train", "validation", "test")],
    ),
    "sql_more": Task(
        lambda config: sql_records(config) + sql_records(config, "more"),
        measure_sql,
        lambda config: [sql_records(config, s) for s in ("train", "more", "validation", "test")],
    ),
    "tickets": Task(
        lambda config: [ticket_chat(t) for t in load_tickets("train")],
        measure_tickets,
        lambda config: [load_tickets(s) for s in ("train", "validation", "test")],
    ),
    "facts": Task(
        lambda config: make_facts(config.examples, config.seed),
        measure_facts,
        lambda config: make_facts(config.examples, config.seed),
    ),
    "docstrings": Task(
        lambda config: load_docstrings("train"),
        measure_docstrings,
        lambda config: [load_docstrings(s) for s in ("train", "validation", "test")],
    ),
}


@dataclass(frozen=True)
class Run:
    """What came out of a run: the trained model, its history (None for method "none"), and the numbers."""

    model: nn.Module
    history: History | None
    metrics: dict[str, float]


def prepare(config: RunConfig) -> tuple[nn.Module, object]:
    """The model of a run, ready to train, and its tokenizer.

    Raises:
        ValueError: the adapter does not fit the model, for instance r above a layer's width.
        labkit.models.ModelUnavailable: the model cannot be had.
    """
    device = best_device()
    model, tokenizer = models.load(config.model, torch.float32, device)
    torch.manual_seed(config.seed)
    if config.method == "qlora":
        add_qlora(model, config.adapter(), compute_dtype=product_dtype(device))
    elif config.method == "lora":
        add_lora(model, config.adapter())
    elif config.method == "subspace":
        add_subspace(model, config.d, config.seed)
    elif config.method == "ia3":
        add_ia3(model)
    elif config.method in SIZED:
        add, sized = SIZED[config.method]
        add(model, sized(config.size))
    else:
        model.requires_grad_(config.method == "full")
    if config.embeddings is not None:
        model.get_input_embeddings().weight.requires_grad_(config.embeddings)
    return model, tokenizer


def fit(config: RunConfig) -> tuple[nn.Module, object, History | None]:
    """Prepare and train; the model, its tokenizer, and the history (None for method "none").

    Raises:
        see `run`.
    """
    model, tokenizer = prepare(config)
    if config.method == "none":
        return model, tokenizer, None
    training = config.training()
    if config.method == "subspace":  # so that a rate means the same step of a weight as in full fine-tuning
        training = replace(training, lr=matching_lr(model, config.lr))
    history = train(model, tokenizer, TASKS[config.task].records(config)[: config.examples], training)
    if history.stopped == "interrupted":
        raise KeyboardInterrupt  # half a run is no result
    return model, tokenizer, history


def run(config: RunConfig) -> Run:
    """Train and measure.

    Returns:
        A `Run`; its metrics always include `parameters` (that trained), `train_loss` (mean over the last tenth of the
        steps, nats a token), `tokens` and `train_seconds`.

    Raises:
        ValueError, labkit.models.ModelUnavailable: see `prepare`.
        labkit.TrainingDiverged: the loss became NaN or infinite.
    """
    model, tokenizer, history = fit(config)
    metrics: dict[str, float] = {"parameters": trainable(model).trainable}
    if history is not None:
        last = history.losses[-max(1, len(history.losses) // 10) :]
        metrics |= {
            "train_loss": sum(last) / len(last),
            "tokens": sum(row["tokens"] for row in history.steps),
            "train_seconds": round(history.seconds, 2),
        }
    return Run(model, history, metrics | TASKS[config.task].measure(model, tokenizer, config))


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
    """The sha256 of a base model's weights: of its source if it has a name, else of the files in its folder."""
    if model in models.SOURCES:
        return models.SOURCES[model].sha256
    folder = models.shipped(model) if model in models.SHIPPED else Path(model)
    return "+".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))) or model

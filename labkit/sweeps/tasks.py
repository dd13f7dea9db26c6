"""What a run may train on: records, and a real metric for each task.

    austen      prose that tiny-llama never saw: test loss, and the loss on two old domains, in nats per token
    spectra     the same training, and what it did to the weights, each number beside its control
    sql         questions to SQL over schemas that training never showed: share of queries that execute right
    sql_more    the same, with as many databases to train on again
    tickets     support messages to JSON: share that is right in every field
    tickets_loss    the same training, judged by the held-out loss alone: a third of the time
    tickets_varied  the same task; each pass has the training tickets with other names, brands and order numbers
    facts       random numbers to remember: bits learned
    docstrings  which package a docstring is from: accuracy

A new one needs its name in `labkit.sweeps.config.TASK_NAMES` too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from labkit import models
from labkit.analysis.summary import effect_numbers, spectral_numbers
from labkit.analysis.updates import find_updates
from labkit.data import sql
from labkit.data.batches import collate
from labkit.data.docstrings import load_docstrings
from labkit.data.encoding import encode
from labkit.data.facts import make_facts
from labkit.data.passages import load_austen, load_held_out
from labkit.data.tickets import TICKET_FIELDS, TICKET_TOKENS, load_tickets, ticket_chat
from labkit.data.variation import varied
from labkit.hardware import best_device
from labkit.lora.count import trainable
from labkit.memory.measurement import measure
from labkit.sweeps.config import RunConfig
from labkit.sweeps.fitting import fit
from labkit.training.evaluate import chat_prompts, generate, held_out_loss, text_loss
from labkit.training.metrics import bits_learned, classification_accuracy, score_json

OLD_DOMAINS = ("kjv", "pydocs")  # tiny-llama was pretrained on their training text
OLD_BYTES = 12_000  # of each old domain: measured in a second
TEST_PASSAGES = 60  # of the test novel: 8,000 tokens
TWIN = 1000  # added to the seed of a run for the second run that it is compared with


@dataclass(frozen=True)
class SweepTask:
    """What a run does besides training.

    Attributes:
        records: to train on.
        measure: the numbers of a trained model, with its tokenizer: {metric: number}, and {"wrong": indices of test
            items} where items can be compared.
        data: everything that decides these numbers, to be hashed.
    """

    records: Callable[[RunConfig], list[dict]]
    measure: Callable[[nn.Module, object, RunConfig], dict[str, Any]]
    data: Callable[[RunConfig], object]


def measure_austen(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    losses = {
        "validation_loss": load_austen("validation"),
        "test_loss": load_austen("test")[:TEST_PASSAGES],
    }
    losses |= {f"{domain}_loss": load_held_out(domain, OLD_BYTES) for domain in OLD_DOMAINS}
    return {name: text_loss(model, tokenizer, records, 32)[0] for name, records in losses.items()}


def measure_spectra(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, float]:
    base, _ = models.load(config.model, torch.float32, best_device())
    twin, _, _ = fit(replace(config, seed=config.seed + TWIN), load_austen("train"))

    def loss(any_model: nn.Module) -> float:
        return text_loss(any_model, tokenizer, load_austen("validation"), 32)[0]

    return (
        {"validation_loss": loss(model)}
        | spectral_numbers(base, model, twin, config.seed)
        | effect_numbers(base, find_updates(base, model), loss, config.seed)
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


def ticket_records(config: RunConfig) -> list[dict]:
    return [ticket_chat(t) for t in load_tickets("train")]


def varied_ticket_records(config: RunConfig) -> list[dict]:
    """The training tickets, and after them as many variations of them as the steps of the run can see."""
    tickets = load_tickets("train")
    passes = math.ceil(config.steps * config.batch_size / len(tickets))
    copies = [tickets] + [varied(tickets, seed) for seed in range(1, passes)]
    return [ticket_chat(t) for copy in copies for t in copy]


def measure_tickets(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, Any]:
    """`measure_tickets_loss`, and of the test tickets the shares right in all fields and in each."""
    tickets = load_tickets("test")
    gold, chats = [t["label"] for t in tickets], [ticket_chat(t) for t in tickets]
    prompts = chat_prompts(chats, tokenizer)
    answers = generate(model, tokenizer, prompts, TICKET_TOKENS, 110, progress=False)
    score = score_json(answers, gold)
    metrics: dict[str, Any] = measure_tickets_loss(model, tokenizer, config)
    metrics["test_loss"] = held_out_loss(model, tokenizer, chats, 16)[0]
    metrics |= {field: score.per_field[field] for field in TICKET_FIELDS}
    return metrics | {"exact_match": score.exact_match, "wrong": score.wrong}


def measure_tickets_loss(model: nn.Module, tokenizer, config: RunConfig) -> dict[str, Any]:
    """The held-out loss, and the allocator's peak in a training step with the longest tickets in its batch."""
    loss, _ = held_out_loss(model, tokenizer, [ticket_chat(t) for t in load_tickets("validation")], 16)
    metrics = {"validation_loss": loss}
    if config.method != "none":
        longest = sorted(ticket_records(config), key=lambda r: len(encode(r, tokenizer)))[
            -config.batch_size :
        ]
        batch = collate([encode(r, tokenizer) for r in longest], tokenizer.pad_token_id)
        metrics["peak_bytes"] = measure(model, batch.to(best_device()), clip=config.clip).peak
    return metrics


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
    "austen": SweepTask(
        lambda config: load_austen("train"),
        measure_austen,
        lambda config: (
            [load_austen(s) for s in ("train", "validation", "test")]
            + [load_held_out(domain, OLD_BYTES) for domain in OLD_DOMAINS]
        ),
    ),
    "spectra": SweepTask(
        lambda config: load_austen("train"),
        measure_spectra,
        lambda config: [load_austen(split) for split in ("train", "validation")],
    ),
    "sql": SweepTask(
        sql_records,
        measure_sql,
        lambda config: [sql_records(config, s) for s in ("train", "validation", "test")],
    ),
    "sql_more": SweepTask(
        lambda config: sql_records(config) + sql_records(config, "more"),
        measure_sql,
        lambda config: [sql_records(config, s) for s in ("train", "more", "validation", "test")],
    ),
    "tickets": SweepTask(
        ticket_records,
        measure_tickets,
        lambda config: [load_tickets(s) for s in ("train", "validation", "test")],
    ),
    "tickets_loss": SweepTask(
        ticket_records,
        measure_tickets_loss,
        lambda config: [load_tickets(s) for s in ("train", "validation")],
    ),
    "tickets_varied": SweepTask(
        varied_ticket_records,
        measure_tickets,
        lambda config: (
            [load_tickets(s) for s in ("train", "validation", "test")] + [varied(load_tickets("train"), 1)]
        ),
    ),
    "facts": SweepTask(
        lambda config: make_facts(config.examples, config.seed),
        measure_facts,
        lambda config: make_facts(config.examples, config.seed),
    ),
    "docstrings": SweepTask(
        lambda config: load_docstrings("train"),
        measure_docstrings,
        lambda config: [load_docstrings(s) for s in ("train", "validation", "test")],
    ),
}

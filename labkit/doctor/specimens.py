"""Sick fine-tunes, bred in seconds: a real model and real tickets, and one thing done wrong in each.

Their task is to copy the order number out of a support message; healthy runs are there of prose and of SQL too. All are
trained by one loop, as people write it by hand: it takes labels, an optimizer and a model as it gets them, and asks no
questions, so every mistake goes through. `labkit.doctor.zoo` names the specimens, and the probe that should be the first
to find each.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from labkit.data.batches import IGNORE, Batch, collate
from labkit.data.encoding import encode
from labkit.data.passages import load_austen
from labkit.data.sql import load_questions, sql_record
from labkit.data.tickets import load_tickets
from labkit.doctor.case import heard_of, mean_loss
from labkit.files.reading import read_json_lines
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.models.loading import load
from labkit.paths import data_folder
from labkit.sweeps.valleys import Valley, recorded_valley, valley_between
from labkit.training.history import History

LR, STEPS, BATCH = 5e-3, 24, 4
VARIANTS = ("lora", "qlora", "dora", "rslora")
RATES = {"orders": LR, "prose": 1e-2, "sql": 1.6e-2}  # each in the valley of its sweep
TASKS = tuple(RATES)


@dataclass
class Specimen:
    """A model to be diagnosed, and what there is to give to the doctor.

    Attributes:
        model: tiny-llama, usually with an adapter.
        tokenizer: its tokenizer.
        data: the training records.
        given: further arguments of `labkit.doctor.doctor`.
    """

    model: nn.Module
    tokenizer: Any
    data: list[dict]
    given: dict[str, Any] = field(default_factory=dict)


@functools.cache
def tiny_llama():
    """tiny-llama and its tokenizer, loaded once; copy the model before you change it."""
    return load("tiny-llama", torch.float32)


@functools.cache
def order_records() -> tuple[list[dict], list[dict]]:
    """Short messages that name an order, and its number as the completion: to train on, and held out."""
    tickets = [ticket for ticket in load_tickets("train") if ticket["label"]["order"]]
    tickets.sort(key=lambda ticket: len(ticket["message"]))
    records = [
        {"prompt": f"{ticket['message']}\nOrder:", "completion": f" {ticket['label']['order']}"}
        for ticket in tickets[:160]
    ]
    return [r for i, r in enumerate(records) if i % 4], records[::4]


@functools.cache
def records_for(task: str) -> tuple[list[dict], list[dict]]:
    """Records of one of `TASKS`: to train on, and held out."""
    if task == "prose":
        return load_austen("train")[:120], load_austen("validation")[:40]
    if task == "sql":
        parts = (load_questions("train")[::4][:120], load_questions("train")[2::8][:40])
        train, held = ([sql_record(item, "plain") for item in items] for items in parts)
        return train, held
    return order_records()


@functools.cache
def valley_for(task: str) -> Valley | None:
    """The learning rates that are good for a task: of the recorded sweep of prose, or of these short runs."""
    if task == "prose":
        return recorded_valley("austen", "tiny-llama", "lora")
    found: dict[float, list[float]] = {}
    for line in read_json_lines(data_folder() / "results" / "doctor_rates.jsonl"):
        if line["task"] == task:
            loss = line["held_out_loss"]
            found.setdefault(line["lr"], []).append(math.inf if loss is None else loss)
    return valley_between(found, errors=2.0)


def train_records() -> list[dict]:
    """Those to train on."""
    return order_records()[0]


def held_records() -> list[dict]:
    """Those held out."""
    return order_records()[1]


def with_history(model: nn.Module, history: History | None = None, **given: Any) -> Specimen:
    """A specimen on the usual records: those of the order numbers."""
    return Specimen(model, tiny_llama()[1], train_records(), {"history": history} | given)


def put_on(base: nn.Module, model: nn.Module, folder: Path, recorded: bool = True) -> nn.Module:
    """The adapter of `model`, saved to `folder` and loaded onto `base` by a loader that asks no questions.

    `recorded` leaves the record of its own base in the folder.
    """
    save_adapter(model, folder)
    record = (folder / "labkit.json").read_bytes()
    (folder / "labkit.json").unlink()
    load_adapter(base, folder)
    if recorded:
        (folder / "labkit.json").write_bytes(record)
    return base


def adapted(seed: int, variant: str = "lora", **settings: Any) -> nn.Module:
    """tiny-llama with a fresh adapter, or over 4 bits with "qlora"."""
    model = copy.deepcopy(tiny_llama()[0])
    torch.manual_seed(seed)
    r = settings.pop("r", 8)
    plain = {"r": r, "alpha": 2 * r**0.5 if variant == "rslora" else 2 * r} | settings
    if variant == "qlora":
        return add_qlora(model, LoRAConfig(**plain))
    return add_lora(model, LoRAConfig(variant=variant, **plain))


def fed_batches(records: list[dict], seed: int, steps: int, wrong: Callable | None = None) -> list[Batch]:
    """The batches of a run, in a random order; `wrong` spoils the targets, given ids, targets and the examples."""
    tokenizer = tiny_llama()[1]
    examples = [encode(record, tokenizer) for record in records]
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    while len(batches) < steps:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), BATCH):
            chosen = [examples[i] for i in order[start : start + BATCH]]
            batch = collate(chosen, tokenizer.pad_token_id)
            batches.append(wrong(batch, chosen) if wrong else batch)
    return batches[:steps]


def teach(
    model: nn.Module, batches: list[Batch], lr: float = LR, held: list[nn.Parameter] | None = None
) -> tuple[History, torch.optim.Optimizer]:
    """A training loop written by hand: AdamW at a rate that falls to zero, clipped at 1, over whatever it is given."""
    held = [p for p in model.parameters() if p.requires_grad] if held is None else held
    optimizer, history = torch.optim.AdamW(held, lr=lr, weight_decay=0.0), History()
    model.train()
    for step, batch in enumerate(batches):
        rate = optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(
            logits.transpose(1, 2), batch.targets[:, 1:], ignore_index=IGNORE, reduction="sum"
        ) / max(1, batch.n_supervised)
        if loss.requires_grad:
            loss.backward()
        norm = float(nn.utils.clip_grad_norm_(held, 1.0))
        optimizer.step()
        tokens = batch.ids.numel()
        history.steps.append(
            {"step": step + 1, "loss": loss.item(), "lr": rate, "grad_norm": norm, "tokens": tokens}
            | {"supervised": batch.n_supervised, "seconds": 0.0}  # type: ignore[arg-type]
        )
    model.eval()
    return history, optimizer


def train_at(task: str, lr: float, seed: int) -> tuple[nn.Module, History]:
    """A LoRA run on one of `TASKS` at a learning rate."""
    model = adapted(seed)
    history, _ = teach(model, fed_batches(records_for(task)[0], seed, STEPS), lr)
    return model, history


@torch.no_grad()
def held_out_loss(model: nn.Module, task: str) -> float:
    """Nats per supervised token on the held-out records of a task."""
    tokenizer = tiny_llama()[1]
    heard = [heard_of(model.eval(), encode(record, tokenizer)) for record in records_for(task)[1]]
    return mean_loss(heard)


@functools.lru_cache(maxsize=8)
def _trained(seed: int, variant: str, task: str) -> tuple[nn.Module, History]:
    model = adapted(seed, variant)
    history, _ = teach(model, fed_batches(records_for(task)[0], seed, STEPS), RATES[task])
    return model, history


def trained(seed: int, variant: str = "lora", task: str = "orders") -> tuple[nn.Module, History]:
    """A healthy run; a copy of its own, so that it may be spoiled."""
    return copy.deepcopy(_trained(seed, variant, task))


def healthy(seed: int, variant: str, task: str = "orders") -> Specimen:
    """A run with nothing wrong, and all that there is to give."""
    model, history = trained(seed, variant, task)
    train, held = records_for(task)
    tokenizer = tiny_llama()[1]
    given = {
        "history": history,
        "held_out": held,
        "fed": fed_batches(train, seed, 4),
        "served": [encode(record, tokenizer).prompt for record in train],
        "valley": valley_for(task),
    }
    return Specimen(model, tokenizer, train, given)


def spoiled_labels(name: str, seed: int, steps: int = STEPS) -> Specimen:
    """A run over labels with one fault."""
    train, wrong = train_records(), LABELS[name]
    model = adapted(seed)
    batches = fed_batches(train, seed, steps, wrong)
    history, _ = teach(model, batches)
    return Specimen(
        model,
        tiny_llama()[1],
        train,
        {"history": history, "fed": batches[:4], "valley": valley_for("orders")},
    )


def without_end(batch: Batch, chosen: list) -> Batch:
    """Targets without the end mark, as where pad is the end mark and all padding is masked."""
    targets = batch.targets.clone()
    for row, one in enumerate(chosen):
        targets[row, len(one) - one.end : len(one)] = IGNORE
    return Batch(batch.ids, targets)


def without_first(batch: Batch, chosen: list) -> Batch:
    """Targets that begin one token late."""
    targets = batch.targets.clone()
    for row, one in enumerate(chosen):
        targets[row, len(one.prompt)] = IGNORE
    return Batch(batch.ids, targets)


def with_prompt(batch: Batch, chosen: list) -> Batch:
    """Targets that hold the prompt too."""
    targets = batch.targets.clone()
    for row, one in enumerate(chosen):
        targets[row, : len(one)] = batch.ids[row, : len(one)]
    return Batch(batch.ids, targets)


LABELS: dict[str, Callable] = {
    "nothing supervised": lambda batch, chosen: Batch(batch.ids, torch.full_like(batch.targets, IGNORE)),
    "end mark masked": without_end,
    "first token masked": without_first,
    "trained on the prompt": with_prompt,
    "labels shifted": lambda batch, chosen: Batch(batch.ids, batch.targets.roll(-1, dims=1)),
}

"""Make data/results/multitask.jsonl: five adapters for five tasks, against one adapter for all five.

    python -m recipes.multitask

Of each of `TASKS`, tiny-llama sees 96 short records twice. Three sets of each are never trained on:

    dev     like the training records: chooses the learning rate, and nothing else
    held    like the training records
    near    an edge case that no training record has: messages with a second number in them; databases and phrasings,
            modules, or a novel that are new; quantities that are not written in digits

Nobody trains on `FAR`. The arms, each of which sees the same number of examples in all:

    single      one adapter of rank 8 for each task
    multi       one adapter of rank 8, for five times the steps
    wide        the same with rank 40: as many parameters as the five
    thrown      as multi, but the rows of all tasks share batches, in which each token counts alike
    full        full fine-tuning on all tasks, embeddings too
    base        untrained

Except in `thrown` a batch is of one task, and each task gets equally many. Each arm, and each task of `single`, has
its own learning rate: one seed walks along a factor of 2 until the best lies between two worse ones, and the others
run at the best. A line for each run: loss and exact match on every set. A run that is recorded is not repeated. On
one thread; a quarter of an hour.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from labkit.checks import version_of
from labkit.data.batches import IGNORE, Batch, collate, endless_batches
from labkit.data.docstrings import load_docstrings
from labkit.data.encoding import Encoded, encode
from labkit.data.passages import DOCUMENT_START, load_austen, load_held_out
from labkit.data.splits import rows
from labkit.data.sql import load_questions, sql_record
from labkit.data.tickets import load_tickets
from labkit.doctor.specimens import BATCH, adapted, teach, tiny_llama
from labkit.lora.count import trainable
from labkit.paths import data_folder
from labkit.sweeps.records import append
from labkit.sweeps.runs import weights_hash
from recipes import jsonl

TASKS = ("orders", "sql", "docstrings", "ingredients", "prose")
FAR = ("trails", "devil")
SETS = ("dev", "held", "near")
TRAIN, ASKED = 96, {"dev": 24, "held": 40, "near": 40}
SHORT = 72  # tokens of a record, at most
OPENING = 180  # characters of a passage: a step then costs about as much as in the other tasks
PACKAGES = "AGH"  # of eight: so few records teach no more
STEPS = 48  # for each task: two passes
RANKS = {"single": 8, "multi": 8, "wide": 40, "thrown": 8}
RATES = {  # where the walk begins
    "base": (0.0,),
    "single": (8e-3, 1.6e-2),
    "multi": (4e-3, 8e-3),
    "wide": (2e-3, 4e-3),
    "thrown": (4e-3, 8e-3),
    "full": (5e-4, 1e-3),
}
ENDS = (1.25e-4, 1.28e-1)
SEARCH, SEEDS = (0,), (0, 1, 2, 3, 4)
ALL = "all"

Key = tuple[str, str, float, int]  # arm, task, learning rate, seed


def cut(records: Sequence[dict], edge: Sequence[dict]) -> dict[str, list[dict]]:
    """Four sets: three from `records`, and the near one from `edge`."""
    draw = random.Random(0)
    left, spare = shuffled(records, draw), shuffled(edge, draw)
    sets = {"near": spare[: ASKED["near"]]}
    for name, size in (("train", TRAIN), ("dev", ASKED["dev"]), ("held", ASKED["held"])):
        sets[name], left = left[:size], left[size:]
    return sets


def shuffled(records: Sequence[dict], draw: random.Random) -> list[dict]:
    """Those that are short, in a random order."""
    return [
        record
        for record in draw.sample(records, len(records))
        if len(encode(record, tiny_llama()[1])) <= SHORT
    ]


def orders() -> dict[str, list[dict]]:
    found: dict[bool, list[dict]] = {False: [], True: []}
    for split in ("train", "validation", "test"):
        for t in load_tickets(split):
            is_edge = not {"other_number", "two_orders"}.isdisjoint(t["tags"])
            if t["label"]["order"] and is_edge == (split != "train"):
                prompt = f"{DOCUMENT_START}{t['message']}\nOrder:"
                found[is_edge].append({"prompt": prompt, "completion": f" {t['label']['order']}"})
    return cut(found[False], found[True])


def sql() -> dict[str, list[dict]]:
    return cut(*([sql_record(item, "plain") for item in load_questions(s)] for s in ("train", "test")))


def docstrings() -> dict[str, list[dict]]:
    return cut(*([r for r in load_docstrings(s) if r["completion"] in PACKAGES] for s in ("train", "test")))


def ingredients() -> dict[str, list[dict]]:
    found: dict[bool, list[dict]] = {False: [], True: []}
    for line in rows("ingredients", "train") + rows("ingredients", "test"):
        quantity = json.loads(line["completion"])["quantity"]
        is_edge = quantity is None or not line["prompt"].startswith(quantity)
        found[is_edge].append(line | {"prompt": DOCUMENT_START + line["prompt"]})
    return cut(found[False], found[True])


def prose() -> dict[str, list[dict]]:
    return cut(*([opening(record) for record in load_austen(split)] for split in ("train", "test")))


def opening(record: dict) -> dict:
    text = record["completion"]
    return record | {"completion": text if len(text) <= OPENING else text[:OPENING].rpartition(" ")[0]}


def far(name: str) -> list[dict]:
    if name == "devil":
        found = [opening(record) for record in load_held_out("devil")]
    else:
        with (data_folder() / "trails" / "reports.csv").open(encoding="utf-8", newline="") as file:
            pairs = [(row["report"], row["notice"]) for row in csv.DictReader(file)]
        found = [{"prompt": f"{DOCUMENT_START}{asked}\n", "completion": said} for asked, said in pairs]
    return shuffled(found, random.Random(0))[: ASKED["dev"]]


@cache
def examples(task: str) -> dict[str, list[Encoded]]:
    """The sets of a task as token ids, or the one of a far task; texts that are cut off have no end to learn."""
    makers = dict(zip(TASKS, (orders, sql, docstrings, ingredients, prose)))
    sets = makers[task]() if task in makers else {"near": far(task)}
    found = {name: [encode(r, tiny_llama()[1]) for r in records] for name, records in sets.items()}
    if task in ("prose", "devil"):
        found = {name: [one.without_end() for one in some] for name, some in found.items()}
    return found


@cache
def data_hash() -> str:
    """A short hash of every token that is trained on or asked, and of the base's weights."""
    content = [weights_hash("tiny-llama")]
    content += [
        [task, name, [(one.prompt, one.completion) for one in some]]
        for task in TASKS + FAR
        for name, some in examples(task).items()
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def drawn(some: list[Encoded], seed: int, steps: int) -> list[Batch]:
    """Batches in a random order, pass after pass."""
    order = islice(endless_batches([len(one) for one in some], BATCH, seed), steps)
    return [collate([some[i] for i in chosen], tiny_llama()[1].pad_token_id) for chosen in order]


def batches(arm: str, task: str, seed: int) -> list[Batch]:
    """What a run trains on."""
    if arm == "single":
        return drawn(examples(task)["train"], seed, STEPS)
    if arm == "thrown":
        together = [one for name in TASKS for one in examples(name)["train"]]
        order = islice(endless_batches([1] * len(together), BATCH, seed, "shuffled"), STEPS * len(TASKS))
        return [collate([together[i] for i in chosen], tiny_llama()[1].pad_token_id) for chosen in order]
    taken = [batch for name in TASKS for batch in drawn(examples(name)["train"], seed, STEPS)]
    random.Random(seed).shuffle(taken)
    return taken


@torch.no_grad()
def ask(model: nn.Module, some: list[Encoded]) -> tuple[float, float]:
    """Nats per supervised token, and the share of the answers whose every token is the most likely one, the end too:
    those that greedy decoding gets right.
    """
    lost, tokens, right = 0.0, 0, 0
    ordered = sorted(some, key=len)
    for start in range(0, len(ordered), 16):
        batch = collate(ordered[start : start + 16], tiny_llama()[1].pad_token_id)
        logits, targets = model(input_ids=batch.ids, use_cache=False).logits[:, :-1], batch.targets[:, 1:]
        lost += F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="sum").item()
        tokens += batch.n_supervised
        right += int(((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1).sum())
    return lost / tokens, right / len(some)


def prepared(arm: str, seed: int) -> nn.Module:
    if arm in RANKS:
        return adapted(seed, r=RANKS[arm])
    return copy.deepcopy(tiny_llama()[0]).requires_grad_(arm == "full")


def measure(arm: str, task: str, lr: float, seed: int) -> dict:
    """The line of one run; a loss that is not finite is null."""
    started = time.process_time()
    model = prepared(arm, seed)
    parameters = trainable(model).trainable
    losses = [] if arm == "base" else teach(model, batches(arm, task, seed), lr)[0].losses
    model.eval()
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in TASKS if task == ALL else (task,):
        asked = {which: ask(model, examples(name)[which]) for which in SETS}
        found[name] = {
            which: {"loss": finite(loss), "exact": exact} for which, (loss, exact) in asked.items()
        }
    for name in FAR:
        found[name] = {"near": {"loss": finite(ask(model, examples(name)["near"])[0])}}
    return {
        "arm": arm,
        "task": task,
        "r": RANKS.get(arm),
        "lr": lr,
        "seed": seed,
        "steps": len(losses),
        "parameters": parameters,
        "train_loss": finite(fmean(losses[-len(losses) // 10 :])) if losses else None,
        "measured": found,
        "data": data_hash(),
        "processor_seconds": round(time.process_time() - started, 1),
        "versions": {package: version_of(package) for package in ("labkit", "torch", "transformers")},
    }


def finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


class Runs:
    """The recorded runs, and those that are missing, made when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = {key_of(line): line for line in jsonl.read(path)}

    def line(self, *key: Any) -> dict:
        if key not in self.lines:
            self.lines[key] = line = measure(*key)
            append(self.path, line)
            print(*key, f"{line['processor_seconds']} s", flush=True)
        return self.lines[key]

    def score(self, arm: str, task: str, lr: float) -> float:
        """What a rate is judged by: the share of the base's loss on dev that is left, averaged over tasks and seeds."""
        base = self.line("base", ALL, 0.0, 0)["measured"]
        shares = []
        for seed in SEARCH:
            measured = self.line(arm, task, lr, seed)["measured"]
            for name in TASKS if task == ALL else (task,):
                loss = measured[name]["dev"]["loss"]
                shares.append(math.inf if loss is None else loss / base[name]["dev"]["loss"])
        return fmean(shares)

    def best_rate(self, arm: str, task: str) -> float:
        """The best rate of a walk along a factor of 2, which goes on while that is at an end of it."""
        scores = {lr: self.score(arm, task, lr) for lr in RATES[arm]}
        while True:
            best, tried = min(scores, key=scores.__getitem__), sorted(scores)
            lr = best / 2 if best == tried[0] else best * 2 if best == tried[-1] else best
            if lr == best or not ENDS[0] <= lr <= ENDS[1]:
                return best
            scores[lr] = self.score(arm, task, lr)


def key_of(line: dict) -> Key:
    return line["arm"], line["task"], line["lr"], line["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "multitask.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with jsonl.resuming(given.out):
        runs = Runs(given.out)
        runs.line("base", ALL, 0.0, 0)
        for arms in (("single", "multi", "wide", "full"), ("thrown",)):
            for seed in SEEDS:
                for arm, task in [(a, t) for a in arms for t in (TASKS if a == "single" else (ALL,))]:
                    runs.line(arm, task, runs.best_rate(arm, task), seed)


if __name__ == "__main__":
    main()

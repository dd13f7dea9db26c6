"""Make data/results/capstone.jsonl: a prompt against an adapter, where a form is to be learned and where a fact is asked.

    python -m recipes.capstone

SmolLM2-135M says of a dictionary definition which of six kinds it defines (`data/definitions`). Somebody has n labelled
records. They can stand in the prompt, solved, or an adapter of rank 16 can be trained on them. The same `ASKED`
held-out definitions measure both. The prompt shows each kind equally often, and so do the records that are trained on.

    prompt     n solved records before each question; three draws of them
    adapter    LoRA on all linear layers; three draws of the records, which are also the seeds
    whole      the adapter on all records that were not held out

The other way round: which order number does a customer give? The number stands in each of `TICKETS` messages.

    document   the base, with the message and `SHOWN` solved ones in the prompt
    memory     an adapter that was trained on all these messages, `PASSES` times, and on question and answer for half of
               them; it is asked about the other half without the message

Each way of training has one rate, which was not searched: another could only help the adapter. A line for each run, with
what was right. A run that is recorded is not repeated. On one thread; half an hour.
"""

import argparse
import copy
import random
import time
from functools import cache
from pathlib import Path

import torch

from labkit.checks import version_of
from labkit.data import hold_out, read_records
from labkit.data.posing import posed
from labkit.data.tickets import load_tickets
from labkit.files.reading import sha256
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.loading import load
from labkit.paths import data_folder
from labkit.sweeps.records import append
from labkit.training import baselines, judging
from labkit.training.config import TrainConfig
from labkit.training.evaluate import chat_prompts
from labkit.training.loop import train
from labkit.training.shared_prefix import generate_shared
from recipes import jsonl

MODEL = "smollm2-135m"
FILE = data_folder() / "definitions" / "definitions.csv"
COLUMNS = ("definition", "kind")
TASK = "Definition to kind: animal, body, food, person, place or plant."
ASKED, TOKENS = 100, 4
FEW, FEW_STEPS, FEW_RATE = 6, 12, 5e-4  # labelled records; steps of 4: eight passes
WHOLE_STEPS, WHOLE_RATE, MEMORY_RATE = 30, 1e-3, 2e-3
SEEDS = (0, 1, 2)
TICKETS, SHOWN, PASSES, NUMBER = 60, 4, 3, 12  # the last: tokens of an answer


@cache
def base():
    """The model and its tokenizer."""
    return load(MODEL, torch.float32)


@cache
def records() -> tuple[list[dict], list[dict]]:
    """To choose from, and held out: no copies and no near copies on both sides."""
    found, _ = read_records(FILE, base()[1], columns=COLUMNS)
    train_records, held = hold_out(posed(found, base()[1], TASK), share=ASKED / len(found), seed=0)
    return train_records, held


def drawn(n: int, seed: int) -> list[dict]:
    """`n` records to learn from, of each kind equally many, in a random order."""
    draw, by_kind = random.Random(seed), {}
    for record in draw.sample(records()[0], len(records()[0])):
        by_kind.setdefault(record["messages"][-1]["content"].strip(), []).append(record)
    each = n // len(by_kind)
    chosen = [record for kind in sorted(by_kind) for record in by_kind[kind][:each]]
    return draw.sample(chosen, len(chosen))


def judged(model, asked: list[dict], tokens: int = TOKENS) -> list[int]:
    """Of each record, 1 if the answer is right."""
    prompts = chat_prompts(asked, base()[1])
    answers = generate_shared(model, base()[1], prompts, max_new_tokens=tokens, batch_size=20, progress=False)
    return [int(right) for right in judging.judged(answers, asked, judging.Metric("exact", "labels"))[0]]


def by_prompt(n: int, seed: int) -> list[int]:
    """What is right with `n` solved records before each question."""
    solved = drawn(n, seed)
    return judged(base()[0], [baselines.with_solved(record, solved) for record in records()[1]])


def by_adapter(n: int, steps: int, lr: float, seed: int) -> list[int]:
    """What is right after training on `n` records; all of them for 0."""
    torch.manual_seed(seed)
    model = add_lora(copy.deepcopy(base()[0]), LoRAConfig(r=16, alpha=32))
    settings = TrainConfig(lr=lr, steps=steps, batch_size=4, batching="shuffled", seed=seed, progress=False)
    train(model, base()[1], drawn(n, seed) if n else records()[0], settings)
    return judged(model, records()[1])


def messages(seed: int) -> list[dict]:
    """`TICKETS` short tickets of customers that are all different, each with an order number; the first half is asked."""
    found: dict[str, dict] = {}
    for ticket in sorted(load_tickets("train"), key=lambda one: len(one["message"])):
        customer, order = ticket["label"]["customer"], ticket["label"]["order"]
        if customer and order and customer in ticket["message"] and order in ticket["message"]:
            found.setdefault(customer, ticket)
    shortest = list(found.values())[: 2 * TICKETS]
    return random.Random(seed).sample(shortest, TICKETS)


def question(ticket: dict, with_message: bool) -> dict:
    """A chat that asks for the order number."""
    text = f"Which order number does {ticket['label']['customer']} give? Answer with the number."
    text = f"{ticket['message']}\n\n{text}" if with_message else text
    turns = (("user", text), ("assistant", ticket["label"]["order"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def from_document(seed: int) -> list[int]:
    """What is right with the message in the prompt."""
    half, rest = messages(seed)[: TICKETS // 2], messages(seed)[TICKETS // 2 :]
    solved = [question(ticket, True) for ticket in rest[:SHOWN]]
    return judged(
        base()[0], [baselines.with_solved(question(ticket, True), solved) for ticket in half], NUMBER
    )


def from_memory(lr: float, seed: int) -> list[int]:
    """What is right after training on the messages."""
    half, rest = messages(seed)[: TICKETS // 2], messages(seed)[TICKETS // 2 :]
    texts = [{"prompt": "", "completion": ticket["message"]} for ticket in half + rest]
    learned = [*texts, *(question(ticket, False) for ticket in rest)]
    torch.manual_seed(seed)
    model = add_lora(copy.deepcopy(base()[0]), LoRAConfig(r=16, alpha=32))
    steps = PASSES * len(learned) // 4
    settings = TrainConfig(lr=lr, steps=steps, batch_size=4, batching="shuffled", seed=seed, progress=False)
    train(model, base()[1], learned, settings)
    return judged(model, [question(ticket, False) for ticket in half], NUMBER)


HOW = {
    "prompt": by_prompt,
    "adapter": by_adapter,
    "whole": by_adapter,
    "document": from_document,
    "memory": from_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "capstone.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    about = {"model": MODEL, "data": sha256(FILE)[:16], "versions": {"torch": version_of("torch")}}
    runs: list[dict] = []
    for seed in SEEDS:
        runs += [{"how": "prompt", "n": n, "seed": seed} for n in (6, 24, 48)]
        runs += [{"how": "document", "seed": seed}]
        runs += [{"how": "adapter", "n": FEW, "steps": FEW_STEPS, "lr": FEW_RATE, "seed": seed}]
    for seed in SEEDS:
        runs += [{"how": "whole", "n": 0, "steps": WHOLE_STEPS, "lr": WHOLE_RATE, "seed": seed}]
        runs += [{"how": "memory", "lr": MEMORY_RATE, "seed": seed}]
    with jsonl.resuming(given.out):
        there = [{key: line.get(key) for key in ("how", "n", "lr", "seed")} for line in jsonl.read(given.out)]
        for run in runs:
            if {key: run.get(key) for key in ("how", "n", "lr", "seed")} in there:
                continue
            begun = time.perf_counter()
            settings = {key: run[key] for key in run if key != "how"}
            right = HOW[run["how"]](**settings)
            append(
                given.out, run | {"right": right, "seconds": round(time.perf_counter() - begun, 1)} | about
            )
            print(run, sum(right), f"of {len(right)}", flush=True)


if __name__ == "__main__":
    main()

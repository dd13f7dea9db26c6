"""Make data/results/doctor_rates.jsonl: the learning rates of the short runs that `labkit.doctor.specimens` makes.

    python -m recipes.doctor_rates

Copying order numbers, and SQL: ten rates a factor of 2 apart, three seeds, LoRA of rank 8 with alpha = 2 r, and the
loss on held-out records after 24 steps. `labkit.doctor.specimens.valley_for` reads the valley off these lines. The seeds
are others than those of the confusion matrix. A run that is recorded is not repeated. On one thread; about six minutes.
"""

import argparse
import math
from pathlib import Path

import torch

from labkit.checks import version_of
from labkit.doctor.specimens import STEPS, held_out_loss, train_at
from labkit.paths import data_folder
from labkit.sweeps.records import append
from recipes import jsonl

TASKS = ("orders", "sql")
RATES = tuple(2.5e-4 * 2**i for i in range(10))  # 2.5e-4 to 0.128
SEEDS = (0, 1, 2)

Key = tuple[str, float, int]


def plan() -> list[Key]:
    """All runs: task, rate and seed."""
    return [(task, lr, seed) for task in TASKS for seed in SEEDS for lr in RATES]


def measure(task: str, lr: float, seed: int) -> dict:
    """The line of one run."""
    model, history = train_at(task, lr, seed)
    losses = [*history.losses, held_out_loss(model, task)]
    *steps, held = [loss if math.isfinite(loss) else None for loss in losses]
    return {
        "task": task,
        "lr": lr,
        "seed": seed,
        "steps": STEPS,
        "held_out_loss": held,
        "losses": steps,
        "versions": {package: version_of(package) for package in ("labkit", "torch", "transformers")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "doctor_rates.jsonl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with jsonl.resuming(given.out):
        done = {(line["task"], line["lr"], line["seed"]) for line in jsonl.read(given.out)}
        for key in plan():
            if key in done:
                continue
            line = measure(*key)
            append(given.out, line)
            print(*key, line["held_out_loss"], flush=True)


if __name__ == "__main__":
    main()

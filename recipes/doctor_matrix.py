"""Make data/results/doctor_matrix.jsonl: which probe of `labkit.doctor` finds what, on specimens that it never saw.

    python -m recipes.doctor_matrix

A line for each run: all sick specimens of `labkit.doctor.zoo`, and healthy runs of four kinds of adapter on three tasks.
A line has the first finding (`first`) with its cure, and what should be (`expected`); each probe's outcome, number and
sentence; the losses of the steps; and what the model answers to held-out messages. A run that is recorded is not
repeated, so a killed recipe goes on where it was. On one thread; about a quarter of an hour.

The seeds are others than those that thresholds were set with (0 and 1), and others than those of a first matrix (10 to
12, doctor_matrix_first.jsonl). That one found a fault in a probe: `stopping` called eight of twelve healthy runs
of prose sick, whose passages end where nobody can tell. The probe was mended, and the matrix made anew.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

from labkit.checks import version_of
from labkit.doctor.examine import doctor
from labkit.doctor.report import plain
from labkit.doctor.specimens import TASKS, VARIANTS, Specimen, healthy, held_records
from labkit.doctor.zoo import SICK, breed, expected
from labkit.paths import data_folder
from labkit.sweeps.records import append
from labkit.training.evaluate import generate
from recipes import jsonl

SEEDS = (20, 21, 22)
STEPS = 24  # of those that show from the start, so that all loss curves are of one length
ASKED, SHOWN = 10, 3
HEALTHY = "healthy {} on {}"

Key = tuple[str, int]


def plan() -> list[Key]:
    """All runs, by specimen and seed."""
    sound = [HEALTHY.format(variant, task) for task in TASKS for variant in VARIANTS]
    return [(name, seed) for seed in SEEDS for name in (*SICK, *sound)]


def specimen(name: str, seed: int, folder: Path) -> Specimen:
    """The one with this name of `plan`."""
    if name in SICK:
        return breed(name, seed, folder, STEPS)
    _, variant, _, task = name.split()
    return healthy(seed, variant, task)


def answers(one: Specimen) -> tuple[list[str], list[str]]:
    """What it answers, and what would be right; to its own first records where it learned facts.

    A model with NaN in it answers nothing.
    """
    held = one.given.get("held_out") or (held_records() if "Order:" in one.data[0]["prompt"] else one.data)
    prompts, right = ([record[part] for record in held[:ASKED]] for part in ("prompt", "completion"))
    if not all(p.isfinite().all() for p in one.model.parameters() if p.is_floating_point()):
        return [""] * len(prompts), right
    return generate(one.model, one.tokenizer, prompts, max_new_tokens=12, progress=False), right


def measure(name: str, seed: int) -> dict:
    """The line of one run."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        one = specimen(name, seed, Path(folder) / "adapter")
        report = doctor(one.model, one.tokenizer, one.data, **one.given)
    said, right = answers(one)
    history = one.given.get("history")
    return {
        "specimen": name,
        "seed": seed,
        "expected": expected(name),
        "first": report.first,
        "cure": report[report.first].cure if report.first else "",
        "findings": {
            probe.name: {"outcome": finding.outcome, "number": plain(finding.number), "says": finding.says}
            for probe, finding in report.findings
        },
        "losses": [loss if math.isfinite(loss) else None for loss in (history.losses if history else [])],
        "asked": len(said),
        "right": sum(a.strip() == b.strip() for a, b in zip(said, right)),
        "answers": said[:SHOWN],
        "wanted": right[:SHOWN],
        "processor_seconds": round(time.process_time() - started, 1),
        "versions": {package: version_of(package) for package in ("labkit", "torch", "transformers")},
    }


def recorded(path: Path) -> dict[Key, dict]:
    """The lines that are there, by specimen and seed."""
    return {(line["specimen"], line["seed"]): line for line in jsonl.read(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "doctor_matrix.jsonl")
    parser.add_argument("--only", nargs="+", help="names of specimens; all if left out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with jsonl.resuming(given.out):
        done = recorded(given.out)
        for name, seed in plan():
            if (name, seed) in done or (given.only and name not in given.only):
                continue
            line = measure(name, seed)
            append(given.out, line)
            print(f"{name}, seed {seed}: {line['first']}, {line['processor_seconds']} s", flush=True)


if __name__ == "__main__":
    main()

"""Make data/results/killed_worker.json: a sweep of twelve runs on two workers, of which one is killed on the way.

    python -m recipes.killed_worker local       jobs of submitit's executor for one machine
    python -m recipes.killed_worker ray         trials of Ray Tune (pip install 'ray[tune]')

The second worker process that comes up is killed, as a machine that fails does. Kept are the spans in which worker
processes lived, as the system's table of processes shows them, and whether the records are those of an undisturbed
sweep: as many, none twice, the same numbers. About two minutes on two cores.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from labkit.checks import version_of
from labkit.files.reading import read_json
from labkit.files.writing import write_json
from labkit.paths import data_folder
from labkit.sweeps import grid
from labkit.sweeps.config import RunConfig
from labkit.sweeps.processes import hardware
from labkit.sweeps.records import Results

WORKERS = 2
MARKS = {
    "local": "submitit.core._submit",
    "ray": "ray::ImplicitFunc",
}  # in the command line of a worker with a run
EVERY = 0.05  # seconds between two looks at the table of processes
EXPERIMENT = {
    "seeds": [0, 1, 2, 3],
    "fixed": {"task": "facts", "examples": 8, "steps": 3},
    "grid": [{"r": [1, 2, 4]}],
}


def configs() -> list[RunConfig]:
    """The twelve runs."""
    return grid.expand(EXPERIMENT)


class Watch(threading.Thread):
    """Looks at the processes below this one while a sweep runs, and kills the second worker that comes up.

    Attributes:
        spans: {process: [first seen, last seen]}, in seconds since the watch began.
        killed: the process that was killed; None before that.
    """

    def __init__(self, mark: str):
        super().__init__(daemon=True)
        self.mark, self.begun = mark, time.monotonic()
        self.spans: dict[int, list[float]] = {}
        self.killed: int | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(EVERY):
            for process in me.children(recursive=True):
                try:
                    if self.mark not in " ".join(process.cmdline()):
                        continue
                    now = round(time.monotonic() - self.begun, 2)
                    self.spans.setdefault(process.pid, [now, now])[1] = now
                    if self.killed is None and len(self.spans) == 2:
                        process.kill()
                        self.killed = process.pid
                except psutil.Error:
                    continue

    def stop(self) -> None:
        self.ended.set()
        self.join()


def sweep(on: str, folder: Path, runs: list[RunConfig], progress: bool = False) -> tuple[Results, Watch]:
    """The sweep, with a worker killed; its records are in folder/sweep.jsonl."""
    watch = Watch(MARKS[on])
    watch.start()
    try:
        results = grid.run_experiment(runs, folder / "sweep.jsonl", WORKERS, progress, on=on)
    finally:
        watch.stop()
    return results, watch


def numbers(results: Results) -> list[dict]:
    """What must not depend on how the runs were carried out: everything but times."""
    return [
        {"config": one["config"], "status": one["status"]}
        | {name: value for name, value in one.get("metrics", {}).items() if name != "train_seconds"}
        for one in results.records
    ]


def measure(on: str, folder: Path) -> dict:
    """What is kept of a sweep whose worker was killed."""
    results, watch = sweep(on, folder, configs(), progress=True)
    lines = [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]
    undisturbed = grid.run_experiment(configs(), folder / "undisturbed.jsonl", 0, False)
    return {
        "runs": len(configs()),
        "workers": WORKERS,
        "records": len(lines),
        "most_often": max(Counter(json.dumps(line["config"]) for line in lines).values()),
        "done": sum(line["status"] == "done" for line in lines),
        "same_numbers": numbers(results) == numbers(undisturbed),
        "spans": [[*span, pid == watch.killed] for pid, span in watch.spans.items()],
        "versions": {
            name: version_of(name) for name in ("labkit", "torch", "submitit" if on == "local" else "ray")
        },
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("on", choices=list(MARKS))
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "killed_worker.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.on, Path(folder))
    write_json(
        given.out, (read_json(given.out) if given.out.exists() else {}) | {given.on: found}, indent=None
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()

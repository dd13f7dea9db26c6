"""The runs of an experiment as jobs of a cluster: the same function, the same records.

A Slurm *job array* is one line per run, so is a file of results, and neither cares in which order they come. Each job
does one run (`processes.record_run`) and leaves its record as a JSON file in a folder that all machines see. Whoever
submitted reads those files as jobs end, and alone writes the results. So

- a job that is killed loses its own run, which is submitted once more, and recorded as failed if that ends alike;
- a submitter that is killed loses nothing: jobs go on, and the next one finds what they have left.

submitit makes the array, and runs the same jobs on this machine too (`on="local"`), which is how it is tested. Its
own results are pickles, and are not read.

Source: `submitit/core/core.py`; its README on job arrays.
"""

import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from labkit.checks import check_choice, check_whole, needed
from labkit.files.reading import parse_json, read_bytes
from labkit.files.writing import write_json
from labkit.sweeps.config import RunConfig
from labkit.sweeps.processes import ATTEMPTS, failed, name_of, record_run

CLUSTERS = ("slurm", "local")
EVERY = 1.0  # seconds between two looks at the jobs
USUAL_MINUTES = 24 * 60  # after which the cluster ends a job
LATE = 5.0  # seconds that a file may take to show on another machine's disk
MAX_BYTES = 2**24  # of a record


def carry_out_on(
    configs: Sequence[RunConfig],
    on: str,
    jobs: int,
    folder: Path,
    minutes: float | None = None,
    keep: Path | None = None,
) -> Generator[dict, None, None]:
    """The records of `configs`, each as soon as its job has ended.

    Args:
        configs: what to run.
        on: "slurm", or "local" for the same on this machine.
        jobs: how many at once.
        folder: for the files of jobs, on a disk that all machines see.
        minutes: how long a run may take.
        keep: a folder for the adapters, on such a disk too.

    Raises:
        ValueError: there is no such cluster here, or a setting is out of range.
        ModuleNotFoundError: submitit is not installed.
    """
    check_choice("on", on, CLUSTERS)
    check_whole("jobs", jobs)
    executor = executor_on(on, folder, jobs, minutes)
    waiting, attempts = deque(configs), dict.fromkeys(configs, 1)
    running: dict[RunConfig, Any] = {}
    try:
        for config in configs:  # what a submitter that was killed did not come to read
            if record := take_record(folder, config):
                waiting.remove(config)
                yield record
        while waiting or running:
            at_once = len(waiting) if on == "slurm" and not running else jobs - len(running)
            some = [waiting.popleft() for _ in range(min(len(waiting), max(0, at_once)))]
            running |= submit(executor, some, folder, keep)
            for config, job in list(running.items()):
                if not job.done():
                    continue
                del running[config]
                if record := take_record(folder, config, LATE if attempts[config] < ATTEMPTS else 0):
                    yield record
                elif attempts[config] < ATTEMPTS:
                    attempts[config] += 1
                    waiting.append(config)
                else:
                    yield failed(config, f"its job ended {ATTEMPTS} times before it did ({job.state})", 0.0)
            if running:
                time.sleep(EVERY)
    finally:
        for job in running.values():
            job.cancel(check=False)


def executor_on(on: str, folder: Path, jobs: int, minutes: float | None) -> Any:
    """What submits jobs.

    Raises:
        ValueError: there is no Slurm on this machine.
    """
    submitit = needed("submitit", f"a sweep on {on}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=on)
    except RuntimeError as error:
        raise ValueError(
            f"on={on!r}: {error}; start the sweep on a machine that can submit, or give on='local'"
        ) from None
    executor.update_parameters(
        timeout_min=math.ceil(minutes or USUAL_MINUTES), cpus_per_task=1, name="labkit-sweep"
    )
    if on == "slurm":
        executor.update_parameters(slurm_array_parallelism=jobs)
    return executor


def submit(
    executor: Any, configs: Sequence[RunConfig], folder: Path, keep: Path | None
) -> dict[RunConfig, Any]:
    """Submit runs, as one array; the job of each."""
    if not configs:
        return {}
    many = len(configs)
    jobs = executor.map_array(do_one, configs, [str(folder)] * many, [keep and str(keep)] * many)
    return dict(zip(configs, jobs))


def do_one(config: RunConfig, folder: str, keep: str | None) -> None:
    """What a job does: one run, whose record it leaves in a file."""
    torch.set_num_threads(1)  # as in any sweep: the numbers depend on it
    write_json(place_of(Path(folder), config), record_run(config, Path(keep) if keep else None))


def place_of(folder: Path, config: RunConfig) -> Path:
    """Where the record of a run is left."""
    return folder / f"{name_of(config)}.json"


def take_record(folder: Path, config: RunConfig, patience: float = 0) -> dict | None:
    """The record that a job has left, which is taken away; None if there is none within `patience` seconds."""
    place, until = place_of(folder, config), time.monotonic() + patience
    while not place.exists() and time.monotonic() < until:
        time.sleep(0.1)
    if not place.exists():
        return None
    record = parse_json(place, read_bytes(place, MAX_BYTES))
    place.unlink()
    if not isinstance(record, dict) or RunConfig.from_dict(record["config"]) != config:
        raise ValueError(f"{place} is no record of {config}; take it away, and start again")
    return record

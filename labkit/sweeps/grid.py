"""Grids of runs times seeds, recorded one line of JSON a run, and never computed twice.

A single run tells little: another seed may change the order of two configurations. So every point of a sweep is run with
several seeds, and is shown with all of them and with the 95 % interval of their mean.

An experiment is a TOML file: settings that are `fixed`, and one or more grids, each of which is the product of its lists.

    seeds = [0, 1, 2]
    [fixed]
    task = "austen"
    [[grid]]
    r = [1, 4, 16]
    lr = [1e-3, 3e-3]

    python -m labkit.sweep experiments/rank.toml [--jobs 2]     # makes or completes data/results/rank.jsonl

Runs go on separate processes with one thread each: that is the fastest way to use the cores on small models, and the
numbers of a run do not depend on how many run beside it. Only the parent writes. A killed sweep loses the runs under way and
nothing else; start it again and it does what is missing. A run that diverges or cannot run is a result too and is recorded as such.
"""

import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from labkit.hardware import best_device, memory_bytes, product_dtype
from labkit.paths import data_folder
from labkit.sweeps import runs
from labkit.sweeps.config import RunConfig
from labkit.sweeps.records import Results, append, load, mend_last_line
from labkit.training.history import TrainingDiverged

VERSIONS = ("labkit", "torch", "transformers", "numpy")
MEMORY_PER_RUN = 4 * 2**30  # what a run on SmolLM2-135M may take, with room to spare


def read_experiment(path: str | Path) -> list[RunConfig]:
    """The runs of an experiment file, in its order, the seeds innermost.

    Raises:
        ValueError: no file, no TOML, an unknown setting, an empty grid, or two runs that are the same.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return expand(tomllib.loads(text))
    except OSError as error:
        raise ValueError(f"cannot read the experiment {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def expand(experiment: dict) -> list[RunConfig]:
    """The runs of an experiment: every grid's product, times the seeds.

    Args:
        experiment: {"seeds": [...], "fixed": {setting: value}, "grid": [{setting: [values]}, ...]}.

    Raises:
        ValueError: see `read_experiment`.
    """
    unknown = set(experiment) - {"about", "seeds", "fixed", "grid"}
    if unknown:
        raise ValueError(f"unknown parts {sorted(unknown)}; an experiment has about, seeds, fixed and grid")
    seeds, grids = experiment.get("seeds", [0]), experiment.get("grid", [{}])
    configs = []
    for number, grid in enumerate(grids, 1):
        axes = {name: v if isinstance(v, list) else [v] for name, v in {**grid, "seed": seeds}.items()}
        empty = [name for name, values in axes.items() if not values]
        if empty:
            raise ValueError(f"grid {number} has no runs: {', '.join(empty)} is an empty list")
        for values in itertools.product(*axes.values()):
            configs.append(RunConfig.from_dict({**experiment.get("fixed", {}), **dict(zip(axes, values))}))
    refuse_duplicates(configs)
    return configs


def refuse_duplicates(configs: Sequence[RunConfig]) -> None:
    if not configs:
        raise ValueError("there are no runs: give at least one config, or a grid with values")
    seen: dict[RunConfig, int] = {}
    for i, config in enumerate(configs):
        if config in seen:
            raise ValueError(
                f"runs {seen[config] + 1} and {i + 1} are the same ({config}); take one of them out"
            )
        seen[config] = i


def run_experiment(
    experiment: str | Path | Sequence[RunConfig],
    path: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> Results:
    """Do the runs of an experiment that are not recorded yet.

    Args:
        experiment: a TOML file (see the module docstring), or configs.
        path: where to record; default for a TOML file: data/results/NAME.jsonl.
        jobs: processes; default: one a core, as many as the memory holds, one if there is a GPU. 0 runs in this process.
        progress: show a bar.

    Returns:
        The records of these runs, in their order. Ctrl-C ends the sweep and returns what there is.

    Raises:
        ValueError: see `read_experiment`; or no path for a list of configs.
        RuntimeError: another sweep is writing to `path`.
    """
    if isinstance(experiment, (str, Path)):
        configs, stem = read_experiment(experiment), Path(experiment).stem
        path = Path(path or data_folder() / "results" / f"{stem}.jsonl")
    elif path is None:
        raise ValueError("give the path of the file to record in")
    else:
        configs, path = list(experiment), Path(path)
        refuse_duplicates(configs)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        with lock:
            mend_last_line(path)
            done = load(path) if path.exists() else Results()
            known = done.by_config()
            missing = [config for config in configs if config not in known]
            bar = tqdm(
                total=len(configs), initial=len(configs) - len(missing), unit="run", disable=not progress
            )
            try:
                for record in carry_out(missing, default_jobs() if jobs is None else jobs):
                    append(path, record)
                    done.records.append(record)
                    bar.set_postfix_str(headline(record))
                    bar.update()
            except KeyboardInterrupt:
                done.problems.append("interrupted: some runs are missing; run again to complete them")
            finally:
                bar.close()
    except Timeout:
        raise RuntimeError(f"another sweep is writing to {path}; wait for it, or stop it") from None
    known = done.by_config()
    found = [known[config] for config in configs if config in known]
    return Results(found, done.problems)


def default_jobs() -> int:
    """One process a core, as many as the memory holds; one if there is a GPU, which they would have to share."""
    if best_device().type != "cpu":
        return 1
    return max(1, min(os.cpu_count() or 1, int(memory_bytes() // MEMORY_PER_RUN)))


def carry_out(configs: Sequence[RunConfig], jobs: int):
    """Records of `configs`, each as soon as it is done."""
    if jobs == 0:
        yield from map(record_run, configs)
        return
    # spawn: a forked child would inherit the locks of torch's threads
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=begin_process)
    try:
        for finished in as_completed([pool.submit(record_run, config) for config in configs]):
            yield finished.result()
    finally:
        pool.shutdown(
            wait=False, cancel_futures=True
        )  # after an interrupt: do not wait for what nobody will record


def begin_process() -> None:
    """In each process of a sweep: one thread, and an end with the parent, even if that was killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def record_run(config: RunConfig) -> dict:
    """Do one run; the line that records it."""
    started = time.perf_counter()
    record = {"config": asdict(config), "status": "done"}
    try:
        record["metrics"] = runs.run(config).metrics
    except TrainingDiverged as error:
        record |= {"status": "diverged", "step": len(error.history.steps) + 1, "error": str(error)}
    except (
        ValueError
    ) as error:  # a config that cannot run: r above a layer's width, a target that matches nothing
        record |= {"status": "failed", "error": str(error)}
    return record | {
        "data": runs.data_hash(config),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict:
    """The processor, the threads of a run, and the dtype of a 4-bit layer's products: what else the numbers depend on."""
    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "device": name or device.type,
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(device)).removeprefix("torch."),
    }


def headline(record: dict) -> str:
    """A run in a few words, for the progress bar."""
    metrics = {
        k: v
        for k, v in record.get("metrics", {}).items()
        if k not in ("parameters", "tokens", "train_seconds")
    }
    last = list(metrics.items())[-1:]
    return record["status"] + "".join(f" {name}={value:.3f}" for name, value in last)

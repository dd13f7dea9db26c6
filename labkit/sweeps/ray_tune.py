"""The runs of an experiment as trials of Ray Tune: the same function, the same records.

Ray keeps the workers, gives each a trial, and starts a trial again whose worker was lost. What a trial computes it
leaves where a job of a cluster leaves it (`labkit.sweeps.cluster`), as a JSON file, and whoever submitted reads that.
Ray's own results are pickles, and are not read.

So Ray decides *where* a run goes and how often it is tried, and nothing else. Its searches and early stopping are
left out on purpose: a sweep that drops what looks bad has no seeds left to compare. A Ray cluster of several machines
is used if RAY_ADDRESS names one; its machines must see `folder`, and have labkit.

Source: `ray/tune/tuner.py`; Ray's guide to fault tolerance of Tune.
"""

import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labkit.checks import check_whole
from labkit.hardware import best_device
from labkit.sweeps.cluster import EVERY, LATE, do_one, place_of, take_record
from labkit.sweeps.config import RunConfig
from labkit.sweeps.processes import ATTEMPTS, failed

RAY = "ray"
QUIET = {
    "RAY_agent_register_timeout_ms": "300000",  # 30 s are too few on a machine whose cores are busy
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at 15, its default, trials starve beside anything else
}


def ray_with_tune() -> Any:
    """The package, with what its Tune needs.

    Raises:
        ModuleNotFoundError: it is not installed, or without Tune; says what to install.
    """
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    try:
        import ray
        import ray.tune
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, and a sweep on Ray needs it; pip install 'ray[tune]'",
            name=error.name,
        ) from None
    return ray


def carry_out_on_ray(
    configs: Sequence[RunConfig],
    jobs: int,
    folder: Path,
    minutes: float | None = None,
    keep: Path | None = None,
) -> Generator[dict, None, None]:
    """The records of `configs`, each as soon as its trial has left it.

    Args:
        configs: what to run.
        jobs: how many at once.
        folder: for what trials leave, on a disk that all machines see.
        minutes: None; Ray stops a trial only when it reports, and a run reports at its end.
        keep: a folder for the adapters, on such a disk too.

    Raises:
        ValueError: a setting is out of range, or minutes are given.
        ModuleNotFoundError: Ray is not installed.
        RuntimeError: Ray did not start, or ended before its trials did.
    """
    check_whole("jobs", jobs)
    if minutes is not None:
        raise ValueError(
            f"minutes={minutes:g} cannot be kept on Ray, which stops a trial only when it reports; leave minutes out, "
            "or use --on local or slurm"
        )
    ray = ray_with_tune()
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(configs)
    for config in configs:  # what a submitter that was killed did not come to read
        if record := take_record(folder, config):
            waiting.remove(config)
            yield record
    if not waiting:
        return
    ours = not ray.is_initialized()
    if ours:
        begin(ray, jobs)
    error: list[BaseException] = []
    thread = threading.Thread(target=fit, args=(ray, list(waiting), jobs, folder, keep, error), daemon=True)
    thread.start()
    try:
        while waiting:
            lives = thread.is_alive()  # asked first: what the last trial left is read below
            for config in list(waiting):
                if record := take_record(folder, config, 0 if lives else LATE):
                    waiting.remove(config)
                    yield record
            if not lives:
                break
            time.sleep(EVERY)
        thread.join(60)  # the last trial still says that it has ended
        if error:
            raise RuntimeError(
                f"Ray ended before its trials did ({error[0]}); start again to do what is missing"
            )
        for config in waiting:
            yield failed(config, f"its trial ended {ATTEMPTS} times before it did", 0.0)
    finally:
        if ours:
            ray.shutdown()
        for config in configs:  # of a worker that was lost after it had left its record
            place_of(folder, config).unlink(missing_ok=True)


def begin(ray: Any, jobs: int) -> None:
    """Start Ray on this machine with room for so many trials, or join the cluster that RAY_ADDRESS names.

    Raises:
        RuntimeError: it did not start.
    """
    here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **here)
    except Exception as error:  # a RuntimeError, ConnectionError, or one of Ray's own
        text = str(error).strip().splitlines()
        raise RuntimeError(
            f"Ray did not start ({text[0] if text else type(error).__name__}); on a busy machine give it more time: "
            "RAY_agent_register_timeout_ms=600000"
        ) from None


def fit(
    ray: Any,
    configs: Sequence[RunConfig],
    jobs: int,
    folder: Path,
    keep: Path | None,
    error: list[BaseException],
) -> None:
    """Have Ray carry out all trials; an exception goes into `error`."""
    tune = ray.tune
    each = {"cpu": 1, "gpu": 0 if best_device().type == "cpu" else 1}
    space = {
        "run": tune.grid_search([asdict(config) for config in configs]),
        "folder": str(folder.absolute()),
        "keep": str(keep) if keep else None,
    }
    tuner = tune.Tuner(
        tune.with_resources(trial, each),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=jobs),
        run_config=tune.RunConfig(
            name="labkit-sweep",
            storage_path=str((folder / "ray").absolute()),
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except BaseException as problem:  # reported by the thread that waits
        error.append(problem)


def trial(settings: dict) -> None:
    """What a worker does: one run, whose record it leaves in a file."""
    with suppress(FileExistsError):
        Path(settings["folder"]).mkdir(parents=True)
    config = RunConfig.from_dict(settings["run"])
    if not place_of(Path(settings["folder"]), config).exists():  # else it was lost after its work
        do_one(config, settings["folder"], settings["keep"])

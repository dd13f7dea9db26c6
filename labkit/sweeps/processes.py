"""Runs on separate processes, one thread each; every run becomes a line to record, however it ended.

One thread per process is the fastest way to use the cores on small models, and the numbers of a run then do
not depend on how many run beside it. Only the parent writes. If it is killed, its processes end too.

A process has one run at a time, so if the system kills it (no memory left), or it crashes or hangs, the parent
knows which run that was. It gives the run to a new process, and records it as failed if that ends in the same way.
The other runs go on.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from labkit.checks import version_of
from labkit.formats.adapters import save_adapter
from labkit.hardware import best_device, limits, memory_bytes, processor_name, product_dtype
from labkit.models.fetching import ModelUnavailable
from labkit.sweeps import runs
from labkit.sweeps.config import RunConfig
from labkit.training.history import TrainingDiverged

VERSIONS = ("labkit", "torch", "transformers", "numpy")
START_METHOD = "spawn"  # a forked process would inherit the locks of torch's threads
ATTEMPTS = 2  # at a run whose process ends before it does
STARTS = 3  # of a process, one after the other, none of which came up
PATIENCE = 5  # seconds for a process that has nothing to do any more to be gone
READY = "ready"
MEMORY_PER_RUN = 4 * 2**30  # what a run on SmolLM2-135M may take, with room to spare


def default_jobs() -> int:
    """One process per core that this one may use, as many as the memory holds (in a container, its own); one on
    a GPU, which they would have to share."""
    if best_device().type != "cpu":
        return 1
    return max(1, min(limits().cpus, int(memory_bytes() // MEMORY_PER_RUN)))


@dataclass(eq=False)
class Worker:
    """A process of a sweep, and the run that it has.

    Attributes:
        process: it.
        connection: by which it gets configs and sends records.
        config: of its run; None if it has none.
        since: when it got the run, or was started; on `time.monotonic`.
        is_up: has it said that it is ready?
    """

    process: BaseProcess
    connection: Connection
    since: float
    config: RunConfig | None = None
    is_up: bool = False


def carry_out(
    configs: Sequence[RunConfig], jobs: int, minutes: float | None = None, keep: Path | None = None
) -> Generator[dict, None, None]:
    """The records of `configs`, each as soon as its run is done; with jobs=0 in this process.

    Args:
        configs: what to run.
        jobs: processes.
        minutes: how long a run may take; None for no limit.
        keep: a folder for the adapters; None to keep none.

    Raises:
        RuntimeError: no process comes up.
    """
    if jobs == 0:
        yield from (record_run(config, keep) for config in configs)
        return
    waiting, attempts = deque(configs), dict.fromkeys(configs, 1)
    workers: list[Worker] = []
    failed_starts = 0
    try:
        workers += [start_worker(keep) for _ in range(min(jobs, len(configs)))]
        while waiting or any(worker.config for worker in workers):
            for worker in workers:
                if worker.is_up and worker.config is None and waiting:
                    give(worker, waiting.popleft())
            for worker in next_news(workers, minutes):
                news, config = received(worker), worker.config
                if news == READY:
                    worker.is_up, failed_starts = True, 0
                    continue
                if isinstance(news, dict):
                    worker.config = None
                    yield news
                    continue
                too_long, seconds = is_overdue(worker, minutes), time.monotonic() - worker.since
                how = end(worker, patience=0 if too_long else PATIENCE)
                if config is None:  # in its start, or with nothing to do
                    failed_starts += not worker.is_up
                    check_starts(failed_starts, how)
                elif too_long:
                    yield failed(
                        config, f"stopped after {minutes:g} minutes, the limit that was given", seconds
                    )
                elif (ended := attempts[config]) < ATTEMPTS:
                    attempts[config] = ended + 1
                    waiting.append(config)  # after all others, when there may be more memory
                else:
                    yield failed(config, f"its process ended {ATTEMPTS} times before it did: {how}", seconds)
                workers[workers.index(worker)] = start_worker(keep)
    finally:
        for worker in workers:
            if worker.is_up and worker.config is None:
                give(worker, None)
        for worker in workers:
            end(worker, patience=PATIENCE if worker.is_up and worker.config is None else 0)


def check_starts(failed_starts: int, how: str) -> None:
    """Raise a `RuntimeError` if several processes in a row did not come up."""
    if failed_starts >= STARTS:
        raise RuntimeError(
            f"the processes of the sweep do not start ({how}); what they print says why. A script that starts a sweep "
            'needs `if __name__ == "__main__":` around it; or give jobs=0, which runs in this process'
        )


def start_worker(keep: Path | None) -> Worker:
    """A new process."""
    context: Any = multiprocessing.get_context(START_METHOD)
    ours, its = context.Pipe()
    process = context.Process(target=work, args=(its, keep), daemon=True)
    process.start()
    its.close()
    return Worker(process, ours, time.monotonic())


def give(worker: Worker, config: RunConfig | None) -> None:
    """Give a run to a process that has none, or None: no more. If it has just ended, that is seen as its end in the
    run.
    """
    worker.config, worker.since = config, time.monotonic()
    with suppress(OSError):
        worker.connection.send(config)


def next_news(workers: Sequence[Worker], minutes: float | None) -> list[Worker]:
    """Wait for something to happen; the processes that have sent something, have ended, or take too long."""
    left = None
    if minutes is not None:
        left = min((w.since + 60 * minutes - time.monotonic() for w in workers if w.config), default=None)
    sources = [source for w in workers for source in (w.connection, w.process.sentinel)]
    happened = wait(sources, None if left is None else max(0.0, left))
    return [
        w
        for w in workers
        if w.connection in happened or w.process.sentinel in happened or is_overdue(w, minutes)
    ]


def is_overdue(worker: Worker, minutes: float | None) -> bool:
    return (
        minutes is not None and worker.config is not None and time.monotonic() - worker.since >= 60 * minutes
    )


def received(worker: Worker) -> object:
    """What a process has sent, all of it; None if there is nothing, or it ended in the middle."""
    try:
        return worker.connection.recv() if worker.connection.poll() else None
    except (EOFError, OSError):
        return None


def end(worker: Worker, patience: float = 0) -> str:
    """Wait `patience` seconds for a process to end, then make it; how it ended, in words."""
    worker.process.join(patience)
    worker.process.kill()
    worker.process.join()
    worker.connection.close()
    code = worker.process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", as the system does when memory is short" if code == -9 else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def work(connection: Connection, keep: Path | None) -> None:
    """What a process of a sweep does: one run after the other."""
    begin_process()
    connection.send(READY)
    while True:
        try:
            config = connection.recv()
        except (EOFError, OSError):
            return
        if config is None:
            return
        connection.send(record_run(config, keep))


def begin_process() -> None:
    """In each process of a sweep: one thread, no Ctrl-C (the parent gets it), and end with the parent, even if that
    is killed.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def record_run(config: RunConfig, keep: Path | None = None) -> dict:
    """Do one run; the line that records it, and its adapter in a folder of `keep`, if given. Its status "not run" says that the machine, not the config, was why."""
    started = time.perf_counter()
    outcome: dict[str, object] = {"status": "done"}
    try:
        result = runs.run(config)
        outcome["metrics"] = result.metrics
        if result.wrong is not None:
            outcome["wrong"] = result.wrong
        if keep is not None and config.method in ("lora", "qlora"):
            outcome["adapter"] = name_of(config)
            save_adapter(result.model, keep / name_of(config))
    except TrainingDiverged as error:
        outcome = {"status": "diverged", "step": len(error.history.steps) + 1, "error": str(error)}
    except (ModelUnavailable, OSError) as error:  # no network, no space: another day it may run
        return {"config": asdict(config), "status": "not run", "error": str(error)}
    except ValueError as error:
        # a config that cannot run: r above a layer's width, a target that matches nothing
        outcome = {"status": "failed", "error": str(error)}
    except Exception as error:  # a bug, or no memory: the other runs do not depend on it
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return line_of(config, outcome, time.perf_counter() - started)


def name_of(config: RunConfig) -> str:
    """A name for what a run leaves, made of its config."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
    return f"{config.task}-{digest[:10]}"


def failed(config: RunConfig, error: str, seconds: float) -> dict:
    """The line that records a run whose process ended before it."""
    return line_of(config, {"status": "failed", "error": error}, seconds)


def line_of(config: RunConfig, outcome: dict[str, object], seconds: float) -> dict:
    """The line that records a run: its config, what came out, and all that the numbers depend on."""
    record = {"config": asdict(config)} | outcome | {"data": runs.data_hash(config)}
    settings = runs.settings_hash(config.model)
    if settings is not None:
        record["base_settings"] = settings
    return record | {
        "seconds": round(seconds, 1),
        "versions": {name: version_of(name) for name in VERSIONS},
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, object]:
    """What else the numbers depend on: processor, threads, and the dtype of a 4-bit layer's products."""
    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    if device.type == "cpu":
        name = processor_name() or name
    return {
        "device": name or device.type,
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(device)).removeprefix("torch."),
    }

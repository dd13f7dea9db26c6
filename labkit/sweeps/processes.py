"""Runs on separate processes, one thread each; every run becomes a line to record, however it ended.

One thread per process is the fastest way to use the cores on small models, and the numbers of a run then do
not depend on how many run beside it. Only the parent writes. If it is killed, its processes end too.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from labkit.hardware import best_device, memory_bytes, product_dtype
from labkit.sweeps import runs
from labkit.sweeps.config import RunConfig
from labkit.training.history import TrainingDiverged

VERSIONS = ("labkit", "torch", "transformers", "numpy")
MEMORY_PER_RUN = 4 * 2**30  # what a run on SmolLM2-135M may take, with room to spare


def default_jobs() -> int:
    """One process per core, as many as the memory holds; one on a GPU, which they would have to share."""
    if best_device().type != "cpu":
        return 1
    return max(1, min(os.cpu_count() or 1, int(memory_bytes() // MEMORY_PER_RUN)))


def carry_out(configs: Sequence[RunConfig], jobs: int) -> Iterator[dict]:
    """The records of `configs`, each as soon as its run is done; with jobs=0 in this process."""
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
        # after an interrupt: do not wait for what nobody will record
        pool.shutdown(wait=False, cancel_futures=True)


def begin_process() -> None:
    """In each process of a sweep: use one thread, and end with the parent, even if that is killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def record_run(config: RunConfig) -> dict:
    """Do one run; the line that records it."""
    started = time.perf_counter()
    record: dict[str, object] = {"config": asdict(config), "status": "done"}
    try:
        record["metrics"] = runs.run(config).metrics
    except TrainingDiverged as error:
        record |= {"status": "diverged", "step": len(error.history.steps) + 1, "error": str(error)}
    except ValueError as error:
        # a config that cannot run: r above a layer's width, a target that matches nothing
        record |= {"status": "failed", "error": str(error)}
    return record | {
        "data": runs.data_hash(config),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "hardware": hardware(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, object]:
    """What else the numbers depend on: processor, threads, and the dtype of a 4-bit layer's products."""
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

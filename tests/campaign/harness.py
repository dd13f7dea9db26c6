"""What every campaign needs: how many rounds, a process that is killed at a random moment, a disk that is full.

`make test` plays a seeded slice of each campaign, `make campaign` all of it (LABKIT_CAMPAIGN=full).
"""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

FULL = os.environ.get("LABKIT_CAMPAIGN") == "full"

# processes come from a server that has imported these once, so that a round costs milliseconds and not seconds
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "labkit",
        "labkit.sweeps",
        "labkit.serving",
        "tests.conftest",
    ]
)


def rounds(slice: int, full: int) -> int:
    """How many rounds a campaign has: `slice` in `make test`, `full` in `make campaign`."""
    return full if FULL else slice


def moments(number: int, seconds: float, seed: int) -> list[float]:
    """That many random moments within `seconds`, the same for the same seed."""
    chance = random.Random(seed)
    return [chance.uniform(0, seconds) for _ in range(number)]


def in_a_group(ready: Connection, work: Callable, args: tuple) -> None:
    """What a process of `start` does: it says that it begins, then works, in a process group of its own."""
    os.setsid()
    ready.send(os.getpid())
    work(*args)


def start(work: Callable, *args) -> multiprocessing.process.BaseProcess:
    """Begin `work(*args)` in a process of its own, and return once it has begun. `work` is a module's function."""
    ready, child = processes.Pipe(duplex=False)
    process = processes.Process(target=in_a_group, args=(child, work, args))
    process.start()
    child.close()
    ready.recv()
    return process


def kill_after(seconds: float, work: Callable, *args) -> bool:
    """Kill `work(*args)`, and every process that it started, with SIGKILL after `seconds`; False if it was done."""
    process = start(work, *args)
    process.join(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the process failed by itself: {process.exitcode}"
    return process.exitcode != 0


def duration(work: Callable, *args) -> float:
    """Seconds that `work(*args)` takes in a process of its own, undisturbed."""
    process = start(work, *args)
    begin = time.monotonic()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """A disk of that size, mounted at `folder`; None where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)

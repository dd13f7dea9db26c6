"""What a section is made of: measurements, each with what it needs, and the stage that they are taken on."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Numbers = dict[str, Any]  # what JSON can hold


class Skipped(Exception):
    """A measurement does not apply here; the message says why, in one sentence."""


@dataclass(frozen=True)
class Stage:
    """Where measurements are taken.

    Attributes:
        device: one GPU, or the CPU in a rehearsal.
        dtype: of what is computed: bf16 where the GPU has it in hardware, else fp16; fp32 on a CPU.
        rehearsal: small shapes on a CPU, to see that everything runs. Its numbers say nothing about a GPU.
        scratch: a folder for what a measurement writes.
        seed: of whatever is random.
    """

    device: torch.device
    dtype: torch.dtype
    rehearsal: bool
    scratch: Path
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """Is there a GPU?"""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the GPU has done what was asked of it."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Free what nobody uses, and let the record of the peak begin anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass(frozen=True)
class Measurement:
    """One row of a record.

    Attributes:
        key: its name, unique in the section.
        run: takes it, and returns its numbers. It may raise `Skipped`, and may run out of memory.
        needs_bytes: memory of the device without which it is not begun.
        packages: without which it is not begun.
        seconds: about how long it takes on a large GPU; it is not begun if less is left of the time.
    """

    key: str
    run: Callable[[Stage], Numbers]
    needs_bytes: int = 0
    packages: tuple[str, ...] = ()
    seconds: float = 5.0


@dataclass(frozen=True)
class Section:
    """A part of the day.

    Attributes:
        name: of its record.
        title: one line.
        measurements: what it takes on a stage, the most important first.
        columns: which numbers its table shows: name in a row -> heading.
        conclude: from the rows that were measured, sentences that say which goals are met.
    """

    name: str
    title: str
    measurements: Callable[[Stage], list[Measurement]]
    columns: dict[str, str]
    conclude: Callable[[dict[str, Numbers]], list[str]] = field(default=lambda rows: [])


def laps(ways: dict[str, Callable[[], Any]], stage: Stage, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each way, lap by lap: after a warm-up, all take turns in an order that is shuffled each round.

    On a GPU the time is between two events on its stream; the host does not wait in between.
    """
    shuffled, seconds = random.Random(stage.seed), {name: [] for name in ways}
    for way in ways.values():
        way()
    stage.wait()
    for _ in range(rounds):
        for name in shuffled.sample(list(ways), len(ways)):
            seconds[name].append(seconds_of(ways[name], stage))
    return seconds


def seconds_of(way: Callable[[], Any], stage: Stage) -> float:
    """How long one call takes."""
    if not stage.cuda:
        started = time.perf_counter()
        way()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    way()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def spread(seconds: list[float]) -> Numbers:
    """Median, smallest and largest of the laps, and how many there were."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "laps": len(seconds),
    }

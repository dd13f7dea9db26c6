"""Take the measurements of one section, one after the other; whatever happens to one, the next is taken."""

import time
import traceback

import torch

from gpu.machine import free_bytes, has
from gpu.measurement import Measurement, Section, Skipped, Stage
from gpu.record import Record
from labkit.optim.valve import is_out_of_memory

ROOM = 1.02  # of what a measurement says it needs: CUDA's own memory comes on top


def run(section: Section, stage: Stage, record: Record, until: float, after_death: bool = False) -> bool:
    """Take what is not measured yet, until there is no time; True if nothing is left.

    `after_death`: of a process that took the same; what it died of is left out.
    """
    complete = True
    fatal = record.killed() if after_death else set()
    for key in fatal:
        record.begin(key)
    for measurement in section.measurements(stage):
        if record.is_done(measurement.key) or measurement.key in fatal:
            continue
        if time.time() + (0 if stage.rehearsal else measurement.seconds) > until:
            record.add(measurement.key, "not reached", 0, reason="the time was up")
            complete = False
            continue
        print(f"  {measurement.key} …", flush=True)
        take(measurement, stage, record)
        outcome = record.rows[measurement.key]
        print(
            f"    {outcome['outcome']} {outcome.get('reason', '')}".rstrip(),
            f"({outcome['seconds']} s)",
            flush=True,
        )
        complete &= outcome["outcome"] != "failed"
    complete = complete and not fatal
    record.write(complete)
    return complete


def take(measurement: Measurement, stage: Stage, record: Record) -> None:
    """Take one measurement and note what came of it."""
    key, started = measurement.key, time.perf_counter()
    stage.tidy()
    if reason := why_not(measurement, stage):
        record.add(key, "skipped", 0, reason=reason)
        return
    torch.manual_seed(stage.seed)
    outcome, reason, numbers = "measured", "", None
    try:
        record.begin(key)
        numbers = measurement.run(stage)
        stage.wait()
    except KeyboardInterrupt:
        record.add(key, "not reached", time.perf_counter() - started, reason="it was stopped")
        raise
    except Skipped as error:
        outcome, reason = "skipped", str(error)
    except Exception as error:
        outcome, reason = ("out of memory" if is_out_of_memory(error) else "failed"), in_one_line(error)
        if outcome == "failed":
            traceback.print_exc()
        if is_lost(error):
            record.add(key, "failed", time.perf_counter() - started, reason=reason)
            raise
    record.add(key, outcome, time.perf_counter() - started, numbers, reason)


def why_not(measurement: Measurement, stage: Stage) -> str:
    """The reason for which a measurement cannot be taken here, in one sentence; empty if it can."""
    missing = [package for package in measurement.packages if not has(package)]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    needs, free = measurement.needs_bytes * ROOM, free_bytes(stage.device)
    if needs > free:
        return f"it needs {needs / 1e9:.1f} GB of the device's memory, of which {free / 1e9:.1f} GB are free"
    return ""


def is_lost(error: Exception) -> bool:
    """Is the GPU of no more use to this process (an illegal access, an assertion in a kernel)?"""
    lost = getattr(torch, "AcceleratorError", None)
    return (lost is not None and isinstance(error, lost)) or "CUDA error" in str(error)


def in_one_line(error: Exception) -> str:
    """The kind of an error, and its first line."""
    says = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {says[0]}"[:300]

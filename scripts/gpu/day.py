"""The day: the sections one after the other, each in a process of its own, and the table of each at its end."""

import argparse
import importlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpu import running
from gpu.machine import hardware, left_out, versions
from gpu.measurement import Section, Stage
from gpu.record import Record, folder_of
from gpu.tables import show
from labkit.files.writing import CannotWrite

TRIES = 3  # of a section whose process died; each goes on with the measurement after the one that killed it
GRACE = 60  # seconds over its time after which a section is stopped


def stage_of(options: argparse.Namespace, scratch: Path) -> Stage:
    """The first GPU, or the CPU for a rehearsal."""
    if options.cpu or not torch.cuda.is_available():
        return Stage(torch.device("cpu"), torch.float32, True, scratch)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return Stage(device, dtype, False, scratch)


def describe(stage: Stage) -> list[str]:
    """Where this runs and what it leaves out, line by line."""
    card = hardware(stage.device)
    if stage.rehearsal:
        lines = [
            "No GPU is used: a rehearsal in small shapes on the CPU. Its numbers say nothing about a GPU."
        ]
    else:
        driver = f", driver {card['driver']}" if card["driver"] else ""
        lines = [f"{card['device']}, {card['memory_bytes'] / 2**30:.0f} GiB{driver}"]
        if torch.cuda.device_count() > 1:
            lines.append(
                f"{torch.cuda.device_count()} GPUs: the first is used; CUDA_VISIBLE_DEVICES=1 chooses another"
            )
        if stage.dtype == torch.float16:
            lines.append(
                "This GPU has no bf16 in hardware: fp16 takes its place, and fp32 where a run trains"
            )
    found = versions()
    lines.append(
        ", ".join(
            f"{name} {found[name]}" for name in ("torch", "transformers", "triton", "cuda") if name in found
        )
    )
    return lines + [f"without {package}: {what}" for package, what in left_out().items()]


def run(options: argparse.Namespace, script: str) -> int:
    """All sections that were asked for; 0 if nothing failed, 1 if something did, 2 if nothing can be written."""
    stage = stage_of(options, Path(tempfile.gettempdir()))
    folder = folder_of(stage, options.results)
    print("\n".join(describe(stage)), flush=True)
    if problem := why_not_writable(folder):
        print(f"error: {problem}; --results FOLDER writes elsewhere", file=sys.stderr)
        return 2
    until = time.time() + 60 * options.minutes
    status = 0
    for name in options.only:
        path = folder / f"{name}.json"
        if name in options.again:
            path.unlink(missing_ok=True)
        print(f"\n== {name}", flush=True)
        code = run_apart(options, script, name, until)
        if path.exists():
            show(path)
        if code == 2:
            return code
        status |= code != 0
    print(f"\nrecords: {folder}")
    return int(status)


def why_not_writable(folder: Path) -> str:
    """Why no record can be written there, in one sentence; empty if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror}"


def run_apart(options: argparse.Namespace, script: str, name: str, until: float) -> int:
    """A section in a process of its own; again, a few times, if the process dies."""
    command = [sys.executable, script, "--section", name, "--until", str(until)]
    command += ["--cpu"] * options.cpu
    command += ["--results", str(options.results)] if options.results else []
    code = 1
    for tries in range(TRIES):
        apart = command + ["--after-death"] * (tries > 0)
        code = wait_for(subprocess.Popen(apart, start_new_session=True), until + GRACE)
        if code in (0, 1, 2):
            break
        print(
            f"  the process of this section ended with {code}; it goes on with the next measurement",
            flush=True,
        )
    return code


def wait_for(process: subprocess.Popen, until: float) -> int:
    """The exit status of a section; it is stopped if it takes too long, or if this process is."""
    try:
        return process.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        print("  this section does not end: it is stopped", flush=True)
        process.kill()
        process.wait()
        return 1
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def run_section(options: argparse.Namespace) -> int:
    """One section, in this process."""
    section: Section = importlib.import_module(f"gpu.{options.section}").SECTION
    scratch = Path(tempfile.mkdtemp(prefix="labkit-gpu-"))
    try:
        stage = stage_of(options, scratch)
        record = Record(section, stage, folder_of(stage, options.results))
        running.run(section, stage, record, options.until, options.after_death)
        return int(any(row["outcome"] == "failed" for row in record.rows.values()))
    except CannotWrite as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

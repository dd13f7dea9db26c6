"""Will the course run here, and how fast? Each line is fine, or says what to do about it."""

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from labkit.checks import nearest
from labkit.hardware import best_device, limits, memory_bytes, physical_memory, product_dtype, switch
from labkit.models.fetching import SOURCES, ModelUnavailable, is_complete
from labkit.paths import cache_folder

OK, WARNING, PROBLEM = "OK", "warning", "problem"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "numba",
    "ipywidgets",
    "matplotlib",
    "bitsandbytes",
)
ON_A_SERVICE = "on a notebook service the cell that README.md gives"
VARIABLES = tuple(
    f"LABKIT_{name}"
    for name in (
        "CACHE",
        "DATA",
        "MODEL",
        "PROFILE",
        "STATIC",
        "FAST",
        "CAMPAIGN",
        "PERSON",
        "PROGRESS",
        "GRADING",
        "GRADING_UNSAFE",
    )
)
# minutes on two cores of a server CPU with matrix units; `speed_line` scales them by the speed here
REFERENCE_GFLOPS = 140.0
COURSE_MINUTES = {
    "00_start_here": 0.7,
    "01_why_peft": 0.8,
    "02_lora_from_scratch": 1.7,
    "03_is_the_update_low_rank": 1.6,
    "04_rank_alpha_targets": 0.9,
    "05_learns_less_forgets_less": 1.3,
    "06_nf4_from_scratch": 1.2,
    "07_double_quantization": 0.7,
    "08_qlora_finetune": 5.3,
    "09_paged_optimizers": 1.5,
    "10_memory_breakdown": 2.3,
    "11_variant_zoo": 0.9,
    "12_beyond_lora": 0.8,
    "13_merging_and_export": 1.3,
    "14_many_adapters": 1.4,
    "15_failure_zoo": 1.5,
    "16_production_pipeline": 2.6,
    "17_scaling_out": 3.0,
    "18_capstone": 1.4,
}
WITHOUT_MATRIX_UNITS = {"08_qlora_finetune": 6.6}  # on the same two cores, with products in fp32


@dataclass(frozen=True)
class PreflightLine:
    """One line of the report: what was looked at, its state, what was found, and what to do about it."""

    what: str
    state: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {OK: "OK     ", WARNING: "WARNING", PROBLEM: "PROBLEM"}[self.state]
        return f"{mark}  {self.what:<10} {self.found}" + (f"  ->  {self.advice}" if self.advice else "")


def gflops(seconds: float = 0.5) -> float:
    """fp32 matrix-multiply speed of the best device in GFLOP/s, at a shape from the course's training."""
    device = best_device()
    generator = torch.Generator(device)  # of its own: the random numbers of a notebook stay what they were
    x, w = (torch.randn(n, 576, device=device, generator=generator) for n in (640, 1536))
    done = timed(lambda: x @ w.T, seconds)
    return 2 * 640 * 576 * 1536 / done / 1e9


def gigabytes_per_second(seconds: float = 0.5) -> float:
    """Memory bandwidth of the best device in GB/s: bytes read and written by a copy of 64 MiB."""
    device = best_device()
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), seconds) / 1e9


def timed(work: Callable[[], object], seconds: float) -> float:
    """The shortest time of one call of `work`, in seconds, in about `seconds` of trying."""
    work()  # the first call also pays for memory and threads
    shortest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - before)
    return shortest


def python_line() -> PreflightLine:
    found = platform.python_version()
    if sys.version_info < (3, 11):
        return PreflightLine(
            "Python", PROBLEM, found, "install Python 3.11 or newer and run `make clean lab`"
        )
    return PreflightLine("Python", OK, found)


def packages_line() -> PreflightLine:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        found = f"missing: {', '.join(missing)}"
        return PreflightLine(
            "packages", PROBLEM, found, f"run `make lab`, or {ON_A_SERVICE}, which installs them"
        )
    return PreflightLine("packages", OK, ", ".join(versions))


def model_line() -> PreflightLine:
    name, source = next(iter(SOURCES.items()))
    try:
        complete = is_complete(cache_folder() / name, source)
    except (ModelUnavailable, ValueError) as problem:
        return PreflightLine("model", PROBLEM, f"{name} cannot be read", str(problem))
    if complete:
        return PreflightLine("model", OK, f"{name} is cached and complete: works offline")
    advice = "the first use downloads 93 MB; to fetch it now, run `make model`"
    return PreflightLine("model", WARNING, f"{name} is not here yet", advice)


def memory_line() -> PreflightLine:
    device = best_device()
    total = memory_bytes(device)
    found = f"{total / 2**30:.1f} GiB on {device}"
    if device.type != "cpu":
        return PreflightLine("memory", OK, found)
    allowed = limits()
    free = min(allowed.free, total)
    found += f", {free / 2**30:.1f} free" + (
        " (of the container)" if allowed.memory < physical_memory() else ""
    )
    if total < 4 * 2**30 or free < 2**30:
        advice = "the training notebooks need about 3 GiB; close other programs"
        return PreflightLine("memory", WARNING, found, advice)
    return PreflightLine("memory", OK, found)


def settings_line() -> PreflightLine:
    given = {name: value for name, value in os.environ.items() if name.startswith("LABKIT_")}
    found = ", ".join(f"{name}={value}" for name, value in sorted(given.items())) or "none"
    unknown = [name for name in given if name not in VARIABLES]
    if unknown:
        advice = f"{unknown[0]} is not known, and does nothing{nearest(unknown[0], VARIABLES)}"
        return PreflightLine("settings", WARNING, found, advice.removesuffix("."))
    try:
        for name in ("LABKIT_STATIC", "LABKIT_FAST"):
            switch(name, None)
    except ValueError as error:
        return PreflightLine("settings", PROBLEM, found, str(error))
    return PreflightLine("settings", OK, found)


def disk_line() -> PreflightLine:
    try:
        folder = cache_folder()
    except ValueError as problem:
        return PreflightLine("disk", PROBLEM, "no folder to keep models in", str(problem))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 2e9:
        advice = "free some space, or point LABKIT_CACHE to another disk"
        return PreflightLine("disk", WARNING, f"{free / 1e9:.1f} GB free", advice)
    return PreflightLine("disk", OK, f"{free / 1e9:.0f} GB free")


def speed_line() -> PreflightLine:
    speed, bandwidth = gflops(), gigabytes_per_second()
    has_matrix_units = product_dtype(best_device()) == torch.bfloat16
    base = COURSE_MINUTES if has_matrix_units else COURSE_MINUTES | WITHOUT_MATRIX_UNITS
    minutes = {name: m * max(0.3, REFERENCE_GFLOPS / speed) for name, m in base.items()}
    listed = ", ".join(f"{name} {m:.1f}" for name, m in minutes.items())
    found = f"{speed:.0f} GFLOP/s fp32, {bandwidth:.0f} GB/s; minutes to expect here: {listed}"
    if speed < 30:
        return PreflightLine(
            "speed", WARNING, found, "start 08_qlora_finetune early, and lower its train_examples"
        )
    return PreflightLine("speed", OK, found)


def preflight() -> list[PreflightLine]:
    """Look at Python, packages, settings, model, memory, disk and speed; print a line for each, return them."""
    makers = (python_line, packages_line, settings_line, model_line, memory_line, disk_line, speed_line)
    lines = []
    for make in makers:
        lines.append(make())
        print(lines[-1])
    return lines

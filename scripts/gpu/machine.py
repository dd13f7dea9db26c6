"""The machine, in words that name no machine: the GPU, its driver, versions of packages, and what is left out."""

import hashlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from labkit.checks import version_of
from labkit.hardware import limits, memory_bytes, processor_name

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {
    "bitsandbytes": "no comparison with its CUDA kernels, its 4-bit layers and its paged AdamW",
    "peft": "no comparison with PEFT's training step",
    "numba": "no fast path on the CPU; the reference runs there",
    "triton": "no kernels on the GPU; the reference runs there",
    "gguf": "models cannot be made from GGUF files; the fine-tune takes tiny-llama",
    "platformdirs": "the cache is in ~/.cache",
    "ipykernel": "no notebook is run",
    "pytest": "the tests marked gpu are not run",
}
NAMED = ("torch", "transformers", "triton", "numpy", "safetensors", "bitsandbytes", "peft", "pytest")


def has(package: str) -> bool:
    """Is a package installed?"""
    return importlib.util.find_spec(package) is not None


def left_out() -> dict[str, str]:
    """The optional packages that are missing, and what goes without them."""
    return {package: what for package, what in OPTIONAL.items() if not has(package)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in NAMED:
        if has(package):
            found[package] = version_of(package)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = {"processor": processor_name() or platform.machine(), "cpus": cpus}
    if device.type != "cuda":
        return {"device": name_of(device), "memory_bytes": memory_bytes(device), **host}
    card = torch.cuda.get_device_properties(device)
    return {
        "device": name_of(device),
        "memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "driver": driver(),
        **host,
    }


def name_of(device: torch.device) -> str:
    """What the device is called; `hardware` says more, and asks the driver."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else "CPU"


def driver() -> str | None:
    """The version of NVIDIA's driver; None if nothing here knows it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def code() -> str:
    """A short hash of the code that is measured."""
    digest = hashlib.sha256()
    for folder in (ROOT / "labkit", ROOT / "scripts" / "gpu"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else limits().free

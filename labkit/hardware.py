"""What this process may use of the machine, which dtype to compute in, and whether the fast paths are on.

bf16 is not always faster: a CPU without bf16 instructions emulates it, and its backward pass took thirty
times as long as fp32's when measured. So the dtype is chosen from the hardware, never assumed.

A fast path is a second implementation of a call that also exists as plain PyTorch (`labkit.quant.kernels`,
`labkit.lora.fast`, `labkit.training.chunked_loss`). One switch turns all of them off.

In a container the machine is larger than what a process may have of it: Linux limits processors and memory by
*control groups*, which `limits` reads. Whoever goes by the machine starts too many processes, and is killed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def switch(name: str, default: bool | None) -> bool | None:
    """An environment variable that says yes or no; `default` if it is not set, or empty.

    Raises:
        ValueError: it says neither.
    """
    given = os.environ.get(name, "").strip().lower()
    if given in (*YES, *NO):
        return given in YES
    if given:
        raise ValueError(
            f"{name}={os.environ[name]!r} is neither yes ({', '.join(YES)}) nor no ({', '.join(NO)}); unset it "
            "for the default"
        )
    return default


_fast = bool(switch("LABKIT_FAST", True))


def fast_paths() -> bool:
    """Are the fast paths on? If not, the readable reference runs everywhere."""
    return _fast


def set_fast(on: bool) -> None:
    """Turn all fast paths on (the default) or off, as LABKIT_FAST=0 does from the start."""
    global _fast
    _fast = bool(on)


def best_device() -> torch.device:
    """CUDA if there is a GPU, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bf16 on a GPU that has it in hardware (compute capability 8.0 and up), fp32 everywhere else."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def product_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for products with *frozen* weights (`compute_dtype` of a `QuantLinear`).

    On a GPU, the same dtype as everything else. On a CPU, fp32, unless it has matrix units (Intel's AMX, 2023
    and later): they multiply bf16 several times as fast. Only large products gain, so everything between
    stays in fp32.
    """
    device = torch.device(device)
    if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.bfloat16
    return compute_dtype(device)


def memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory of a GPU, or what this process may have of the machine's, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return limits().memory


@dataclass(frozen=True)
class Limits:
    """What this process may use.

    Attributes:
        cpus: processors, whole ones, at least one.
        memory: bytes.
        free: bytes of them that are not in use, by others in the container too; the system's caches are free.
        contained: is either less than the machine has?
    """

    cpus: int
    memory: int
    free: int
    contained: bool


def limits(root: Path = Path("/")) -> Limits:
    """What this process may use: the machine, or less, by its control groups (version 1 or 2) and affinity.

    Args:
        root: where `proc` and `sys` are.
    """
    on_machine = os.cpu_count() or 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else on_machine
    memory = in_machine = physical_memory()
    free = min(memory, available_memory(root, memory))
    for folder in control_groups(root, "memory"):
        most = number_in(folder / "memory.max") or number_in(folder / "memory.limit_in_bytes")
        if most is None or most >= in_machine:  # without a limit, version 1 has a huge one
            continue
        used = number_in(folder / "memory.current") or number_in(folder / "memory.usage_in_bytes") or 0
        memory, free = min(memory, most), min(free, most - used + cached_bytes(folder / "memory.stat"))
    for folder in control_groups(root, "cpu"):
        quota, period = number_in(folder / "cpu.cfs_quota_us"), number_in(folder / "cpu.cfs_period_us")
        if (folder / "cpu.max").exists():
            quota, period = number_in(folder / "cpu.max"), number_in(folder / "cpu.max", 1)
        if quota and period and quota > 0:
            cpus = min(cpus, max(1, quota // period))
    return Limits(cpus, memory, max(0, free), cpus < on_machine or memory < in_machine)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups that may limit `controller`, the innermost first.

    Inside a container the path may be the one on the host, of which only the outermost folder is there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, names, path = line.split(":", 2) if line.count(":") >= 2 else ("", "?", "")
        if names and controller not in names.split(","):
            continue
        tops = [mounted / names, mounted / controller] if names else [mounted / "unified", mounted]
        top = next((top for top in tops if top.is_dir()), None)
        if top is not None:
            parts = [part for part in path.split("/") if part not in ("", "..")]
            yield from (top.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def number_in(file: Path, place: int = 0) -> int | None:
    """A whole number in a file of the system; None if there is no file, or no number ("max")."""
    try:
        return int(file.read_text().split()[place])
    except (OSError, ValueError, IndexError):
        return None


def cached_bytes(statistics: Path) -> int:
    """Bytes of files that a control group holds in memory, and gives up when it needs room."""
    try:
        lines = [line.split() for line in statistics.read_text().splitlines()]
        found = {name: int(value) for name, value in lines}
    except (OSError, ValueError):
        return 0
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def processor_name() -> str:
    """The model of the CPU, where Linux names it; else empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def physical_memory() -> int:
    """Memory of the machine in bytes."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil  # type: ignore[import-untyped]  # on Windows; it comes with ipykernel

    return psutil.virtual_memory().total


def available_memory(root: Path, otherwise: int) -> int:
    """Bytes that the machine can give to a program, by Linux's /proc/meminfo; else `otherwise`."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return otherwise
    return 1024 * found

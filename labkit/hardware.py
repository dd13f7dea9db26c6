"""What this machine has, which dtype to compute in, and whether the fast paths are on.

bf16 is not always faster: a CPU without bf16 instructions emulates it, and its backward pass took thirty
times as long as fp32's when measured. So the dtype is chosen from the hardware, never assumed.

A fast path is a second implementation of a call that also exists as plain PyTorch (`labkit.quant.kernels`,
`labkit.lora.fast`, `labkit.training.chunked_loss`). One switch turns all of them off.
"""

import os

import torch

_fast = os.environ.get("LABKIT_FAST", "1") != "0"


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
    """Total memory of a GPU, or of the machine, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

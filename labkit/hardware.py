"""What this machine has, and the dtype to compute in.

bf16 is no gain everywhere: a CPU without bf16 instructions emulates it, and its backward pass was measured at thirty
times the time of fp32. So the dtype is chosen from the hardware, never assumed.
"""

import os

import torch


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

    On a GPU that of everything else. On a CPU fp32, but for one with matrix units (Intel's AMX, 2023 and later): they
    multiply bf16 several times as fast, and only the large products gain, so that everything between stays in fp32.
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

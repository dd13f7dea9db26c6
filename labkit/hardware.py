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


def memory_bytes(device: torch.device | str = "cpu") -> int:
    """Total memory of a GPU, or of the machine, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

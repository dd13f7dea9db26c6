"""What CUDA's caching allocator says of a card: bytes that tensors requested, got as blocks, and that it reserved.

Some of what is allocated belongs to no tensor: cuBLAS takes a *workspace* for each thread that multiplies, up to
32 MiB, at its first product, and keeps it. Whoever compares a formula with `torch.cuda.max_memory_allocated` has to
know how much that is.

Source: `c10/cuda/CUDACachingAllocator.cpp`, `aten/src/ATen/cuda/CublasHandlePool.cpp`; `labkit.memory.allocator` is
a model of the first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Usage:
    """Bytes of a card: asked for by tensors, in their blocks, and taken from CUDA."""

    requested: int
    allocated: int
    reserved: int


def usage(device: torch.device, peak: bool = False) -> Usage:
    """What is in use now, or was at most since `restart`; the three peaks may be of different moments."""
    statistics = torch.cuda.memory_stats(device)
    when = "peak" if peak else "current"
    requested, allocated, reserved = (
        statistics.get(f"{name}_bytes.all.{when}", 0) for name in ("requested", "allocated", "reserved")
    )
    return Usage(requested, allocated, reserved)


def restart(device: torch.device) -> None:
    """Wait for the card, give back what no tensor uses, and let its peaks begin anew."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def free_workspaces(device: torch.device) -> int:
    """Free cuBLAS's workspaces, which its next products take again; returns their bytes."""
    torch.cuda.synchronize(device)
    before = usage(device).allocated
    torch._C._cuda_clearCublasWorkspaces()
    return before - usage(device).allocated


def bytes_of_blocks(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of the blocks that these tensors are in, as far as they are on this card."""
    addresses = {t.untyped_storage().data_ptr() for t in tensors if t.device == device}
    total = 0
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            total += block["size"] if address in addresses else 0
            address += block["size"]
    return total

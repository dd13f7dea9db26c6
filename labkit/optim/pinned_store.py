"""The lower tier of a pager on CUDA: pinned host memory, copied on a stream of its own, beside the computation."""

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.optim.page_store import PendingRead, Placed, Slot, raw, rounded


class PinnedStore:
    """State in pinned host memory, copied on a side stream of the GPU.

    Copies wait for what the computation has queued so far, and a reader makes the computation wait for them;
    the host waits for nothing. A page that was paged out is freed only after its copy, because the
    computation's stream, which reuses the memory, waits for the copy too.

    Args:
        device: the GPU.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the GPU; PyTorch's allocator there reuses what was freed."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def give_back(self) -> None:
        """Nothing: PyTorch's allocator on the GPU finds what was freed."""

    def reserve(self, nbytes: int) -> Slot:
        """A pinned buffer.

        Raises:
            RuntimeError: no host memory is left to pin.
        """
        size = rounded(nbytes)
        return Slot(torch.empty(size, dtype=torch.uint8, pin_memory=True), size)

    def release(self, slot: Slot) -> None:
        """Nothing: the buffer goes with its slot."""

    def copy(self, slot: Slot, tensors: list[Placed], out: bool) -> torch.cuda.Event:
        """Start to copy tensors into a slot, if `out`, or from it."""
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            for at, tensor in tensors:
                here, there = raw(tensor), slot.place[at : at + tensor.nbytes]
                there.copy_(here, non_blocking=True) if out else here.copy_(there, non_blocking=True)
            return self.stream.record_event()

    def write(self, slot: Slot, tensors: list[Placed]) -> None:
        """Copy tensors into a slot; they may be freed afterwards."""
        torch.cuda.current_stream(self.device).wait_event(self.copy(slot, tensors, out=True))

    def read(self, slot: Slot, tensors: list[Placed]) -> None:
        """Fill tensors from a slot, before anything that is computed from now on."""
        self.start_reading(slot, tensors).result()

    def start_reading(self, slot: Slot, tensors: list[Placed]) -> PendingRead:
        """The same, beside what is computed until `.result()` is called."""
        return CudaCopy(self.copy(slot, tensors, out=False), self.device)

    def close(self) -> None:
        """Wait for the last copies: their buffers are about to be freed."""
        self.stream.synchronize()


class CudaCopy(NamedTuple):
    """A copy under way."""

    event: torch.cuda.Event
    device: torch.device

    def result(self) -> None:
        """What is computed from now on waits for the copy."""
        torch.cuda.current_stream(self.device).wait_event(self.event)

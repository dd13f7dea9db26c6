"""The lower tier of a pager on CUDA: pinned host memory, copied on a stream of its own, beside the computation.

Two streams touch the same memory, so each has to be told to wait for the other:

    before a copy    the copying stream waits for what the computation has queued
    after a copy     the computation waits for the copy: at once for a page that goes out, whose memory is about
                     to be reused; for a page that is read ahead, when it is needed

The host waits for nothing. Memory under a copy is held here until the computation has been told to wait, so
that not even an interrupt frees it too early.

Why not leave that to `Tensor.record_stream` alone: it holds freed memory back until the host *sees* that a copy
has ended. The host runs ahead by whole steps, and the budget would be a wish.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.hardware import limits
from labkit.optim.page_store import PendingRead, Placed, Slot, raw, rounded

WASTE = 16  # a slot is at most 1/16 larger than its page


class PinnedStore:
    """State in pinned host memory, copied on a side stream of the GPU.

    Args:
        device: the GPU.

    Attributes:
        stream: on which copies run, one after the other.
        under_way: copies that the computation does not wait for yet, the oldest first.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.under_way: deque[Copy] = deque()

    def __reduce__(self):
        raise TypeError(
            "a page store cannot be copied or pickled: its memory is one process's. Copy or pickle the "
            "optimizer (its copy has all state on the GPU), or send its state_dict()"
        )

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the GPU; PyTorch's allocator there reuses what was freed."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def let_go(self, memory: Tensor) -> None:
        """Called before memory is freed: it is not reused before what is queued now has used it, not even by the
        stream that it was allocated on, if that is another."""
        memory.record_stream(torch.cuda.current_stream(self.device))

    def give_back(self) -> None:
        """Nothing: PyTorch's allocator on the GPU finds what was freed."""

    def reserve(self, nbytes: int) -> Slot:
        """Pinned buffers of at least `nbytes` together.

        Raises:
            MemoryError: the host has no memory left, or refuses to pin it.
        """
        sizes = powers_of_two(rounded(nbytes))
        size = sum(sizes)
        if size > limits().free:
            torch._C._host_emptyCache()  # what PyTorch keeps of buffers that are gone
        if size > (free := limits().free):  # Linux would not refuse: it would kill a process
            raise no_memory(size, f"{free:,} are free")
        try:
            return Slot([torch.empty(n, dtype=torch.uint8, pin_memory=True) for n in sizes], size)
        except RuntimeError as error:
            raise no_memory(size, str(error).removeprefix("CUDA error: ").partition("\n")[0]) from error

    def release(self, slot: Slot) -> None:
        """Nothing: the buffers go with their slot, and PyTorch's allocator waits for copies under way."""

    def copy(self, slot: Slot, tensors: list[Placed], out: bool) -> "Copy":
        """Start to copy tensors into a slot, if `out`, or from it."""
        check_not_captured()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        copy = Copy(self, torch.cuda.Event(), [tensor for _, tensor in tensors])
        self.under_way.append(copy)
        with torch.cuda.stream(self.stream):
            for at, tensor in tensors:
                for here, there in side_by_side(slot, at, raw(tensor)):
                    there.copy_(here, non_blocking=True) if out else here.copy_(there, non_blocking=True)
        copy.event.record(self.stream)
        return copy

    def write(self, slot: Slot, tensors: list[Placed]) -> None:
        """Copy tensors into a slot; they may be freed afterwards."""
        self.copy(slot, tensors, out=True).result()

    def read(self, slot: Slot, tensors: list[Placed]) -> None:
        """Fill tensors from a slot, before anything that is computed from now on."""
        self.copy(slot, tensors, out=False).result()

    def start_reading(self, slot: Slot, tensors: list[Placed]) -> PendingRead:
        """The same, beside what is computed until `.result()` is called."""
        return self.copy(slot, tensors, out=False)

    def close(self) -> None:
        """Wait for the last copies: their memory is about to be freed."""
        self.stream.synchronize()
        self.under_way.clear()


@dataclass(eq=False)
class Copy:
    """A copy that was started, and the tensors on the GPU that it reads or fills."""

    store: PinnedStore
    event: torch.cuda.Event
    tensors: list[Tensor]

    def result(self) -> None:
        """What is computed from now on waits for the copy."""
        check_not_captured()
        torch.cuda.current_stream(self.store.device).wait_event(self.event)
        under_way = self.store.under_way
        while self in under_way:  # what was started before has ended too: copies run one after the other
            for tensor in under_way[0].tensors:
                self.store.let_go(tensor)
            under_way.popleft()


def check_not_captured() -> None:
    """Raise a `RuntimeError` while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer state cannot be paged while a CUDA graph is captured: the graph would repeat the copies of "
            "this one step. Capture the forward and backward pass alone, or detach_paging first"
        )


def powers_of_two(nbytes: int) -> list[int]:
    """Sizes that hold `nbytes` together: PyTorch pins a power of two each time, and would pin up to twice as much.

    >>> powers_of_two(2**27 + 4096)
    [134217728, 4096]
    >>> powers_of_two(2**27 - 4096)
    [134217728]
    """
    sizes, left = [], nbytes
    while left > 0:
        size = 1 << (left.bit_length() - 1)
        if size < left and 2 * size - left <= nbytes // WASTE:
            size *= 2
        sizes.append(size)
        left -= size
    return sizes


def side_by_side(slot: Slot, at: int, data: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The bytes of a tensor that lies `at` bytes into the slot, beside those of the buffers that hold them."""
    pairs, start = [], -at  # of a buffer, counted from the tensor's first byte
    for buffer in slot.place:
        first, last = max(start, 0), min(start + len(buffer), len(data))
        if first < last:
            pairs.append((data[first:last], buffer[first - start : last - start]))
        start += len(buffer)
    return pairs


def no_memory(nbytes: int, reason: str) -> MemoryError:
    """The error of a host that has no memory to pin."""
    return MemoryError(
        f"state that is paged out needs {nbytes:,} more bytes of pinned host memory, and the host does not have "
        f"them ({reason}). No parameter and no state was changed. All of the state gets a place there, so a "
        "smaller budget does not help: use AdamW8bit, train fewer parameters, or give the container (or WSL) "
        "more memory"
    )

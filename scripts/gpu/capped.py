"""Memory with a cap: of PyTorch's allocator on a GPU, or of a simulated one on the CPU.

    with capped_memory(stage) as memory:
        memory.cap(nbytes)      # from now on a tensor that does not fit is refused: torch.OutOfMemoryError
        memory.peak()           # the most that was allocated since the last call

The simulated one counts the storages that PyTorch's operations make, and knows nothing of fragments.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu.measurement import Stage


@contextmanager
def capped_memory(stage: Stage, present: Iterable[Tensor] = ()) -> Iterator["CardMemory | SimulatedMemory"]:
    """The memory of the stage's device, without a cap at first and afterwards.

    Args:
        stage: where.
        present: tensors that are there already; the simulation does not know them otherwise.
    """
    if stage.cuda:
        memory = CardMemory(stage.device)
        try:
            yield memory
        finally:
            memory.cap(None)
    else:
        with SimulatedMemory(present) as memory:
            yield memory


class CardMemory:
    """What PyTorch's allocator has on a GPU."""

    kind = "of PyTorch's allocator on the GPU"

    def __init__(self, device: torch.device):
        self.device, self.total = device, torch.cuda.get_device_properties(device).total_memory

    def cap(self, nbytes: int | None) -> None:
        """The most it may reserve; None for all there is."""
        torch.cuda.empty_cache()
        share = 1.0 if nbytes is None else min(1.0, nbytes / self.total)
        torch.cuda.set_per_process_memory_fraction(share, self.device)

    def peak(self) -> int:
        """The most that was allocated since the last call."""
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class SimulatedMemory(TorchDispatchMode):
    """The storages that operations make, and when they go."""

    kind = "simulated on the CPU"

    def __init__(self, present: Iterable[Tensor]):
        super().__init__()
        self.most: int | None = None
        self.sizes: dict[int, int] = {}  # by the address of the storage object
        self.now = self.highest = 0
        for tensor in present:
            self.see(tensor)

    def cap(self, nbytes: int | None) -> None:
        """The most that may be alive; None for no limit."""
        self.most = nbytes

    def peak(self) -> int:
        """The most that was alive since the last call."""
        peak, self.highest = self.highest, self.now
        return peak

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes or tensor.is_meta or not storage.nbytes():
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self.gone, storage._cdata).atexit = False
        if self.most is not None and self.now > self.most:
            raise torch.OutOfMemoryError(
                f"a simulated cap of {self.most:,} bytes, of which {self.now - storage.nbytes():,} are in use, has no "
                f"{storage.nbytes():,} more"
            )
        self.highest = max(self.highest, self.now)

    def gone(self, key: int) -> None:
        """A storage was released."""
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

"""Memory for one dequantized weight W', which every 4-bit layer overwrites.

Why one memory for all layers: new memory costs page faults, as much time as dequantizing itself, and what was
just written is still in the processor's cache when the multiplication reads it. Each thread has its own, and
a weight of more than `SCRATCH_BYTES` gets new memory, so little is kept when a layer is done.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from labkit.quant.kernels.dispatch import is_ordinary
from labkit.quant.tensor import QuantizedTensor

SCRATCH_BYTES = 1 << 26  # a larger W' gets new memory, which is freed when the layer is done


class Scratch(threading.local):
    """Memory for one W'; each thread has its own, and every layer overwrites it."""

    def __init__(self):
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.views: dict[tuple, Tensor] = {}  # of the memory, by shape and dtype

    def dequantize(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """W' in `dtype`, valid until the next call in this thread."""
        # with gradients enabled (create_graph=True), autograd would keep W', and find another layer's there
        if (
            torch.is_grad_enabled()
            or not weight.packed.is_cpu
            or not is_ordinary(weight.packed)
            or weight.shape.numel() * dtype.itemsize > SCRATCH_BYTES
        ):
            return weight.dequantize(dtype)
        view = self.views.get((weight.shape, dtype))
        return weight.dequantize(dtype, self.new_view(weight.shape, dtype) if view is None else view)

    def new_view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A view of the memory as a tensor of this shape and dtype; the memory grows if need be."""
        size = shape.numel() * dtype.itemsize
        with torch.inference_mode(False):  # a tensor made within it could never be used outside
            if self.memory.numel() < size:
                self.memory, self.views = torch.empty(size, dtype=torch.uint8), {}
            view = self.views[shape, dtype] = self.memory[:size].view(dtype).view(shape)
        return view


_scratch = Scratch()


def dequantize_to_scratch(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W' in `dtype`, in the memory that is in use; valid until the next call in this thread."""
    return _scratch.dequantize(weight, dtype)


def current_scratch() -> Scratch:
    """The memory that is in use."""
    return _scratch


@contextmanager
def use_scratch(scratch: Scratch | None = None) -> Iterator[None]:
    """Within the block, dequantized weights go to `scratch`.

    By default to a new one: the one in use may have grown with another model, which a measurement would
    count.
    """
    global _scratch
    before, _scratch = _scratch, scratch or Scratch()
    try:
        yield
    finally:
        _scratch = before

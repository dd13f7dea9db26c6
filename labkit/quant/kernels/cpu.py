"""The four-bit kernels for a CPU: the compiled loops of `tasks.py`, called with tensors, on the threads of `threads.py`.

Agrees, bit for bit, with: `labkit.quant.blockwise.quantize_blocks` and `dequantize_blocks`.
"""

import numpy as np
import torch
from torch import Tensor

from labkit.quant.codebooks import dynamic8, search_tables
from labkit.quant.kernels import tasks, threads
from labkit.quant.kernels.stores import ALIGNMENT
from labkit.quant.kernels.vectors import LANES

HUGE_PAGES_FROM = 1 << 22  # bytes
WRITTEN = torch.float32, torch.bfloat16  # dtypes of results that the tasks know
STREAMED_FROM = 1 << 24  # bytes: a larger result is written past the caches


def multiplies(width: int) -> bool:
    """Is there a kernel for this processor that multiplies rows of `width` numbers?"""
    return LANES > 0 and width % tasks.STEP == 0


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.quantize_4bit`."""
    n = flat.numel()
    n_blocks = -(-n // blocksize)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(n_blocks)
    tensors = flat, *search_tables(levels), absmax, packed
    addresses = [tensor.data_ptr() for tensor in tensors]
    threads.run(tasks.quantize_task.address, n_blocks, n, n, n_blocks, blocksize, *addresses)
    return packed, absmax


def quantize_scales(flat: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.quantize_scales`."""
    n, n_blocks, levels = flat.numel(), -(-flat.numel() // 256), dynamic8() if levels is None else levels
    codes, absmax = torch.empty(n, dtype=torch.uint8), torch.empty(n_blocks)
    tensors = flat, *search_tables(levels), codes, absmax
    # a search takes about eight times as long as quantizing a weight
    threads.run(
        tasks.quantize_scales_task.address, n_blocks, 8 * n, n, n_blocks, *(t.data_ptr() for t in tensors)
    )
    return codes, absmax


def dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    out: Tensor,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
    new: bool = False,
) -> None:
    """See `labkit.quant.kernels.dequantize_4bit`; writes to `out`, n values, contiguous.

    `new`: nobody has written to `out` yet. The system then zeroes each page just before it is first written, and it is in the
    caches: going past them would be slower.
    """
    if out.dtype not in WRITTEN:  # numba has no half precision on a CPU; float64 holds every float32
        whole = empty(out.numel(), torch.float32, out.device)
        dequantize_4bit(packed, scales, levels, blocksize, whole, nested, offset, new=True)
        out.copy_(whole.view(out.shape))
        return
    n = out.numel()
    weight = weight_arguments(packed, scales, levels, blocksize, n, nested, offset)
    place = out.data_ptr()
    aligned = blocksize % tasks.STEP == 0 and place % ALIGNMENT == 0
    streamed = aligned and out.nbytes >= STREAMED_FROM and not new
    threads.run(tasks.dequantize_task.address, weight[1], n, *weight, place, out.itemsize, streamed)


def multiply_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    y: Tensor,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """See `labkit.quant.kernels.multiply_4bit`; x is (tokens, width), and writes to `y`, (tokens, out), both contiguous."""
    (tokens, width), height = x.shape, y.shape[1]
    n = width * height
    weight = weight_arguments(packed, scales, levels, blocksize, n, nested, offset)
    threads.run(tasks.multiply_task.address, height, n, *weight, x.data_ptr(), width, y.data_ptr(), tokens)


def weight_arguments(packed, scales, levels, blocksize, n, nested, offset) -> tuple[int, ...]:
    """The arguments of a task that say what the weight is.

    Raises:
        ValueError: a tensor is not what a kernel could read without leaving its memory.
    """
    n_blocks = -(-n // blocksize)
    if (
        packed.numel() < (n + 1) // 2
        or scales.numel() < n_blocks
        or scales.dtype != (torch.float32 if nested is None else torch.uint8)
        or not (packed.is_contiguous() and scales.is_contiguous())
    ):
        raise ValueError(
            f"{n} weights in blocks of {blocksize} need {(n + 1) // 2} contiguous bytes and {n_blocks} contiguous "
            f"scales, float32 or with `nested` uint8; not {packed.numel()} bytes, {scales.numel()} {scales.dtype}"
        )
    if nested is None:
        places = scales.data_ptr(), 0, 0, 0, 0
    else:
        n_nested = -(-n_blocks // 256)
        if nested.numel() < n_nested or nested.dtype != torch.float32 or not nested.is_contiguous():
            raise ValueError(
                f"{n_blocks} quantized scales need {n_nested} contiguous float32 scales of their own, not "
                f"{nested.numel()} {nested.dtype}; was the file that they came from cut short?"
            )
        places = 0, scales.data_ptr(), nested.data_ptr(), offset.data_ptr(), dynamic8().data_ptr()
    return n, n_blocks, blocksize, packed.data_ptr(), *places, levels.data_ptr()


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result on `device`, the CPU.

    A fresh 64 MB costs 20 ms in page faults, more than filling it. numpy asks the system for huge pages, which cuts
    that to about 5; torch does not.
    """
    if n * dtype.itemsize < HUGE_PAGES_FROM:
        return torch.empty(n, dtype=dtype)
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)

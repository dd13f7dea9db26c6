"""The four-bit kernels for a CPU: compiled loops, called with tensors, on the threads of `threads.py`.

Agrees, bit for bit, with: `labkit.quant.blockwise.quantize_blocks` and `dequantize_blocks`.
"""

import numpy as np
import torch
from torch import Tensor

from labkit.quant.codebooks import dynamic8, search_tables
from labkit.quant.kernels import threads
from labkit.quant.kernels.dequantizing import dequantize_task
from labkit.quant.kernels.multiplying import multiply_task
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.kernels.quantizing import quantize_scales_task, quantize_task
from labkit.quant.kernels.stores import ALIGNMENT
from labkit.quant.kernels.tasks import STEP
from labkit.quant.kernels.vectors import LANES

HUGE_PAGES_FROM = 1 << 22  # bytes
WRITTEN = torch.float32, torch.bfloat16  # dtypes of results that the tasks know
STREAMED_FROM = 1 << 24  # bytes: a larger result is written past the caches


def multiplies(width: int) -> bool:
    """Is there a kernel for this processor that multiplies rows of `width` numbers?"""
    return LANES > 0 and width % STEP == 0


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.operations.quantize_4bit`."""
    n = flat.numel()
    check_blocksize(blocksize)
    check_values(flat, n)
    check_values(levels, 16)
    n_blocks = -(-n // blocksize)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(n_blocks, dtype=torch.float32)
    tensors = flat, *search_tables(levels), absmax, packed
    addresses = [tensor.data_ptr() for tensor in tensors]
    threads.run(quantize_task.address, n_blocks, n, n, n_blocks, blocksize, *addresses)
    return packed, absmax


def quantize_scales(flat: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.operations.quantize_scales`."""
    n, n_blocks, levels = flat.numel(), -(-flat.numel() // 256), dynamic8() if levels is None else levels
    check_values(flat, n)
    check_values(levels, 256)
    codes, absmax = torch.empty(n, dtype=torch.uint8), torch.empty(n_blocks, dtype=torch.float32)
    tensors = flat, *search_tables(levels), codes, absmax
    # quantizing a scale takes about eight times as long as quantizing a weight
    addresses = [tensor.data_ptr() for tensor in tensors]
    threads.run(quantize_scales_task.address, n_blocks, 8 * n, n, n_blocks, *addresses)
    return codes, absmax


def dequantize_4bit(weight: PackedWeight, out: Tensor, new: bool = False) -> None:
    """See `labkit.quant.kernels.operations.dequantize_4bit`; writes to `out`, n values, contiguous.

    `new`: `out` has not been written to yet. The system then zeroes each page just before it is first
    written, so the page is in the caches, and going past them would be slower.
    """
    if out.dtype not in WRITTEN:  # numba has no half precision on a CPU; float64 holds every float32
        whole = empty(out.numel(), torch.float32, out.device)
        dequantize_4bit(weight, whole, new=True)
        out.copy_(whole.view(out.shape))
        return
    n = out.numel()
    if not (out.is_cpu and out.is_contiguous()):
        raise ValueError(
            f"out is on {out.device}, contiguous={out.is_contiguous()}; a kernel fills a contiguous one"
        )
    arguments = weight_arguments(weight, n)
    place, itemsize = out.data_ptr(), out.itemsize
    aligned = weight.blocksize % STEP == 0 and place % ALIGNMENT == 0
    streamed = aligned and n * itemsize >= STREAMED_FROM and not new
    threads.run(dequantize_task.address, arguments[1], n, *arguments, place, itemsize, streamed)


def multiply_4bit(x: Tensor, weight: PackedWeight, y: Tensor) -> None:
    """See `labkit.quant.kernels.operations.multiply_4bit`; x and y, (tokens, height), are contiguous."""
    (tokens, width), height = x.shape, y.shape[1]
    n = width * height
    if not multiplies(width):
        raise ValueError(
            f"no kernel multiplies rows of {width} numbers; the width must be a multiple of {STEP}"
        )
    check_values(x, tokens * width)
    check_values(y, tokens * height)
    arguments = weight_arguments(weight, n)
    threads.run(multiply_task.address, height, n, *arguments, x.data_ptr(), width, y.data_ptr(), tokens)


def weight_arguments(weight: PackedWeight, n: int) -> tuple[int, ...]:
    """The arguments of a task that say what the weight is, of `n` numbers.

    Raises:
        ValueError: a kernel could not read a tensor without leaving its memory.
    """
    packed, scales, levels, blocksize, nested, offset = weight
    check_blocksize(blocksize)
    check_values(levels, 16)
    n_blocks = -(-n // blocksize)
    if (
        packed.numel() < (n + 1) // 2
        or packed.dtype != torch.uint8
        or scales.numel() < n_blocks
        or scales.dtype != (torch.float32 if nested is None else torch.uint8)
        or not (packed.is_contiguous() and scales.is_contiguous() and packed.is_cpu and scales.is_cpu)
    ):
        raise ValueError(
            f"{n} weights in blocks of {blocksize} need {(n + 1) // 2} contiguous bytes and {n_blocks} "
            f"contiguous scales, float32, or uint8 with `nested`, on a CPU; not {packed.numel()} {packed.dtype} "
            f"on {packed.device}, {scales.numel()} {scales.dtype} on {scales.device}"
        )
    if nested is None:
        places = scales.data_ptr(), 0, 0, 0, 0
    else:
        n_nested = -(-n_blocks // 256)
        check_values(offset, 1)
        if nested.numel() < n_nested or not is_readable(nested):
            raise ValueError(
                f"{n_blocks} quantized scales need {n_nested} contiguous float32 scales of their own, not "
                f"{nested.numel()} {nested.dtype}; was the file that they come from cut short?"
            )
        places = 0, scales.data_ptr(), nested.data_ptr(), offset.data_ptr(), dynamic8().data_ptr()
    return n, n_blocks, blocksize, packed.data_ptr(), *places, levels.data_ptr()


def check_blocksize(blocksize: int) -> None:
    """Raise a `ValueError` unless blocks of that size begin at whole bytes."""
    if blocksize < 2 or blocksize % 2:
        raise ValueError(f"blocksize={blocksize} must be a positive even number")


def check_values(tensor: Tensor | None, n: int) -> None:
    """Raise a `ValueError` unless a kernel finds `n` fp32 numbers in `tensor`."""
    if tensor is None or tensor.numel() < n or not is_readable(tensor):
        given = "None" if tensor is None else f"{tensor.numel()} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"a kernel needs {n} contiguous float32 numbers on a CPU, not {given}")


def is_readable(tensor: Tensor) -> bool:
    """Are its numbers fp32, one after the other in the CPU's memory?"""
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.is_cpu


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result on `device`, the CPU.

    A fresh 64 MB costs 20 ms in page faults, more than filling it. numpy asks the system for huge pages,
    which cuts that to about 5; torch does not.
    """
    if n * dtype.itemsize < HUGE_PAGES_FROM:
        return torch.empty(n, dtype=dtype)
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)

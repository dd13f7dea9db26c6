"""The fast path: the operations of `labkit.quant.blockwise`, bit for bit, without reading speed for the student in mind.

`set_fast(False)` turns it off everywhere; the environment variable LABKIT_FAST=0 does so from the start. On a device
without a kernel the readable PyTorch code runs. `cpu.py` has the kernels for a CPU (numba: `tasks.py`, `stores.py`, `lookups.py`, `vectors.py`,
`threads.py`), `triton.py` those for CUDA.

The operations are registered with PyTorch as `labkit::quantize_4bit` and `labkit::dequantize_4bit`, each with a
"fake" version that only says what shape and dtype come out. That is what lets `torch.compile`, which cannot look into
numba or Triton code, put them into its graphs as they are.

Why an ordinary call does not go through the registered operation: PyTorch's way there and back takes about 35 µs, as
long as dequantizing a small layer, and is only needed when someone is tracing.
"""

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from labkit.hardware import fast_paths
from labkit.hardware import set_fast as set_fast  # one switch for these and the other fast paths

_has_triton = importlib.util.find_spec("triton") is not None


def fast_for(tensor: Tensor) -> bool:
    """Is there a fast kernel for the device of `tensor`, and is the fast path on?"""
    return fast_paths() and (tensor.is_cpu or (tensor.is_cuda and _has_triton))


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Nearest level of every value after scaling its block into [-1, 1], two codes to a byte.

    Args:
        flat: (n,) fp32, contiguous.
        levels: (16,) fp32 codebook.
        blocksize: values per block, even.

    Returns:
        packed ((n + 1) // 2, 1) uint8 and absmax (n_blocks,) fp32. A NaN or infinity in a block makes its absmax one.
        See `labkit.quant.blockwise.quantize_blocks` and `pack`.
    """
    if is_traced(flat):
        return torch.ops.labkit.quantize_4bit(flat, levels, blocksize)
    return kernels_for(flat).quantize_4bit(flat, levels, blocksize)


def dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`levels[code] * absmax` of its block in fp32, then rounded to `dtype`.

    Args:
        packed: (n + 1) // 2 bytes.
        scales: (n_blocks,) fp32 absmax; or uint8 codes of it, if `nested` and `offset` say how to dequantize them.
        levels: (16,) fp32 codebook.
        blocksize: values per block, even.
        n: number of values.
        dtype: a floating one.
        nested: (ceil(n_blocks / 256),) fp32 scales of the scales.
        offset: () fp32 mean of the scales.
        out: contiguous tensor of n values of `dtype` to write to, instead of a new one.

    Returns:
        `out`, or (n,) values in `dtype`. See `labkit.quant.blockwise.dequantize_blocks`.
    """
    traced = is_traced(packed)
    if out is None:
        make = torch.ops.labkit.dequantize_4bit if traced else dequantize_to_new
        return make(packed, scales, levels, blocksize, n, dtype, nested, offset)
    write = torch.ops.labkit.dequantize_4bit_out if traced else kernels_for(packed).dequantize_4bit
    write(packed, scales, levels, blocksize, out, nested, offset)
    return out


def quantizes_scales(flat: Tensor) -> bool:
    """Is there a kernel for `quantize_scales` of these?"""
    return fast_paths() and flat.is_cpu and not is_traced(flat)


def quantize_scales(flat: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(n,) fp32 in blocks of 256 to 8-bit codes, (n,) uint8, and fp32 absmax; where `quantizes_scales` says so.

    `levels`: a codebook of 256; by default `dynamic8`. See `labkit.quant.blockwise.quantize_blocks`.
    """
    from labkit.quant.kernels import cpu

    return cpu.quantize_scales(flat.contiguous(), levels)


def multiplies(x: Tensor, width: int) -> bool:
    """Is there a kernel that multiplies these rows of `width` numbers by a 4-bit weight without dequantizing it?"""
    if not fast_paths() or not x.is_cpu or x.dtype != torch.float32 or is_traced(x):
        return False
    from labkit.quant.kernels import cpu

    return cpu.multiplies(width)


def multiply_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    height: int,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`x @ dequantized.T`, from the packed codes; where `multiplies(x, width)` says so, and without gradients.

    The weights are the very numbers that `dequantize_4bit` makes, but the terms of a sum are added in another order
    than by a matrix multiplication, so that results differ in rounding. The order is always the same: a row of the
    result does not depend on the other rows, or on the number of threads.

    Args:
        x: (tokens, width) fp32.
        packed, scales, levels, blocksize, nested, offset: the weight, (height, width); see `dequantize_4bit`.
        height: number of rows of the weight.

    Returns:
        (tokens, height) fp32.
    """
    from labkit.quant.kernels import cpu

    y = torch.empty(x.shape[0], height)
    cpu.multiply_4bit(x.contiguous(), packed, scales, levels, blocksize, y, nested, offset)
    return y


def is_traced(tensor: Tensor) -> bool:
    """Is this call recorded (torch.compile, fake tensors) rather than run on numbers?"""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def kernels_for(tensor: Tensor) -> ModuleType:
    """The module with the kernels for the device of `tensor`."""
    return kernels_on(tensor.is_cuda)


@cache
def kernels_on(cuda: bool) -> ModuleType:
    """The module with the kernels for CUDA, or for a CPU. numba takes a second to import: only when used."""
    if cuda:
        from labkit.quant.kernels import triton

        return triton
    from labkit.quant.kernels import cpu

    return cpu


@torch.library.custom_op("labkit::quantize_4bit", mutates_args=(), device_types=("cpu", "cuda"))
def _quantize_op(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return kernels_for(flat).quantize_4bit(flat.contiguous(), levels, blocksize)


@_quantize_op.register_fake
def _(flat, levels, blocksize):
    n = flat.numel()
    absmax = flat.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    return flat.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), absmax


def dequantize_to_new(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    n: int,
    dtype: torch.dtype,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """`dequantize_4bit` without `out`, on numbers."""
    kernels = kernels_for(packed)
    out = kernels.empty(n, dtype, packed.device)
    kernels.dequantize_4bit(packed, scales, levels, blocksize, out, nested, offset, new=True)
    return out


_dequantize_op = torch.library.custom_op(
    "labkit::dequantize_4bit", dequantize_to_new, mutates_args=(), device_types=("cpu", "cuda")
)


@_dequantize_op.register_fake
def _(packed, scales, levels, blocksize, n, dtype, nested=None, offset=None):
    return packed.new_empty(n, dtype=dtype)


@torch.library.custom_op("labkit::dequantize_4bit_out", mutates_args=("out",), device_types=("cpu", "cuda"))
def _dequantize_out_op(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    out: Tensor,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    kernels_for(packed).dequantize_4bit(packed, scales, levels, blocksize, out, nested, offset)


@_dequantize_out_op.register_fake
def _(packed, scales, levels, blocksize, out, nested=None, offset=None):
    return None

"""The four calls that have kernels, and three of them as operations that PyTorch can trace.

`labkit::quantize_4bit`, `labkit::dequantize_4bit` and `labkit::dequantize_4bit_out` are registered with
PyTorch, each with a "fake" version that only says what shape and dtype come out. That is what lets
`torch.compile`, which cannot look into numba or Triton code, put them into its graphs as they are. An
operation takes tensors and numbers only, so a `PackedWeight` is taken apart at its boundary.

Why an ordinary call does not go through the registered operation: PyTorch's way there and back takes about 35
µs, as long as dequantizing a small layer, and is only needed when the call is traced.
"""

import torch
from torch import Tensor

from labkit.quant.kernels.dispatch import is_traced, kernels_on
from labkit.quant.kernels.packed import PackedWeight


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The nearest level of every value after its block is scaled into [-1, 1], two codes per byte.

    Args:
        flat: (n,) fp32, contiguous; a GPU reads fp16 and bf16 as they are, with the codes of their fp32 values.
        levels: (16,) fp32 codebook.
        blocksize: values per block, even.

    Returns:
        packed ((n + 1) // 2, 1) uint8 and absmax (n_blocks,) fp32, which is NaN or infinite if a value of the
        block is. See `labkit.quant.blockwise.quantize_blocks` and `pack`.
    """
    if is_traced(flat):
        return torch.ops.labkit.quantize_4bit(flat, levels, blocksize)
    return kernels_on(flat.is_cuda).quantize_4bit(flat, levels, blocksize)


def dequantize_4bit(
    weight: PackedWeight, n: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """`levels[code] * absmax` of its block in fp32, then rounded to `dtype`.

    Args:
        weight: of n values.
        n: number of values.
        dtype: a floating dtype.
        out: contiguous tensor of n values of `dtype` to write to, instead of a new one.

    Returns:
        `out`, or (n,) values in `dtype`. See `labkit.quant.blockwise.dequantize_blocks`.
    """
    if is_traced(weight.packed):
        packed, scales, levels, blocksize, nested, offset = weight
        if out is None:
            return torch.ops.labkit.dequantize_4bit(
                packed, scales, levels, blocksize, n, dtype, nested, offset
            )
        torch.ops.labkit.dequantize_4bit_out(packed, scales, levels, blocksize, out, nested, offset)
        return out
    if out is None:
        return dequantize_to_new(weight, n, dtype)
    kernels_on(weight.packed.is_cuda).dequantize_4bit(weight, out)
    return out


def dequantize_to_new(weight: PackedWeight, n: int, dtype: torch.dtype) -> Tensor:
    """`dequantize_4bit` without `out`, on numbers."""
    kernels = kernels_on(weight.packed.is_cuda)
    out = kernels.empty(n, dtype, weight.packed.device)
    kernels.dequantize_4bit(weight, out, new=True)
    return out


def quantize_scales(flat: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize (n,) fp32 scales to 8-bit codes, (n,) uint8, and fp32 absmax, in blocks of 256.

    Only where `quantizes_scales` allows it. `levels`: a codebook of 256 levels; by default `dynamic8`. See
    `labkit.quant.blockwise.quantize_blocks`.
    """
    return kernels_on(flat.is_cuda).quantize_scales(flat.contiguous(), levels)


def multiply_4bit(x: Tensor, weight: PackedWeight, height: int) -> Tensor:
    """`x @ dequantized.T`, from the packed codes and without gradients, where `multiplies` allows it.

    The weights are the very numbers that `dequantize_4bit` makes, but the terms of a sum are added in another
    order than in a matrix multiplication, so results differ in rounding. The order is always the same: a row
    of the result depends neither on the other rows nor on the number of threads.

    Args:
        x: (tokens, width) fp32; on a GPU also bf16 or fp16, to which the weights are then rounded. Sums are in fp32.
        weight: of (height, width).
        height: number of rows of the weight.

    Returns:
        (tokens, height) in the dtype of x.
    """
    y = torch.empty(x.shape[0], height, dtype=x.dtype, device=x.device)
    kernels_on(x.is_cuda).multiply_4bit(x.contiguous(), weight, y)
    return y


@torch.library.custom_op("labkit::quantize_4bit", mutates_args=(), device_types=("cpu", "cuda"))
def _quantize_op(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return kernels_on(flat.is_cuda).quantize_4bit(flat.contiguous(), levels, blocksize)


@_quantize_op.register_fake
def _(flat, levels, blocksize):
    n = flat.numel()
    absmax = flat.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)
    return flat.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), absmax


@torch.library.custom_op("labkit::dequantize_4bit", mutates_args=(), device_types=("cpu", "cuda"))
def _dequantize_op(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    n: int,
    dtype: torch.dtype,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return dequantize_to_new(PackedWeight(packed, scales, levels, blocksize, nested, offset), n, dtype)


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
    weight = PackedWeight(packed, scales, levels, blocksize, nested, offset)
    kernels_on(packed.is_cuda).dequantize_4bit(weight, out)


@_dequantize_out_op.register_fake
def _(packed, scales, levels, blocksize, out, nested=None, offset=None):
    return None

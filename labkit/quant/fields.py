"""What the fields of a 4-bit weight must be, checked when it is made.

The kernels read memory by address: a block size of -64, a shape that is too large, or bytes that are not where
they seem would have them read, or write, what belongs to others.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from labkit.checks import check_choice, is_whole
from labkit.quant.blockwise import NESTED_BLOCKSIZE
from labkit.quant.config import BLOCKSIZES, check_codebook

if TYPE_CHECKING:
    from labkit.quant.tensor import QuantizedTensor


def check_fields(weight: "QuantizedTensor", nested: bool) -> None:
    """Check a 4-bit weight; its `shape` becomes a `torch.Size`, if it is another sequence.

    Raises:
        ValueError: a value is not allowed, or a tensor does not hold what the shape and the block size ask for.
        TypeError: what should be a tensor or a dtype is none.
    """
    shape = weight.shape
    if not isinstance(shape, (tuple, list)) or not shape or not all(is_whole(size) for size in shape):
        raise ValueError(f"shape={shape!r} must be the sizes of a weight, whole numbers of at least 1")
    object.__setattr__(weight, "shape", torch.Size(map(int, shape)))
    check_dtype("dtype", weight.dtype)
    check_codebook(weight.codebook)
    check_choice("blocksize", weight.blocksize, BLOCKSIZES)
    n = weight.shape.numel()
    n_blocks = -(-n // weight.blocksize)
    check_tensor("packed", weight.packed, torch.uint8, (-(-n // 2), 1), weight)
    if not nested:
        check_tensor("scales", weight.scales, torch.float32, (n_blocks,), weight)
        return
    scales = weight.scales
    check_tensor("scales.codes", scales.codes, torch.uint8, (n_blocks,), weight)
    check_tensor("scales.absmax", scales.absmax, torch.float32, (-(-n_blocks // NESTED_BLOCKSIZE),), weight)
    check_tensor("scales.offset", scales.offset, torch.float32, (), weight)


def check_dtype(name: str, dtype: object) -> None:
    """Raise a `TypeError` unless a weight can be dequantized to `dtype`."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"{name}={dtype!r}: weights cannot be dequantized to it; choose torch.float32, torch.bfloat16 or "
            "torch.float16"
        )


def check_tensor(
    name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], weight: "QuantizedTensor"
) -> None:
    """Raise unless `tensor` is a contiguous tensor of that dtype and shape, on the device of the packed weight."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.layout != torch.strided
        or tensor.is_neg()
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; {weight.shape.numel()} weights in blocks of "
            f"{weight.blocksize} need a contiguous, dense {tuple(shape)} {dtype}. Were they cut short?"
        )
    if tensor.device != weight.packed.device:
        raise ValueError(
            f"{name} is on {tensor.device}, and the packed weight on {weight.packed.device}; move both with "
            ".to(device)"
        )

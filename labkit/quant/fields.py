"""What the fields of a 4-bit weight must be, checked when it is made.

The kernels read memory by address: a block size of -64, a shape that is too large, or bytes that are not where
they seem would have them read, or write, what belongs to others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from labkit.checks import check_choice, is_whole
from labkit.quant.blockwise import NESTED_BLOCKSIZE
from labkit.quant.config import BLOCKSIZES, check_codebook


def check_fields(
    packed: Tensor, scales: Mapping[str, Tensor], shape: object, dtype: object, codebook: str, blocksize: int
) -> torch.Size:
    """Check the fields of a 4-bit weight.

    Args:
        packed: its bytes.
        scales: its scales by name: "scales", or "scales.codes", "scales.absmax" and "scales.offset".
        shape, dtype, codebook, blocksize: see `labkit.QuantizedTensor`.

    Returns:
        The shape.

    Raises:
        ValueError: a value is not allowed, or a tensor does not hold what the shape and the block size ask for.
        TypeError: what should be a tensor or a dtype is none.
    """
    if not isinstance(shape, (tuple, list)) or not shape or not all(map(is_whole, shape)):
        raise ValueError(f"shape={shape!r} must be the sizes of a weight, whole numbers of at least 1")
    size = torch.Size(map(int, shape))
    check_dtype("dtype", dtype)
    check_codebook(codebook)
    check_choice("blocksize", blocksize, BLOCKSIZES)
    n = size.numel()
    n_blocks = -(-n // blocksize)
    need = f"{n} weights in blocks of {blocksize} need"
    check_tensor("packed", packed, torch.uint8, (-(-n // 2), 1), need)
    wanted = {
        "scales": (torch.float32, (n_blocks,)),
        "scales.codes": (torch.uint8, (n_blocks,)),
        "scales.absmax": (torch.float32, (-(-n_blocks // NESTED_BLOCKSIZE),)),
        "scales.offset": (torch.float32, ()),
    }
    for name, tensor in scales.items():
        check_tensor(name, tensor, *wanted[name], need)
        if tensor.device != packed.device:
            raise ValueError(
                f"{name} is on {tensor.device}, and the packed weight on {packed.device}; move both with .to(device)"
            )
    return size


def check_dtype(name: str, dtype: object) -> None:
    """Raise a `TypeError` unless a weight can be dequantized to `dtype`."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"{name}={dtype!r}: weights cannot be dequantized to it; choose torch.float32, torch.bfloat16 or "
            "torch.float16"
        )


def check_tensor(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], need: str) -> None:
    """Raise unless `tensor` is a contiguous, dense tensor of that dtype and shape; `need` begins to say why."""
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
            f"{name} is {tuple(tensor.shape)} {tensor.dtype}; {need} a contiguous, dense {tuple(shape)} {dtype}. Were "
            "they cut short?"
        )

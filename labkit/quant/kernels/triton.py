"""The four-bit kernels for CUDA: checks, constants on the device, and how many programs run; `triton_programs.py` has these.

Without a GPU, TRITON_INTERPRET=1 runs the same code on a CPU, slowly, and Triton compiles it for a card that is not
there; the tests do both.

Agrees, bit for bit, with: `labkit.quant.blockwise.quantize_blocks` and `dequantize_blocks`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from labkit.quant.codebooks import dynamic8, search_tables
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.kernels.triton_programs import dequantize, multiply, quantize

WORDS, WARPS = 1024, 8  # of a program that dequantizes
WEIGHTS = 2048  # that a program quantizes, or one larger block
TOKENS = 8  # rows of x that share one look at the weight
READ = torch.float32, torch.bfloat16, torch.float16  # dtypes that the programs read and write
SMALLEST = 1e-38  # `labkit.quant.blockwise.SMALLEST_ABSMAX`


@lru_cache(maxsize=256)
def _kept_tables(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.inference_mode(False):  # a tensor made within it could never be used outside
        on_cpu = torch.tensor(levels, dtype=torch.float32)
        mids, by_rank = search_tables(on_cpu)
        rising = by_rank.tolist() == list(range(len(levels)))
        return on_cpu.to(device), mids.to(device), None if rising else by_rank.to(device)


def tables_on(device: torch.device, levels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """On a device: the levels, the thresholds between them, and their codes by rank (None if they rise)."""
    return _kept_tables(tuple(levels.tolist()), device)


@lru_cache(maxsize=64)
def scale_levels_on(device: torch.device) -> Tensor:
    """`dynamic8` on a device."""
    return tables_on(device, dynamic8())[0]


def launch(
    kernel: triton.JITFunction, programs: int, *arguments: Any, num_warps: int, **constants: int
) -> None:
    """Run a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


def multiplies(width: int) -> bool:
    """Is there a kernel that multiplies rows of `width` numbers?"""
    return width % 8 == 0


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.operations.quantize_4bit`; `flat` may be in fp16 or bf16, too."""
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    return packed, quantize_to(packed, flat, levels, blocksize)


def quantize_scales(flat: Tensor, levels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.operations.quantize_scales`."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    return codes, quantize_to(codes, flat, dynamic8() if levels is None else levels, 256)


def quantize_to(codes: Tensor, flat: Tensor, levels: Tensor, blocksize: int) -> Tensor:
    """Write the codes of `flat` in 16 or 256 levels to `codes`; the absmax of its blocks."""
    check_blocksize(blocksize)
    n = flat.numel()
    if flat.dtype not in READ or not flat.is_contiguous() or levels.numel() not in (16, 256):
        raise ValueError(
            f"a kernel needs contiguous float32, bfloat16 or float16 numbers and 16 or 256 levels, not {flat.dtype}, "
            f"contiguous={flat.is_contiguous()}, and {levels.numel()} levels"
        )
    _, mids, by_rank = tables_on(flat.device, levels)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    blocks = max(1, WEIGHTS // blocksize)
    constants = {"LEVELS": levels.numel(), "BLOCKSIZE": blocksize, "BLOCKS": blocks}
    programs = -(-n // (blocks * blocksize))
    launch(quantize, programs, flat, mids, by_rank, codes, absmax, n, SMALLEST, **constants, num_warps=4)
    return absmax


def dequantize_4bit(weight: PackedWeight, out: Tensor, new: bool = False) -> None:
    """See `labkit.quant.kernels.operations.dequantize_4bit`; writes to `out`, contiguous, `new` or not."""
    if out.dtype not in READ:
        whole = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        dequantize_4bit(weight, whole)
        out.copy_(whole)
        return
    n = out.numel()
    packed, scales, levels, *nested = arguments_of(weight, n)
    programs, constants = -(-n // (8 * WORDS)), {"BLOCKSIZE": weight.blocksize, "WORDS": WORDS}
    launch(dequantize, programs, packed, scales, levels, out, *nested, n, **constants, num_warps=WARPS)


def multiply_4bit(x: Tensor, weight: PackedWeight, y: Tensor) -> None:
    """See `labkit.quant.kernels.operations.multiply_4bit`; x and y, (tokens, height), are contiguous."""
    (tokens, width), height = x.shape, y.shape[1]
    if not multiplies(width) or x.dtype not in READ or y.dtype != x.dtype:
        raise ValueError(
            f"no kernel multiplies rows of {width} numbers in {x.dtype}; the width must be a multiple of 8, and the "
            "dtype float32, bfloat16 or float16"
        )
    if tokens > TOKENS:
        for some, to in zip(x.split(TOKENS), y.split(TOKENS)):
            multiply_4bit(some, weight, to)
        return
    constants = {"BLOCKSIZE": weight.blocksize, "TOKENS": 1 << (tokens - 1).bit_length()}
    packed, scales, levels, *nested = arguments_of(weight, width * height)
    sizes = width, height, tokens
    launch(multiply, height, x, packed, scales, levels, y, *nested, *sizes, **constants, num_warps=1)


def arguments_of(weight: PackedWeight, n: int) -> tuple[Tensor | None, ...]:
    """The packed bytes, scales, levels, nested scales, offset and levels of scales, for a kernel that reads n weights.

    Raises:
        ValueError: a kernel could not read a tensor without leaving its memory.
    """
    packed, scales, levels, blocksize, nested, offset = weight
    check_blocksize(blocksize)
    n_blocks = -(-n // blocksize)
    wanted = [(packed, torch.uint8, (n + 1) // 2), (levels, torch.float32, 16)]
    if nested is None:
        wanted += [(scales, torch.float32, n_blocks)]
    else:
        wanted += [(scales, torch.uint8, n_blocks), (nested, torch.float32, -(-n_blocks // 256))]
        wanted += [(offset, torch.float32, 1)]
    for tensor, dtype, count in wanted:
        if tensor is None or tensor.dtype != dtype or tensor.numel() < count or not tensor.is_contiguous():
            given = "None" if tensor is None else f"{tensor.numel()} {tensor.dtype}"
            raise ValueError(f"a kernel that reads {n} weights needs {count} contiguous {dtype}, not {given}")
    if packed.data_ptr() % 4:  # a view into other bytes: it is read in words
        packed = packed.clone()
    levels = tables_on(packed.device, levels)[0]
    return packed, scales, levels, nested, offset, None if nested is None else scale_levels_on(packed.device)


def check_blocksize(blocksize: int) -> None:
    """Raise a `ValueError` unless blocks of that size are whole words, and fit into a program."""
    if not (8 <= blocksize <= 8 * WORDS and blocksize & (blocksize - 1) == 0):
        raise ValueError(
            f"blocksize={blocksize}: a kernel needs a positive even number, a power of two from 8 to {8 * WORDS}"
        )


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result."""
    return torch.empty(n, dtype=dtype, device=device)

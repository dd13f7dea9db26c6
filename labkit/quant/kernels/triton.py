"""Four-bit quantize and dequantize for CUDA, in Triton.

To dequantize, each program takes a run of packed bytes, looks up the two levels of each, multiplies by the
scales of their blocks (made from 8-bit codes first, if they are double-quantized) and writes twice as many
values, interleaved. To quantize, each program takes one block: its largest magnitude, then fifteen
comparisons per weight.

Three things that a GPU does by default would change bits. Division is approximate: `div_rn` rounds like the
reference. A product and a sum fuse into one instruction with one rounding: `enable_fp_fusion=False`. And a
floating-point maximum drops NaN: the maximum here is of integers, as on the CPU.

Without a GPU, TRITON_INTERPRET=1 runs the same code on a CPU, slowly; the tests do.

Agrees, bit for bit, with: `labkit.quant.blockwise.quantize_blocks` and `dequantize_blocks`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.quant.codebooks import dynamic8, search_tables
from labkit.quant.kernels.packed import PackedWeight

BYTES_PER_PROGRAM = 1024


@triton.jit
def _scaled(x, floor, is_whole):
    # bitsandbytes multiplies by the reciprocal in a whole block and divides in the incomplete last one
    return tl.where(is_whole, x * tl.div_rn(1.0, floor), tl.div_rn(x, floor))


@triton.jit
def _quantize(flat, mids, by_rank, packed, absmax, n, smallest, BLOCKSIZE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCKSIZE
    pair = tl.arange(0, BLOCKSIZE // 2)
    left, right = start + 2 * pair, start + 2 * pair + 1  # (BLOCKSIZE / 2,) each: high and low half of a byte
    x = tl.load(flat + left, mask=left < n, other=0.0)
    y = tl.load(flat + right, mask=right < n, other=0.0)
    x_bits, y_bits = x.to(tl.int32, bitcast=True), y.to(tl.int32, bitcast=True)
    magnitudes = tl.maximum(x_bits & 0x7FFFFFFF, y_bits & 0x7FFFFFFF)
    largest = tl.max(magnitudes, axis=0).to(tl.float32, bitcast=True)
    floor = tl.where(largest < smallest, smallest, largest)
    is_whole = start + BLOCKSIZE <= n
    tl.store(absmax + block, tl.where(is_whole, largest, floor))
    x, y = _scaled(x, floor, is_whole), _scaled(y, floor, is_whole)
    high, low = tl.zeros_like(left).to(tl.int32), tl.zeros_like(left).to(tl.int32)
    for k in tl.static_range(15):
        mid = tl.load(mids + k)
        high += (x > mid).to(tl.int32)
        low += (y > mid).to(tl.int32)
    high, low = tl.load(by_rank + high), tl.load(by_rank + low)
    tl.store(packed + start // 2 + pair, (high << 4) | low, mask=left < n)


@triton.jit
def _dequantize(
    packed,
    scales,
    levels,
    out,
    nested,
    offset,
    scale_levels,
    n,
    blocksize,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BYTES
    index = first + tl.arange(0, BYTES)  # (BYTES,)
    inside = 2 * index < n
    byte = tl.load(packed + index, mask=inside, other=0).to(tl.int32)
    block = 2 * index // blocksize  # blocks are even, so both weights of a byte share one
    if NESTED:
        code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        factor = tl.load(nested + block // 256, mask=inside, other=0.0)
        scale = tl.load(scale_levels + code) * factor + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    high, low = tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale
    to = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + to, tl.interleave(high, low), mask=to < n)


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `labkit.quant.kernels.operations.quantize_4bit`."""
    n, device = flat.numel(), flat.device
    n_blocks = triton.cdiv(n, blocksize)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(n_blocks, device=device)
    mids, by_rank = (table.to(device) for table in search_tables(levels))
    _quantize[(n_blocks,)](
        flat, mids, by_rank, packed, absmax, n, 1e-38, BLOCKSIZE=blocksize, enable_fp_fusion=False
    )
    return packed, absmax


def dequantize_4bit(weight: PackedWeight, out: Tensor, new: bool = False) -> None:
    """See `labkit.quant.kernels.operations.dequantize_4bit`; writes to `out`, contiguous, `new` or not."""
    packed, scales, levels, blocksize, nested, offset = weight
    n, device = out.numel(), out.device
    is_nested = nested is not None
    extra = (nested, offset, dynamic8().to(device)) if is_nested else (scales, scales, scales)
    grid = (triton.cdiv((n + 1) // 2, BYTES_PER_PROGRAM),)
    arguments = packed, scales, levels.to(device), out, *extra, n, blocksize, is_nested, BYTES_PER_PROGRAM
    _dequantize[grid](*arguments, enable_fp_fusion=False)


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result."""
    return torch.empty(n, dtype=dtype, device=device)

"""The CUDA kernels in Triton's interpreter against the reference: a script, because the interpreter is chosen at import."""

import itertools
import sys

import numpy as np
import torch
from triton.runtime import interpreter

from labkit.quant.blockwise import (
    NESTED_BLOCKSIZE,
    dequantize_blocks,
    multiply_in_order,
    pack,
    quantize_blocks,
    unpack,
)
from labkit.quant.codebooks import codebook, codes_by_rank, dynamic8
from labkit.quant.kernels import triton
from labkit.quant.kernels.packed import PackedWeight

DTYPES = torch.float32, torch.float16, torch.bfloat16
QUANTIZED = [(1, 64), (7, 32), (65, 64), (560, 4096), (2049, 256), (4160, 64), (8200, 32)]  # n, blocksize
MULTIPLIED = [(3, 8, 1, 32), (5, 72, 3, 64), (2, 256, 8, 256), (3, 264, 2, 32), (2, 1096, 9, 64)]

_own_conversion, _own_tensors = interpreter._convert_float, interpreter._patch_lang_tensor


def convert(values, source, target, rounding):
    """PyTorch's conversion of bf16: the interpreter truncates where a GPU rounds, and has no subnormal numbers."""
    values = torch.from_numpy(np.ascontiguousarray(values))
    if (source.name, target.name) == ("fp32", "bf16"):
        return values.to(torch.bfloat16).view(torch.uint16).numpy()
    if (source.name, target.name) == ("bf16", "fp32"):
        return values.view(torch.bfloat16).float().numpy()
    return _own_conversion(values.numpy(), source, target, rounding)


def patch_tensors(tensor, *rest):
    """What Triton does; 3.6 also makes an int of an array with one number, which numpy no longer allows."""
    _own_tensors(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())


def same(ours, theirs):
    """Equal bits in every tensor?"""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )


def difficult(n, scale):
    """Numbers with ties, a block of zeros, zeros with a sign, and, at a scale of 1e-39, subnormal ones."""
    flat = torch.randn(n) * scale
    flat[: n // 3] = (flat[: n // 3] * 8).round() / 8
    flat[n // 2 : n // 2 + 64] = 0
    flat[n // 2 : n // 2 + 8] = -0.0
    return flat


def weights_of(flat, levels, blocksize):
    """The weight by the reference, with plain scales and with quantized ones."""
    codes, absmax = quantize_blocks(flat, levels, blocksize)
    packed, offset = pack(codes, pad=int(codes_by_rank(levels)[7])), absmax.mean()
    scales, nested = quantize_blocks(absmax - offset, dynamic8(), NESTED_BLOCKSIZE)
    plain = PackedWeight(packed, absmax, levels, blocksize)
    return plain, PackedWeight(packed, scales, levels, blocksize, nested, offset)


def dequantized(weight, n):
    """fp32 values by the reference."""
    packed, absmax, levels, blocksize, nested, offset = weight
    if nested is not None:
        absmax = dequantize_blocks(absmax, nested, dynamic8(), NESTED_BLOCKSIZE) + offset
    return dequantize_blocks(unpack(packed, n), absmax, levels, blocksize)


def check_quantizing(n, blocksize, name, dtype, scale):
    """Quantize, quantize the scales, and dequantize both."""
    flat, levels = difficult(n, scale).to(dtype), codebook(name)
    plain, nested = weights_of(flat.float(), levels, blocksize)
    assert same(triton.quantize_4bit(flat, levels, blocksize), plain[:2])
    if blocksize == 32:  # the most scales
        assert same(triton.quantize_scales(plain.scales - nested.offset), (nested.scales, nested.nested))
    for weight in (plain, nested):
        out = torch.empty(n, dtype=dtype)
        triton.dequantize_4bit(weight, out)
        assert same([out], [dequantized(weight, n).to(dtype)])


def check_multiplying(height, width, tokens, blocksize, dtype):
    """Multiply by both kinds of a weight; a row by itself gives the same."""
    for weight in weights_of(torch.randn(height * width), codebook("nf4"), blocksize):
        x, y = torch.randn(tokens, width).to(dtype), torch.empty(tokens, height, dtype=dtype)
        triton.multiply_4bit(x, weight, y)
        matrix = dequantized(weight, height * width).view(height, width).to(dtype)
        assert same([y], [multiply_in_order(x, matrix)])
        last = torch.empty(1, height, dtype=dtype)
        triton.multiply_4bit(x[-1:], weight, last)
        assert same([y[-1:]], [last])


if __name__ == "__main__":
    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch_tensors
    torch.manual_seed(0)
    few = sys.argv[1:] == ["--few"]
    others = itertools.cycle(itertools.product(("nf4", "fp4"), DTYPES, (1.0, 1e-39)))
    for (n, blocksize), _ in itertools.product(QUANTIZED, range(1 if few else 3)):
        check_quantizing(n, blocksize, *next(others))
    for sizes, dtype in itertools.product(MULTIPLIED[:2] if few else MULTIPLIED, DTYPES):
        check_multiplying(*sizes, dtype)
    for bad in (float("nan"), float("inf"), float("-inf")):
        flat = torch.randn(70)
        flat[69] = bad
        assert not triton.quantize_4bit(flat, codebook("nf4"), 64)[1].isfinite().all()
    print("equal bits")

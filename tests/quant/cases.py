"""What the tests of `labkit.quant` compare with, and what they have in common."""

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import nn

from labkit.quant.blockwise import dequantize_blocks, pack, quantize_blocks
from labkit.quant.codebooks import nf4
from labkit.quant.kernels import cpu, threads
from labkit.quant.linear import QuantLinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bnb_quantize(weight, codebook="nf4", blocksize=64, double_quant=True):
    return bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=codebook, compress_statistics=double_quant
    )


def bnb_generic_dequantize(packed, state):
    """bitsandbytes' generic code, without compiling it."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    n = state.shape.numel()
    compute = _dequantize_4bit_compute.__wrapped__
    flat = compute(packed.view(-1), absmax, state.code, state.blocksize, torch.Size((n,)), state.dtype)
    return flat.view(state.shape)


def bnb_dequantize(packed, state):
    """What bitsandbytes returns, except for shapes on which its AVX-512 path is wrong or it compiles code.

    FP4 has two zeros, codes 0 and 8. Its table and its AVX-512 path say +0 for both; on other processors code
    8 gives -0.
    """
    width = state.shape[-1]
    if width % state.blocksize or state.blocksize >= 2048:
        return bnb_generic_dequantize(packed, state)
    values = bnb.dequantize_4bit(packed, state).view(state.shape)
    return values + 0.0 if state.quant_type == "fp4" else values


def generic_quantize_blockwise(values, levels):
    """bitsandbytes' generic 8-bit code, the rounding of its CUDA kernel, which its CPU kernel hides."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(key, values, levels, 256)


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.contiguous().view(integer), theirs.contiguous().view(integer))


IDS = torch.arange(40).view(2, 20)


def make_layer(out=80, width=96, bias=True, seed=0, **settings):
    torch.manual_seed(seed)
    return QuantLinear.from_linear(nn.Linear(width, out, bias), **settings)


directly = pytest.mark.skipif(cpu.LANES == 0, reason="no kernel that multiplies for this processor")


LARGE = threads.SERIAL_BELOW  # weights: the size from which threads share the work


def reference(flat, blocksize=64):
    codes, absmax = quantize_blocks(flat, nf4(), blocksize)
    return pack(codes), absmax, dequantize_blocks(codes, absmax, nf4(), blocksize)

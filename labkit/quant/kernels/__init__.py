"""The fast path of `labkit.quant`: the same calls, bit for bit, written for speed rather than for reading.

`labkit.hardware.set_fast(False)` turns it off, as LABKIT_FAST=0 does from the start. On a device without a
kernel, the readable PyTorch code runs.

    operations.py    the calls, and their registration with PyTorch
    dispatch.py      which implementation runs
    packed.py        a weight as kernels take it
    cpu.py           kernels for a CPU, compiled by numba: quantizing.py, dequantizing.py, multiplying.py
    threads.py       the threads that they run on
    kept.py          what was compiled, for the next process
    vectors.py       what numba cannot say in Python; lookups.py and stores.py build on it
    triton.py        kernels for CUDA; triton_programs.py is what the GPU runs
"""

from labkit.quant.kernels.dispatch import fast_for, multiplies, quantizes_scales
from labkit.quant.kernels.operations import dequantize_4bit, multiply_4bit, quantize_4bit, quantize_scales
from labkit.quant.kernels.packed import PackedWeight

__all__ = [
    "PackedWeight",
    "dequantize_4bit",
    "fast_for",
    "multiplies",
    "multiply_4bit",
    "quantize_4bit",
    "quantize_scales",
    "quantizes_scales",
]

"""The CUDA kernels: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from labkit.quant.config import BLOCKSIZES
from labkit.quant.tensor import quantize

INTERPRETED = """
import sys, torch
from labkit.quant.codebooks import codebook
from labkit.quant.kernels import cpu, triton
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.tensor import quantize_scales

def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

torch.manual_seed(0)
cases = 0
for n in (1, 65, 560):
    for name in ("nf4", "fp4"):
        for blocksize in (64, 4096):
            for scale in (1.0, 1e-39):
                flat, levels = torch.randn(n) * scale, codebook(name)
                flat[: n // 3] = (flat[: n // 3] * 8).round() / 8
                flat[n // 2 : n // 2 + 64] = 0
                packed, absmax = triton.quantize_4bit(flat, levels, blocksize)
                expected = cpu.quantize_4bit(flat, levels, blocksize)
                assert same(packed, expected[0]) and same(absmax, expected[1]), (n, name, blocksize, scale)
                s = quantize_scales(absmax)
                nested = PackedWeight(packed, s.codes, levels, blocksize, s.absmax, s.offset)
                for weight in (PackedWeight(packed, absmax, levels, blocksize), nested):
                    for dtype in (torch.float32, torch.float16):
                        ours, theirs = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
                        triton.dequantize_4bit(weight, ours)
                        cpu.dequantize_4bit(weight, theirs)
                        assert same(ours, theirs), (n, name, blocksize, scale, dtype)
                        cases += 1
for bad in (float("nan"), float("inf")):
    flat = torch.randn(70)
    flat[69] = bad
    assert not triton.quantize_4bit(flat, codebook("nf4"), 64)[1].isfinite().all()
print(cases)
"""


def test_triton_kernels_in_the_interpreter_equal_the_cpu_kernels():
    # not bfloat16: the interpreter truncates where a GPU rounds; the GPU test has it
    pytest.importorskip("triton", reason="Triton is not installed: the CUDA kernels are NOT tested")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 3 * 2 * 2 * 2 * 2 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "optimal-64"])
def test_cuda_kernels_equal_the_cpu_bits(codebook):
    for shape in [(1,), (65,), (7, 80), (1000, 1001), (4096, 1024)]:
        for blocksize in BLOCKSIZES:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                weight = torch.randn(shape).to(dtype)
                expected = quantize(weight, codebook, blocksize, double_quant=False)
                got = quantize(weight.cuda(), codebook, blocksize, double_quant=False)
                assert torch.equal(got.packed.cpu(), expected.packed)
                assert torch.equal(got.scales.cpu(), expected.scales)
                nested = quantize(weight, codebook, blocksize)
                assert torch.equal(got.dequantize().cpu(), expected.dequantize())
                assert torch.equal(nested.to("cuda").dequantize().cpu(), nested.dequantize())

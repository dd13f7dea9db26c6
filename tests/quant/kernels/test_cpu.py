"""The CPU kernels: the reference's bits for any size, dtype and processor, and products without a
dequantized weight.
"""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant.blockwise import quantize_blocks, unpack
from labkit.quant.codebooks import dynamic8, midpoints, nf4
from labkit.quant.config import BLOCKSIZES
from labkit.quant.kernels import cpu, operations, tasks
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.tensor import quantize
from tests.quant.cases import (
    LARGE,
    directly,
    reference,
)


def test_unpack_of_the_kernel_output_is_the_reference_codes():
    flat = torch.randn(999)
    packed, absmax = operations.quantize_4bit(flat, nf4(), 32)
    codes, expected = quantize_blocks(flat, nf4(), 32)
    assert torch.equal(unpack(packed, 999), codes) and torch.equal(absmax, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocksize", [32, 48, 64, 4096])
def test_results_written_past_the_caches_have_the_reference_bits(dtype, blocksize, two_threads, monkeypatch):
    n = LARGE + 64 * 3 + 7
    packed, absmax, values = reference(torch.randn(n), blocksize)
    values = values.to(dtype)
    monkeypatch.setattr(cpu, "STREAMED_FROM", 0)
    memory = torch.zeros(n + 16, dtype=dtype)
    assert memory.data_ptr() % 64 == 0
    for start in (0, 1, 8, 16):  # where a vector may, and may not, be stored that way
        out = memory.zero_()[start : start + n]
        operations.dequantize_4bit(PackedWeight(packed, absmax, nf4(), blocksize), n, dtype, out=out)
        assert torch.equal(out.view(torch.uint8), values.view(torch.uint8))
        assert not memory[:start].any() and not memory[start + n :].any()


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 511, 5184, 66_000])
@pytest.mark.parametrize("size", [1.0, 1e-39, 1e30])
def test_scales_are_quantized_to_the_reference_bits(n, size, two_threads, threading_by):
    flat = torch.randn(n) * size
    flat[: n // 3] = (flat[: n // 3] * 16 / size).round() / 16 * size  # some that fall on a midpoint
    flat[n // 2 : n // 2 + 300] = 0
    flat[n - n // 4 :] = dynamic8()[torch.arange(n // 4) % 256] * size
    codes, absmax = quantize_blocks(flat, dynamic8(), 256)
    got = operations.quantize_scales(flat)
    assert torch.equal(got[0], codes) and torch.equal(got[1], absmax)


def test_scales_on_and_beside_every_midpoint_get_the_reference_codes():
    middle = midpoints(dynamic8())
    infinity = torch.tensor(torch.inf)
    values = torch.cat(
        [middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity), dynamic8()]
    )
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    # absmax 1: values stay as they are
    flat = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1).view(-1)
    codes, _ = quantize_blocks(flat, dynamic8(), 256)
    assert torch.equal(operations.quantize_scales(flat)[0], codes)


@directly
@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 18),
    height=st.integers(1, 40),
    steps=st.integers(1, 12),
    codebook=st.sampled_from(["nf4", "fp4", "int4", "optimal-64"]),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 9),
)
def test_product_equals_that_with_the_dequantized_weight(
    tokens, height, steps, codebook, blocksize, double_quant, seed
):
    torch.manual_seed(seed)
    width = steps * tasks.STEP  # blocks end within rows, with them, or reach over several
    q = quantize(torch.randn(height, width), codebook, blocksize, double_quant)
    x = torch.randn(tokens, width)
    exact = x.double() @ q.dequantize().double().T
    # the bound of a sum of `width` products in fp32, whatever the order
    bound = 2**-23 * width * (x.abs().double() @ q.dequantize().abs().double().T)
    assert ((q.multiply(x).double() - exact).abs() <= bound).all()


@directly
def test_product_does_not_depend_on_threads_or_on_other_rows(threading_by):
    q = quantize(torch.randn(600, 512))
    x = torch.randn(11, 512)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results += [
                q.multiply(x),
                torch.cat([q.multiply(row[None]) for row in x]),
                q.multiply(x.flip(0)).flip(0),
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@directly
def test_product_in_many_threads_at_once(two_threads, threading_by):
    q, x = quantize(torch.randn(512, 512)), torch.randn(3, 512)
    expected, failures = q.multiply(x), []

    def work():
        failures.extend(not torch.equal(q.multiply(x), expected) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(failures) == 200 and not any(failures)


def test_kernels_refuse_what_they_could_not_read():
    packed, absmax = operations.quantize_4bit(torch.randn(256), nf4(), 64)
    for wrong in [
        (packed[:100], absmax),
        (packed, absmax[:3]),
        (packed, absmax.double()),
        (packed, absmax.byte()),
    ]:
        with pytest.raises(ValueError, match="256 weights in blocks of 64 need 128 contiguous bytes"):
            operations.dequantize_4bit(PackedWeight(*wrong, nf4(), 64), 256)
    q = quantize(torch.randn(128, 256))  # 512 scales, with two of their own
    for nested in (q.scales.absmax[:1], q.scales.absmax.double(), torch.ones(4)[::2]):
        with pytest.raises(
            ValueError, match="512 quantized scales need 2 contiguous float32 scales of their own"
        ):
            weight = PackedWeight(q.packed, q.scales.codes, nf4(), 64, nested, q.scales.offset)
            operations.dequantize_4bit(weight, 128 * 256)


ALL_SHAPES = """
import torch
from labkit.quant.blockwise import dequantize_blocks, pack, quantize_blocks
from labkit.quant.codebooks import codebook
from labkit.quant.kernels import cpu, operations
from labkit.quant.kernels.packed import PackedWeight

torch.manual_seed(0)
for n in (1, 2, 15, 16, 17, 63, 64, 65, 1001, 4096, 4113):
    for name in ("nf4", "fp4"):
        for blocksize in (32, 64, 4096):
            for scale in (1.0, 1e-39):
                flat, levels = torch.randn(n) * scale, codebook(name)
                codes, absmax = quantize_blocks(flat, levels, blocksize)
                values = dequantize_blocks(codes, absmax, levels, blocksize)
                got = operations.quantize_4bit(flat, levels, blocksize)
                assert torch.equal(got[0], pack(codes, int(got[0][-1] & 15))) and torch.equal(got[1], absmax)
                weight = PackedWeight(*got, levels, blocksize)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    cpu.STREAMED_FROM = 0 if scale == 1 else 1 << 24
                    back = operations.dequantize_4bit(weight, n, dtype, out=torch.empty(n, dtype=dtype))
                    expected = values.to(dtype)
                    assert torch.equal(back.view(torch.uint8), expected.view(torch.uint8)), (n, name, blocksize, dtype)
                if cpu.LANES and scale == 1:
                    x = torch.randn(5, 96)
                    got = operations.quantize_4bit(torch.randn(7 * 96), levels, blocksize)
                    weight = PackedWeight(*got, levels, blocksize)
                    exact = operations.dequantize_4bit(weight, 7 * 96).view(7, 96).double()
                    y = operations.multiply_4bit(x, weight, 7)
                    torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5)
print(cpu.LANES)
"""


AVX2 = "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+cx16"


@pytest.mark.slow
@pytest.mark.parametrize(("cpu_name", "features", "lanes"), [("haswell", AVX2, 8), ("generic", "+sse2", 0)])
def test_kernels_compiled_for_lesser_processors_give_the_reference_bits(cpu_name, features, lanes):
    if platform.machine() not in ("x86_64", "AMD64") or (lanes and not torch.cpu._is_avx2_supported()):
        pytest.skip("this processor cannot run code for that one")
    environment = os.environ | {"NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": features}
    result = subprocess.run(
        [sys.executable, "-c", ALL_SHAPES], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == lanes

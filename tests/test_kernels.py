"""The kernels as PyTorch operations, under threads, forks, torch.compile and fake tensors, and on a GPU."""

import os
import platform
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from labkit.quant import kernels
from labkit.quant.blockwise import dequantize_blocks, pack, quantize_blocks, unpack
from labkit.quant.codebooks import dynamic8, midpoints, nf4
from labkit.quant.kernels import cpu, tasks, threads
from labkit.quant.kernels.outdated import forget_outdated
from labkit.quant.kernels.vectors import next_part, pointer
from labkit.quant.config import BLOCKSIZES
from labkit.quant.tensor import quantize, quantize_scales

LARGE = threads.SERIAL_BELOW  # weights: the size from which threads share the work


def reference(flat, blocksize=64):
    codes, absmax = quantize_blocks(flat, nf4(), blocksize)
    return pack(codes), absmax, dequantize_blocks(codes, absmax, nf4(), blocksize)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["openmp", "pool"])
def threading_by(request, monkeypatch):
    """Once on PyTorch's OpenMP threads, where there are any, and once on Python's."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", None)
    elif threads._openmp is None:
        pytest.skip("PyTorch's OpenMP runtime is not found here: kernels run on Python threads")
    return request.param


@pytest.mark.parametrize("n", [LARGE, LARGE + 1, LARGE + 63, LARGE + 64 * 3 + 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_reference_bits(n, threads, threading_by):
    before = torch.get_num_threads()
    flat = torch.randn(n)
    packed, absmax, values = reference(flat)
    torch.set_num_threads(threads)
    try:
        got = kernels.quantize_4bit(flat, nf4(), 64)
        back = kernels.dequantize_4bit(packed, absmax, nf4(), 64, n)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], packed) and torch.equal(got[1], absmax) and torch.equal(back, values)


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
        kernels.dequantize_4bit(packed, absmax, nf4(), blocksize, n, dtype, out=out)
        assert torch.equal(out.view(torch.uint8), values.view(torch.uint8))
        assert not memory[:start].any() and not memory[start + n :].any()


@numba.cfunc(tasks.TASK)
def _record(arguments):
    """A task that counts, from the address a[2] on, how often each part was taken."""
    a = numba.carray(arguments, 32)
    part = next_part(a)
    while part < a[1]:
        counts = numba.carray(pointer(a[2]), a[1], np.int64)
        counts[part] += 1
        part = next_part(a)


@pytest.mark.parametrize(
    ("number", "n", "parts"),
    [
        (1, LARGE, 1),
        (3, LARGE - 1, 1),
        (3, LARGE, 3),
        (3, 5 * threads.PART, 5),
        (3, 99 * threads.PART, 12),
        (64, LARGE, 16),
    ],
)
def test_work_is_cut_into_parts_that_are_taken_once_each(number, n, parts, threading_by):
    before = torch.get_num_threads()
    counts = np.zeros(parts + 1, np.int64)
    torch.set_num_threads(number)
    try:
        threads.run(_record.address, 16 if number == 64 else n // 64, n, counts.ctypes.data)
    finally:
        torch.set_num_threads(before)
    assert counts.tolist() == [1] * parts + [0]


def test_four_threads_at_once_get_their_own_results(two_threads, threading_by):
    weights = [torch.randn(1024, 1024) * (i + 1) for i in range(4)]
    expected = [quantize(w) for w in weights]
    failures = []

    def work(i):
        for _ in range(20):
            q = quantize(weights[i])
            if not torch.equal(q.packed, expected[i].packed) or not torch.equal(q.dequantize(), values[i]):
                failures.append(i)

    values = [q.dequantize() for q in expected]
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 511, 5184, 66_000])
@pytest.mark.parametrize("size", [1.0, 1e-39, 1e30])
def test_scales_are_quantized_to_the_reference_bits(n, size, two_threads, threading_by):
    flat = torch.randn(n) * size
    flat[: n // 3] = (flat[: n // 3] * 16 / size).round() / 16 * size  # some that fall on a midpoint
    flat[n // 2 : n // 2 + 300] = 0
    flat[n - n // 4 :] = dynamic8()[torch.arange(n // 4) % 256] * size
    codes, absmax = quantize_blocks(flat, dynamic8(), 256)
    got = kernels.quantize_scales(flat)
    assert torch.equal(got[0], codes) and torch.equal(got[1], absmax)


def test_scales_on_and_beside_every_midpoint_get_the_reference_codes():
    middle = midpoints(dynamic8())
    infinity = torch.tensor(torch.inf)
    values = torch.cat(
        [middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity), dynamic8()]
    )
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    flat = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1).view(
        -1
    )  # absmax 1: values stay as they are
    codes, _ = quantize_blocks(flat, dynamic8(), 256)
    assert torch.equal(kernels.quantize_scales(flat)[0], codes)


directly = pytest.mark.skipif(cpu.LANES == 0, reason="no kernel that multiplies for this processor")


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
    packed, absmax = kernels.quantize_4bit(torch.randn(256), nf4(), 64)
    for wrong in [
        (packed[:100], absmax),
        (packed, absmax[:3]),
        (packed, absmax.double()),
        (packed, absmax.byte()),
    ]:
        with pytest.raises(ValueError, match="256 weights in blocks of 64 need 128 contiguous bytes"):
            kernels.dequantize_4bit(*wrong, nf4(), 64, 256)
    q = quantize(torch.randn(128, 256))  # 512 scales, with two of their own
    for nested in (q.scales.absmax[:1], q.scales.absmax.double(), torch.ones(4)[::2]):
        with pytest.raises(
            ValueError, match="512 quantized scales need 2 contiguous float32 scales of their own"
        ):
            kernels.dequantize_4bit(
                q.packed, q.scales.codes, nf4(), 64, 128 * 256, torch.float32, nested, q.scales.offset
            )


@pytest.mark.parametrize("fast", [True, False])
def test_weights_are_dequantized_to_any_floating_dtype_and_to_no_other(fast):
    q = quantize(torch.randn(33, 97))
    exact = q.dequantize()
    kernels.set_fast(fast)
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            assert torch.equal(q.dequantize(dtype).double(), exact.to(dtype).double())
            assert torch.equal(
                q.dequantize(out=torch.empty(33, 97, dtype=dtype)).double(), exact.to(dtype).double()
            )
        for dtype in (torch.int8, torch.int32, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match="cannot be dequantized to"):
                q.dequantize(dtype)
            with pytest.raises(TypeError, match="cannot be dequantized to"):
                q.dequantize(out=torch.empty(33, 97, dtype=dtype))
    finally:
        kernels.set_fast(True)


class QuantizedItems(Dataset):
    """Quantizes in the worker process, with two threads of its own.

    The input is made by numpy: PyTorch's own parallel operations hang in a forked process with more than one thread.
    """

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(2)
        flat = torch.from_numpy(np.sin(np.arange(LARGE, dtype=np.float32)) * np.float32(i + 1))
        return kernels.dequantize_4bit(*kernels.quantize_4bit(flat, nf4(), 64), nf4(), 64, LARGE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_dataloader_workers_dequantize_although_the_parent_has_threads(two_threads, threading_by):
    items = QuantizedItems()
    expected = [items[i] for i in range(4)]  # the parent has threads now, which its children will not
    assert threading_by == "openmp" or threads._pool is not None
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


def test_kernels_release_the_interpreter_lock():
    flat = torch.randn(1 << 22)
    kernels.quantize_4bit(flat, nf4(), 64)  # compiled
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=tick)
    other.start()
    try:
        start = time.perf_counter()
        for _ in range(5):
            kernels.quantize_4bit(flat, nf4(), 64)
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
        torch.set_num_threads(before)
    assert sum(start < t < end for t in ticks) > 5  # with the lock held, one a call at most


OPS = ["quantize_4bit", "dequantize_4bit", "dequantize_4bit_out"]


def op_arguments(name, nested):
    flat = torch.randn(200)
    packed, absmax = kernels.quantize_4bit(flat, nf4(), 64)
    scales = quantize_scales(absmax)
    end = (scales.absmax, scales.offset) if nested else (None, None)
    first = scales.codes if nested else absmax
    return {
        "quantize_4bit": (flat, nf4().clone(), 64),
        "dequantize_4bit": (packed, first, nf4().clone(), 64, 200, torch.bfloat16, *end),
        "dequantize_4bit_out": (packed, first, nf4().clone(), 64, torch.empty(200), *end),
    }[name]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operations_pass_opcheck(name, nested):
    torch.library.opcheck(getattr(torch.ops.labkit, name).default, op_arguments(name, nested))


@pytest.mark.parametrize("name", OPS[:2])
def test_operations_equal_the_direct_call(name):
    arguments = op_arguments(name, False)
    ours, theirs = getattr(kernels, name)(*arguments), getattr(torch.ops.labkit, name)(*arguments)
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_dequantize_compiles_without_a_graph_break_and_gives_the_same_bits(double_quant, fast):
    torch.compiler.reset()
    kernels.set_fast(fast)
    try:
        q = quantize(torch.randn(96, 128), double_quant=double_quant)
        x = torch.randn(4, 128, requires_grad=True)

        def layer(x):
            return x @ q.dequantize().T

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y, expected = compiled(x), layer(x)
        assert torch.equal(y, expected)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
        assert torch.equal(gradient, expected_gradient)
    finally:
        kernels.set_fast(True)
        torch.compiler.reset()


@pytest.mark.parametrize("fast", [True, False])
def test_fake_and_meta_tensors_have_the_real_shapes_and_dtypes(fast):
    kernels.set_fast(fast)
    try:
        for n, blocksize in [(1, 64), (65, 64), (4096, 32), (1001, 4096)]:
            packed, absmax = kernels.quantize_4bit(torch.randn(n), nf4(), blocksize)
            with FakeTensorMode() as mode:
                flat, levels = torch.empty(n), mode.from_tensor(nf4())
                got = kernels.quantize_4bit(flat, levels, blocksize)
                back = kernels.dequantize_4bit(*got, levels, blocksize, n, torch.float16)
            assert (got[0].shape, got[0].dtype) == (packed.shape, packed.dtype)
            assert (got[1].shape, got[1].dtype) == (absmax.shape, absmax.dtype)
            assert (back.shape, back.dtype) == ((n,), torch.float16)
        assert quantize(torch.empty(33, 7, device="meta")).packed.shape == (116, 1)
    finally:
        kernels.set_fast(True)


def test_the_fast_path_can_be_turned_off_by_the_environment():
    code = "import torch; from labkit.quant import kernels; print(kernels.fast_for(torch.empty(1)))"
    for value, expected in [("0", "False"), ("1", "True")]:
        environment = os.environ | {"LABKIT_FAST": value}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr


ALL_SHAPES = """
import torch
from labkit.quant import kernels
from labkit.quant.codebooks import codebook
from labkit.quant.kernels import cpu
from labkit.quant.blockwise import dequantize_blocks, pack, quantize_blocks

torch.manual_seed(0)
for n in (1, 2, 15, 16, 17, 63, 64, 65, 1001, 4096, 4113):
    for name in ("nf4", "fp4"):
        for blocksize in (32, 64, 4096):
            for scale in (1.0, 1e-39):
                flat, levels = torch.randn(n) * scale, codebook(name)
                codes, absmax = quantize_blocks(flat, levels, blocksize)
                values = dequantize_blocks(codes, absmax, levels, blocksize)
                got = kernels.quantize_4bit(flat, levels, blocksize)
                assert torch.equal(got[0], pack(codes, int(got[0][-1] & 15))) and torch.equal(got[1], absmax)
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    cpu.STREAMED_FROM = 0 if scale == 1 else 1 << 24
                    back = kernels.dequantize_4bit(*got, levels, blocksize, n, dtype, out=torch.empty(n, dtype=dtype))
                    expected = values.to(dtype)
                    assert torch.equal(back.view(torch.uint8), expected.view(torch.uint8)), (n, name, blocksize, dtype)
                if cpu.LANES and scale == 1:
                    x = torch.randn(5, 96)
                    got = kernels.quantize_4bit(torch.randn(7 * 96), levels, blocksize)
                    weight = kernels.dequantize_4bit(*got, levels, blocksize, 7 * 96).view(7, 96).double()
                    y = kernels.multiply_4bit(x, *got, levels, blocksize, 7)
                    torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-5)
print(cpu.LANES)
"""
AVX2 = "+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+cx16"


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


def test_compiled_kernels_older_than_any_of_their_sources_are_forgotten(tmp_path):
    kept = tmp_path / "__pycache__"
    kept.mkdir()
    for name, seconds in (("tasks.py", 100), ("lookups.py", 300)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    for name, seconds in (
        ("tasks.a.nbi", 200),
        ("tasks.a.1.nbc", 200),
        ("tasks.pyc", 200),
        ("tasks.b.nbi", 400),
    ):
        (kept / name).touch()
        os.utime(kept / name, (seconds, seconds))
    forget_outdated(tmp_path)
    assert sorted(path.name for path in kept.iterdir()) == ["tasks.b.nbi", "tasks.pyc"]
    forget_outdated(tmp_path)  # and nothing more


INTERPRETED = """
import sys, torch
from labkit.quant import kernels
from labkit.quant.codebooks import codebook
from labkit.quant.kernels import cpu, triton
from labkit.quant.blockwise import quantize_scales

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
                for scales in ((absmax,), (s.codes, s.absmax, s.offset)):
                    for dtype in (torch.float32, torch.float16):
                        ours, theirs = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
                        triton.dequantize_4bit(packed, scales[0], levels, blocksize, ours, *scales[1:])
                        cpu.dequantize_4bit(packed, scales[0], levels, blocksize, theirs, *scales[1:])
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


def test_unpack_of_the_kernel_output_is_the_reference_codes():
    flat = torch.randn(999)
    packed, absmax = kernels.quantize_4bit(flat, nf4(), 32)
    codes, expected = quantize_blocks(flat, nf4(), 32)
    assert torch.equal(unpack(packed, 999), codes) and torch.equal(absmax, expected)

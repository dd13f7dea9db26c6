"""The CUDA kernels without a GPU: in Triton's interpreter, compiled for cards that are not there, and what is launched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labkit.quant.codebooks import dynamic8, nf4
from labkit.quant.kernels import dispatch
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.tensor import quantize

ROOT = Path(__file__).resolve().parents[3]
MISSING = "Triton is not installed: the CUDA kernels are NOT tested (pip install triton)"
NESTED = {"scales": "*u8"}
PLAIN = {"nested": None, "offset": None, "scale_levels": None}
WEIGHT = {"packed": "*u8", "scales": "*fp32", "levels": "*fp32"}
WEIGHT |= {"nested": "*fp32", "offset": "*fp32", "scale_levels": "*fp32"}


def quantizing(dtype, levels=16, blocksize=64):
    types = {"flat": f"*{dtype}", "mids": "*fp32", "codes": "*u8", "absmax": "*fp32", "n": "i64"}
    constants = {"LEVELS": levels, "BLOCKSIZE": blocksize, "BLOCKS": 2048 // blocksize, "by_rank": None}
    return "quantize", types | {"smallest": "fp32"}, constants, 4


def dequantizing(dtype, changes):
    types = WEIGHT | {"out": f"*{dtype}", "n": "i64"} | (changes if changes is NESTED else {})
    constants = {"BLOCKSIZE": 64, "WORDS": 1024} | (changes if changes is PLAIN else {})
    return "dequantize", types, constants, 8


def multiplying(dtype, tokens, changes=NESTED):
    types = WEIGHT | {"x": f"*{dtype}", "y": f"*{dtype}", "width": "i32", "height": "i32", "tokens": "i32"}
    constants = {"BLOCKSIZE": 64, "TOKENS": tokens} | (changes if changes is PLAIN else {})
    return "multiply", types | (changes if changes is NESTED else {}), constants, 1


COMPILED = {
    "quantize bf16": (quantizing("bf16"), (75, 90, 120)),
    "quantize fp16": (quantizing("fp16"), (75,)),
    "quantize fp32": (quantizing("fp32"), (90,)),
    "quantize scales": (quantizing("fp32", 256, 256), (90,)),
    "dequantize to bf16": (dequantizing("bf16", PLAIN), (75, 80, 90, 120)),
    "dequantize to fp32, nested": (dequantizing("fp32", NESTED), (75, 90)),
    "multiply one row in bf16": (multiplying("bf16", 1), (75, 90, 120)),
    "multiply four rows in fp16": (multiplying("fp16", 4, PLAIN), (75,)),
    "multiply eight rows in bf16": (multiplying("bf16", 8), (80, 90)),
    "multiply one row in fp32": (multiplying("fp32", 1), (90,)),
}
CASES = [(name, capability) for name, (_, capabilities) in COMPILED.items() for capability in capabilities]


@pytest.mark.parametrize("options", [["--few"], pytest.param([], marks=pytest.mark.slow)], ids=["few", "all"])
def test_kernels_in_the_interpreter_equal_the_reference_bit_for_bit(options):
    pytest.importorskip("triton", reason=MISSING)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    script = [sys.executable, "-m", "tests.quant.kernels.interpreted", *options]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "equal bits\n"), done.stderr


@pytest.fixture
def compile_for(tmp_path, monkeypatch):
    """Compile a kernel as `launch` does; its PTX, and what ptxas says of it."""
    triton = pytest.importorskip("triton", reason=MISSING)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from labkit.quant.kernels import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_for(capability, kernel, types, constants, num_warps):
        function = getattr(triton_programs, kernel)
        names = function.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        aligned = [name for name in names if signature[name].startswith("*") or name == "width"]
        source = ASTSource(
            function,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        file, target = tmp_path / "kernel.ptx", re.search(r"\.target (\w+)", ptx)[1]
        file.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "--gpu-name", target, str(file), "-o", os.devnull]
        return ptx, subprocess.run(command, capture_output=True, text=True, check=True).stderr

    return compile_for


@pytest.mark.parametrize("name, capability", CASES)
def test_a_compiled_kernel_keeps_bits_and_registers_and_moves_16_bytes_at_a_time(
    name, capability, compile_for
):
    kernel, *rest = COMPILED[name][0]
    ptx, resources = compile_for(capability, kernel, *rest)
    assert not re.search(r"\bfma\.|\.ftz\b|\b(?:div|rcp)\.(?:approx|full)", ptx), "bits would change"
    assert "0 bytes spill stores, 0 bytes spill loads" in resources
    assert int(re.search(r"Used (\d+) registers", resources)[1]) <= 128
    wide = {"quantize": r"ld\.global\.v4\.b32", "dequantize": r"st\.global\.v4\.b32"}
    assert re.search(wide.get(kernel, r"ld\.global\.v4\.b32"), ptx)
    if kernel == "dequantize":
        assert re.search(r"ld\.global\.v4\.b32", ptx)


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels; what it launches, and on which device, is noted and not run."""
    pytest.importorskip("triton", reason=MISSING)
    from labkit.quant.kernels import triton

    class Program:
        def __getitem__(self, grid):
            def run(*arguments, **constants):
                assert constants["enable_fp_fusion"] is False
                launched.append((grid, devices[-1]))

            return run

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            devices.append(self.tensor.device)

        def __exit__(self, *error):
            devices.append(None)

    launched, devices = [], [None]
    for name in ("quantize", "dequantize", "multiply"):
        monkeypatch.setattr(triton, name, Program())
    monkeypatch.setattr(torch.cuda, "device_of", Device)
    triton.launched = launched
    yield triton
    del triton.launched


def test_kernels_run_on_the_device_of_the_weight_in_enough_programs(kernels):
    q = quantize(torch.randn(300, 64))
    kernels.dequantize_4bit(q.for_kernels(), torch.empty(300, 64))
    kernels.multiply_4bit(torch.randn(9, 64), q.for_kernels(), torch.empty(9, 300))
    kernels.quantize_4bit(torch.randn(300 * 64 + 1), nf4(), 64)
    here = torch.device("cpu")
    assert kernels.launched == [((3,), here), ((300,), here), ((300,), here), ((10,), here)]


def test_constants_are_kept_on_each_device_as_ordinary_tensors_also_if_inference_asks_first(kernels):
    device = torch.device("cpu")
    kernels._kept_tables.cache_clear()
    with torch.inference_mode():
        levels, mids, by_rank = kernels.tables_on(device, nf4())
    assert type(levels) is torch.Tensor and not levels.is_inference() and not mids.is_inference()
    assert torch.equal(levels, nf4()) and by_rank is None
    assert kernels.tables_on(device, nf4().clone())[0] is levels
    assert kernels.tables_on(device, nf4().flip(0))[2].tolist() == list(range(15, -1, -1))


@pytest.mark.parametrize(
    "changes",
    [
        {"blocksize": -64},
        {"blocksize": 48},
        {"blocksize": 16384},
        {"packed": torch.zeros(10, dtype=torch.uint8)},
        {"scales": torch.zeros(96)},
        {"scales": torch.zeros(95, dtype=torch.uint8)},
        {"levels": nf4()[:15]},
        {"nested": torch.zeros(0)},
        {"offset": None},
    ],
)
def test_kernels_refuse_what_they_could_not_read(changes, kernels):
    q = quantize(torch.randn(64, 96))
    weight = q.for_kernels()._replace(**changes)
    for call in (
        lambda: kernels.dequantize_4bit(weight, torch.empty(64, 96)),
        lambda: kernels.multiply_4bit(torch.zeros(2, 96), weight, torch.zeros(2, 64)),
    ):
        with pytest.raises(ValueError, match="a kernel"):
            call()
    for flat, levels in ((torch.zeros(64).double(), nf4()), (torch.zeros(64), dynamic8()[:99])):
        with pytest.raises(ValueError, match="a kernel needs"):
            kernels.quantize_4bit(flat, levels, 64)
    with pytest.raises(ValueError, match="no kernel multiplies rows of 97 numbers"):
        kernels.multiply_4bit(torch.zeros(2, 97), weight, torch.zeros(2, 64))
    assert kernels.launched == []


def test_bytes_that_do_not_begin_at_a_whole_word_are_copied_to_such_a_place(kernels):
    q = quantize(torch.randn(64, 96), double_quant=False)
    moved = torch.cat([torch.zeros(1, 1, dtype=torch.uint8), q.packed])[1:]
    weight = PackedWeight(moved, q.scales, nf4(), 64)
    packed = kernels.arguments_of(weight, 6144)[0]
    assert moved.data_ptr() % 4 and not packed.data_ptr() % 4 and torch.equal(packed, moved)


@pytest.mark.parametrize("capability, expected", [((7, 0), False), ((7, 5), True), ((9, 0), True)])
def test_a_gpu_that_is_too_old_for_triton_has_no_kernels(capability, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "launches", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.runs_triton.__wrapped__(torch.device("cuda", 0)) == expected


def test_where_triton_cannot_build_what_it_launches_with_the_reference_runs_after_a_warning(monkeypatch):
    pytest.importorskip("triton", reason=MISSING)
    from triton.runtime import driver

    class NoCompiler:
        def get_current_device(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(driver, "_active", NoCompiler())
    with pytest.warns(UserWarning, match="the slower reference runs on the GPU: Failed to find C compiler"):
        assert dispatch.launches.__wrapped__() is False

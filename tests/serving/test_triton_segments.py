"""The kernels of mixed batches: in Triton's interpreter, compiled for cards that are not there, and on a real one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from labkit.serving.batched import AdapterBank
from tests.conftest import make_small_llama
from tests.serving.adapters import CONFIGS, make_folder

ROOT = Path(__file__).resolve().parents[2]
MISSING = "Triton is not installed: the kernels of mixed batches are NOT tested (pip install triton)"
TABLES = {"order": "*i64", "blocks": "*i64", "ranks": "*i64", "tokens": "i32", "z": "*fp32"}
SIZES = {"R": 32, "TOKENS": 16}


def test_kernels_in_the_interpreter_equal_the_reference():
    pytest.importorskip("triton", reason=MISSING)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    script = [sys.executable, "-m", "tests.serving.interpreted"]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_without_spilling_and_multiply_in_full_precision(
    tmp_path, monkeypatch, dtype, capability
):
    triton = pytest.importorskip("triton", reason=MISSING)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    from labkit.serving import triton_segments

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    wide = {"x": f"*{dtype}", "A_at": "*i64", "scalings": "*fp32", "width": "i32"}, {"WIDTH": 64}
    high = {"y": f"*{dtype}", "B_at": "*i64", "height": "i32"}, {"HEIGHT": 64}
    for function, (types, constants) in ((triton_segments.shrink, wide), (triton_segments.expand, high)):
        constants = SIZES | constants
        signature = {name: (TABLES | types).get(name, "constexpr") for name in function.arg_names}
        at = {(function.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(function, signature, at)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm[
            "ptx"
        ]
        assert "tf32" not in ptx
        (tmp_path / "kernel.ptx").write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(capability).path, "-v", "--gpu-name", target, str(tmp_path / "kernel.ptx")]
        said = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True, check=True).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 19])
def test_a_mixed_batch_on_a_gpu_is_that_of_the_cpu(tmp_path, tokens):
    ids = torch.randint(0, 300, (6, tokens), generator=torch.Generator().manual_seed(0))
    logits = {}
    for device in ("cpu", "cuda"):
        bank = AdapterBank(make_small_llama(vocab_size=300).to(device))
        for seed, (name, config) in enumerate(CONFIGS.items()):
            folder = tmp_path / name
            if not folder.exists():
                make_folder(make_small_llama(vocab_size=300), folder, config, seed)
            bank.load(folder, name)
        with torch.no_grad(), bank.rows(["sql", None, "poet", "sql", "clerk", "support"]):
            logits[device] = bank.model(input_ids=ids.to(device), use_cache=False).logits.cpu()
    torch.testing.assert_close(logits["cuda"], logits["cpu"], rtol=1e-4, atol=1e-4)

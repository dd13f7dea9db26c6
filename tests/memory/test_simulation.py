"""The step without numbers: large models in little memory, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from labkit.memory.simulation import simulate
from labkit.quant.kernels import dispatch
from tests.memory.conftest import SMALL, close


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_70b_step_is_planned_and_its_blocks_simulated_in_little_memory():
    code = """
from labkit.memory.resident import status
from labkit.memory.formulas import plan
from labkit.memory.simulation import simulate
from labkit.quant.kernels import dispatch
from labkit.models.shapes import config_of
how = dict(checkpointing=True, max_length=1024)
whole = plan("llama-3-70b", "qlora", **how).peak
config = config_of("llama-3-70b")
config.num_hidden_layers = 2
print(whole, plan(config, "qlora", **how).peak, simulate(config, "qlora", **how).peak, status("VmHWM"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whole, planned, simulated, resident = map(int, done.stdout.split())
    assert 40e9 < whole < 50e9
    assert close(planned, simulated, 0.01)
    assert resident < 2e9


def test_a_simulation_refuses_what_the_courses_step_does_not_have():
    with pytest.raises(ValueError, match="master=True is not part of this course's step, .*; use plan"):
        simulate(SMALL, "full", master=True)
    with pytest.raises(ValueError, match="recompute_act=False is not part .* use plan"):
        simulate(SMALL, "full", recompute_act=False)


def test_a_step_on_a_card_does_not_depend_on_the_kernels_of_this_cpu(monkeypatch):
    how = dict(max_length=32, r=8)
    usual = simulate(SMALL, "qlora", **how).peak
    on_cpu = simulate(SMALL, "qlora", device="cpu", dtype="fp32", **how).peak
    monkeypatch.setattr(dispatch, "_has_numba", not dispatch._has_numba)
    assert simulate(SMALL, "qlora", **how).peak == usual
    assert simulate(SMALL, "qlora", device="cpu", dtype="fp32", **how).peak != on_cpu, "there it does"


@pytest.mark.parametrize("length", [32, 100, 2048])
@torch.no_grad()
def test_attention_keeps_on_a_card_what_it_keeps_on_a_cpu(length):
    def kept(device, operation, *settings):
        with FakeTensorMode():
            q, k, v = (torch.empty(2, 8, length, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
            outputs = operation(q, k, v, *settings)
        return sum(out.untyped_storage().nbytes() for out in outputs if isinstance(out, torch.Tensor))

    aten = torch.ops.aten
    on_cpu = kept("cpu", aten._scaled_dot_product_flash_attention_for_cpu, 0.0, True)
    flash = kept("cuda", aten._scaled_dot_product_flash_attention, 0.0, True)
    cudnn = kept("cuda", aten._scaled_dot_product_cudnn_attention, None, True, 0.0, True, False)
    efficient = kept("cuda", aten._scaled_dot_product_efficient_attention, None, True, 0.0, True)
    assert on_cpu <= flash <= on_cpu + 64 and on_cpu <= cudnn <= on_cpu + 64
    rows_of_32 = 4 * 2 * 8 * (-length % 32)  # log-sum-exp, fp32
    assert on_cpu <= efficient <= on_cpu + rows_of_32 + 64

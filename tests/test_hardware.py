"""What this machine has; and one switch for every fast path."""

import os
import subprocess
import sys

import pytest
import torch

from labkit.hardware import best_device, compute_dtype, fast_paths, memory_bytes, product_dtype, set_fast
from labkit.quant import kernels


def test_on_a_cpu_everything_is_fp32_but_the_products_of_one_with_matrix_units(monkeypatch):
    for units, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: {"amx_bf16": units})
        assert compute_dtype("cpu") == torch.float32
        assert product_dtype("cpu") == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_on_a_gpu_bf16_is_for_those_that_have_it_in_hardware(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("cuda") == product_dtype("cuda") == expected


def test_the_best_device_is_one_that_is_there():
    assert torch.zeros(1, device=best_device()).item() == 0
    assert memory_bytes() > 2**28


def test_the_switch_turns_off_every_fast_path():
    assert fast_paths()
    set_fast(False)
    try:
        assert not fast_paths() and not kernels.fast_for(torch.zeros(1))
    finally:
        set_fast(True)
    assert fast_paths() and kernels.fast_for(torch.zeros(1))


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True"), ("", "True")])
def test_the_environment_decides_at_the_start(value, expected):
    code = "from labkit.hardware import fast_paths; print(fast_paths())"
    environment = os.environ | {"LABKIT_FAST": value, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr

"""Profiles: sizes and formats for this machine, and why."""

import pytest
import torch

from labkit.hardware import Limits
from labkit.lab import profiles


@pytest.mark.parametrize(
    ("units", "dtype", "says"),
    [
        (True, torch.bfloat16, "multiply in bfloat16: this processor has matrix units"),
        (False, torch.float32, "multiply in float32: this processor has no matrix units"),
    ],
)
def test_products_in_four_bit_layers_take_the_dtype_of_the_matrix_units(
    monkeypatch, capsys, units, dtype, says
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": units})
    chosen = profiles.profile(name="cpu")
    assert (chosen.dtype, chosen.product_dtype) == (torch.float32, dtype)
    assert says in capsys.readouterr().out


def test_profile_is_cpu_without_a_gpu_and_says_why(monkeypatch, capsys):
    monkeypatch.setattr(profiles, "best_device", lambda: torch.device("cpu"))
    chosen = profiles.profile()
    assert (chosen.name, chosen.dtype, chosen.model) == ("cpu", torch.float32, "smollm2-135m")
    assert "on cpu in float32 (" in capsys.readouterr().out
    monkeypatch.setenv("LABKIT_MODEL", "some/model")
    assert profiles.profile().model == "some/model"
    with pytest.raises(ValueError, match="PyTorch sees no GPU"):
        profiles.profile(name="gpu")
    with pytest.raises(ValueError, match=r"choose one of \('cpu', 'gpu'\)"):
        profiles.profile(name="tpu")


def test_profile_is_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(profiles, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(profiles, "compute_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(profiles, "memory_bytes", lambda *_: 24 * 2**30)
    chosen = profiles.profile()
    assert (chosen.name, chosen.device.type, chosen.dtype) == ("gpu", "cuda", torch.bfloat16)
    assert profiles.profile(name="cpu").dtype == torch.float32


@pytest.mark.parametrize(("allowed", "given", "used"), [(1, None, 1), (64, None, 2), (1, "2", 2)])
def test_threads_follow_the_limits_of_the_container_unless_they_are_given(monkeypatch, allowed, given, used):
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))
    monkeypatch.setattr(profiles, "limits", lambda: Limits(allowed, 2**33, 2**33, contained=True))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    profiles.profile(name="cpu")
    assert threads == [used]


def test_a_variable_with_an_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("LABKIT_PROFILE", "cuda")
    with pytest.raises(
        ValueError, match=r"LABKIT_PROFILE='cuda' is not known; choose one of \('cpu', 'gpu'\)"
    ):
        profiles.profile()
    monkeypatch.setenv("LABKIT_PROFILE", " CPU ")
    assert profiles.profile().name == "cpu"

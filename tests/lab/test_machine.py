"""The preflight: each line is fine or says what to do, and the minutes to expect follow this machine."""

import pytest
import torch

from labkit.lab import machine
from labkit.models.fetching import ModelUnavailable


def test_preflight_lines_say_what_to_do_when_something_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gflops", lambda: 20.0)
    monkeypatch.setattr(machine, "gigabytes_per_second", lambda: 5.0)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "nothing-yet"))
    monkeypatch.setattr(machine, "memory_bytes", lambda _: 2 * 2**30)
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    lines = {line.what: line for line in machine.preflight()}
    assert lines["packages"].state == "problem" and "no-such-package" in lines["packages"].found
    assert [lines[w].state for w in ("model", "memory", "speed")] == ["warning"] * 3
    assert all(line.advice for line in lines.values() if line.state != "OK")


def test_preflight_says_which_setting_is_wrong_if_there_is_no_cache_folder(monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", "~nobody-of-this-name/models")
    for line in (machine.model_line(), machine.disk_line()):
        assert line.state == "problem" and "set LABKIT_CACHE to an absolute path" in line.advice


def test_preflight_says_whose_model_it_is_that_may_not_be_read(monkeypatch):
    def denied(*_):
        raise ModelUnavailable("may be read by its owner only; ask them")

    monkeypatch.setattr(machine, "is_complete", denied)
    assert machine.model_line().state == "problem" and "ask them" in machine.model_line().advice


def test_measured_speeds_are_plausible():
    assert 1 < machine.gflops(0.1) < 1e6 and 0.5 < machine.gigabytes_per_second(0.1) < 1e4


@pytest.mark.parametrize(("dtype", "longer"), [(torch.bfloat16, False), (torch.float32, True)])
def test_preflight_expects_more_minutes_without_matrix_units(monkeypatch, dtype, longer):
    monkeypatch.setattr(machine, "product_dtype", lambda _: dtype)
    monkeypatch.setattr(machine, "gflops", lambda: machine.REFERENCE_GFLOPS)
    monkeypatch.setattr(machine, "gigabytes_per_second", lambda: 10.0)
    name = "08_qlora_finetune"
    minutes = (machine.WITHOUT_MATRIX_UNITS if longer else machine.COURSE_MINUTES)[name]
    assert f"{name} {minutes:.1f}" in machine.speed_line().found

"""The preflight: each line is fine or says what to do, and the minutes to expect follow this machine."""

import pytest
import torch

from labkit.hardware import Limits
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


def test_memory_is_that_of_the_container_and_what_is_left_of_it(monkeypatch):
    monkeypatch.setattr(machine, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "physical_memory", lambda: 64 * 2**30)
    for memory, free, state in ((8, 6, "OK"), (8, 0.5, "warning"), (2, 2, "warning")):
        allowed = Limits(2, int(memory * 2**30), int(free * 2**30), contained=True)
        monkeypatch.setattr(machine, "limits", lambda allowed=allowed: allowed)
        monkeypatch.setattr(machine, "memory_bytes", lambda _, allowed=allowed: allowed.memory)
        line = machine.memory_line()
        assert (
            line.state == state
            and f"{memory:.1f} GiB on cpu" in line.found
            and "of the container" in line.found
        )


def test_settings_that_do_nothing_or_say_nothing_are_pointed_out(monkeypatch):
    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine.settings_line().found == "none"
    monkeypatch.setenv("LABKIT_STATIC", "true")
    assert machine.settings_line() == machine.PreflightLine("settings", "OK", "LABKIT_STATIC=true")
    monkeypatch.setenv("LABKIT_STATIC", "maybe")
    assert machine.settings_line().state == "problem" and "neither yes" in machine.settings_line().advice
    monkeypatch.setenv("LABKIT_STATC", "1")
    assert "did you mean 'LABKIT_STATIC'?" in machine.settings_line().advice


def test_a_measured_speed_draws_no_random_number_of_the_notebook():
    before = torch.get_rng_state()
    machine.gflops(0.01), machine.gigabytes_per_second(0.01)
    assert torch.equal(before, torch.get_rng_state())

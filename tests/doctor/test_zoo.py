"""The right probe is the first to find each specimen, and none finds anything in a healthy run."""

import pytest

from labkit.doctor import PROBES, doctor
from labkit.doctor.zoo import HEALTHY, SICK, breed, expected

QUICK = {
    "nothing supervised",
    "end mark masked",
    "first token masked",
    "adapter frozen",
    "checkpointing trains nothing",
    "optimizer of other tensors",
    "stalled in bf16",
}


def cases(quick: bool) -> list:
    names = [name for name in (*HEALTHY, *SICK) if (name in QUICK) is quick]
    return [pytest.param(name, seed, id=f"{name}-{seed}") for name in names for seed in (0, 1)]


def first_finding(name: str, seed: int, tmp_path) -> str | None:
    one = breed(name, seed, tmp_path / "adapter")
    return doctor(one.model, one.tokenizer, one.data, **one.given).first


@pytest.mark.parametrize(("name", "seed"), cases(quick=True))
def test_the_right_probe_finds_it_first(name, seed, tmp_path):
    assert first_finding(name, seed, tmp_path) == expected(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), cases(quick=False))
def test_the_right_probe_finds_what_has_to_be_trained(name, seed, tmp_path):
    assert first_finding(name, seed, tmp_path) == expected(name)


def test_each_probe_has_a_specimen_of_its_own():
    assert {probe for probe, _ in SICK.values()} == {probe.name for probe in PROBES}

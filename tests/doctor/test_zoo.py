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
    """A name and a seed; the quick ones are those of seed 0 that train for a few steps."""
    found = [(name, seed) for name in (*HEALTHY, *SICK) for seed in (0, 1)]
    return [
        pytest.param(name, seed, id=f"{name}-{seed}")
        for name, seed in found
        if (name in QUICK and seed == 0) is quick
    ]


def first_finding(name: str, seed: int, tmp_path) -> str | None:
    one = breed(name, seed, tmp_path / "adapter")
    return doctor(one.model, one.tokenizer, one.data, **one.given).first


@pytest.mark.parametrize(("name", "seed"), cases(quick=True))
def test_the_right_probe_finds_it_first(name, seed, tmp_path):
    assert first_finding(name, seed, tmp_path) == expected(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), cases(quick=False))
def test_the_right_probe_finds_first_what_takes_longer_to_breed(name, seed, tmp_path):
    assert first_finding(name, seed, tmp_path) == expected(name)


def test_each_probe_has_a_specimen_of_its_own():
    assert set(SICK.values()) == {probe.name for probe in PROBES}

"""The numbers of a whole run, on changes whose numbers are known."""

import copy

import pytest
import torch
from torch import nn

from labkit.analysis.spectra import singular_values
from labkit.analysis.summary import KEPT, effect_numbers, spectral_numbers

SIZES = {"0": (24, 16), "1": (16, 24)}


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))


def changed(base: nn.Module, changes: dict[str, torch.Tensor]) -> nn.Module:
    tuned = copy.deepcopy(base)
    for name, change in changes.items():
        tuned.get_submodule(name).weight.data += change
    return tuned


def of_rank(k: int, seed: int, size: float = 0.1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: size * torch.randn(m, k) @ torch.randn(k, n) for name, (m, n) in SIZES.items()}


def test_an_update_of_rank_one_has_rank_one_and_agrees_with_itself():
    base = make_model()
    tuned = changed(base, of_rank(1, seed=1))
    numbers = spectral_numbers(base, tuned, tuned)
    assert numbers["stable"] == pytest.approx(1 / 16, rel=1e-3)
    assert numbers["energy90"] == 1 / 16
    assert numbers["phi1_in"] == pytest.approx(1, abs=1e-4) and numbers["phi1_out"] == pytest.approx(
        1, abs=1e-4
    )


def test_runs_with_nothing_in_common_agree_as_little_as_their_control():
    base = make_model()
    trials = [
        spectral_numbers(base, changed(base, of_rank(16, seed)), changed(base, of_rank(16, seed + 100)), seed)
        for seed in range(20)
    ]
    for name in ("phi8_in", "phi8_out"):
        mean = sum(t[name] for t in trials) / len(trials)
        control = sum(t[f"{name}_control"] for t in trials) / len(trials)
        expected = (8 / 16 + 8 / 24) / 2  # of random spans phi(8, 8) is 8 / d on average
        assert mean == pytest.approx(expected, abs=0.04) and control == pytest.approx(expected, abs=0.04)


def test_noise_is_its_own_control():
    base = make_model()
    noise = {
        name: 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
        for name, shape in SIZES.items()
    }
    numbers = spectral_numbers(base, changed(base, noise), changed(base, noise))
    for name in ("effective", "stable", "energy90", "amplification"):
        assert numbers[name] == pytest.approx(numbers[f"{name}_control"], rel=0.35)


def test_a_large_new_direction_is_an_intruder_and_noise_of_its_norm_makes_none():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(200, 200, bias=False))
    basis = torch.linalg.qr(torch.randn(200, 200)).Q
    base[0].weight.data = basis[:, :100] @ torch.diag(torch.logspace(3, -2, 100)) @ basis[:, :100].T
    direction = basis[:, 150:151]  # which the base does not have among the large ones
    mixed = (direction + sum(basis[:, i : i + 1] for i in range(100, 200)) / 10) / 2**0.5
    tuned = changed(base, {"0": 400 * mixed @ mixed.T})
    numbers = spectral_numbers(base, tuned, tuned)
    assert numbers["intruders"] == 1
    assert numbers["intruders_control"] == 0
    assert numbers["relative_norm"] == pytest.approx(
        (400 * (mixed.T @ mixed) / base[0].weight.norm()).item(), rel=1e-3
    )


def test_under_a_squared_error_the_kept_effect_is_the_kept_energy():
    base, changes = make_model(), of_rank(16, seed=5)
    goal = changed(base, changes)

    def loss(model):
        pairs = zip(model.parameters(), goal.parameters())
        return sum(((a - b) ** 2).sum().item() for a, b in pairs)

    kept = effect_numbers(base, changes, loss)
    energy = {name: singular_values(change) ** 2 for name, change in changes.items()}
    total = sum(e.sum() for e in energy.values())
    for k in KEPT:
        assert kept[f"kept_{k}"] == pytest.approx(
            (sum(e[:k].sum() for e in energy.values()) / total).item(), abs=1e-4
        )
    assert kept["kept_half"] == pytest.approx(0.75, abs=1e-4)
    assert kept["kept_4_control"] == pytest.approx(4 / 16, abs=0.12)


def test_an_update_that_learned_nothing_has_no_effect_to_share():
    base = make_model()
    with pytest.raises(ValueError, match="nothing was learned"):
        effect_numbers(base, of_rank(1, seed=1), lambda model: 1.0)

"""The explorer of rank, α, rate and start: its side-by-side runs are runs, and its map has the ridge that lesson 04 derives."""

import pytest
import torch

from labkit.lab.explore import knobs
from tests.lab import explorers


@pytest.fixture(scope="module")
def explorer():
    return explorers.Explorer(knobs, knobs.knobs_explorer)


def by_adamw(r: int, alpha: float, lr: float) -> torch.Tensor:
    """The losses of one run with PyTorch's optimizer."""
    W, x, y = knobs.problem()
    A, B = (part[0].clone().requires_grad_() for part in knobs.starting_point(knobs.A_RANDOM, r, 1))
    optimizer = torch.optim.AdamW([A, B], lr=lr, weight_decay=0)
    losses, scale = [], (y - x @ W.T).square().mean()
    for step in range(1, knobs.STEPS + 1):
        loss = (y - x @ (W + alpha / r * B @ A).T).square().mean() / scale
        optimizer.zero_grad()
        loss.backward()
        left = (knobs.STEPS + 1 - step) / (knobs.STEPS + 1 - knobs.WARMUP)
        optimizer.param_groups[0]["lr"] = lr * min(step / knobs.WARMUP, left)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_runs_side_by_side_are_each_the_run_that_adamw_does():
    alphas, rates = torch.tensor([4.0, 16.0, 64.0]), torch.tensor([0.01, 0.02, 0.005])
    together = knobs.train_side_by_side(4, alphas, rates, knobs.A_RANDOM)
    for i, (alpha, lr) in enumerate(zip(alphas.tolist(), rates.tolist())):
        torch.testing.assert_close(together[:-1, i], by_adamw(4, alpha, lr), rtol=1e-3, atol=1e-5)


def test_a_larger_alpha_wants_a_lower_rate_but_not_in_proportion():
    best = knobs.knob_map(8, knobs.A_RANDOM).argmin(1)
    low, high = best[knobs.ALPHAS.index(4.0)], best[knobs.ALPHAS.index(256.0)]
    assert 0 < low - high < 6  # alpha times 64; the best rate falls by less than as much


def test_with_both_at_zero_nothing_ever_happens():
    assert torch.equal(knobs.knob_map(8, knobs.NEITHER), torch.ones(len(knobs.ALPHAS), len(knobs.RATES)))


def test_a_start_that_is_the_base_has_its_loss_and_one_that_is_not_has_another():
    def first(start):
        return knobs.train_side_by_side(8, torch.tensor([64.0]), torch.tensor([0.01]), start)[0].item()

    assert first(knobs.A_RANDOM) == pytest.approx(1) and first(knobs.B_RANDOM) == pytest.approx(1)
    assert first(knobs.BOTH) > 1.01


@pytest.mark.parametrize(("start", "alpha"), [(knobs.NEITHER, 16.0), (knobs.BOTH, 256.0)])
def test_the_explorer_draws_every_start(explorer, start, alpha):
    assert f"α = {alpha:g}" in explorers.title(explorer.figure(start=start, alpha=alpha, r=1))


def test_the_explorer_has_a_control_for_each_knob():
    controls = explorers.Explorer(knobs, knobs.knobs_explorer, interactive=True).controls
    assert set(controls) == {"r", "alpha", "lr", "start"}

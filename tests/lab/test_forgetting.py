"""The furniture of `05_learns_less_forgets_less`: checks that name mistakes, fronts, the plane and its
explorer.
"""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from labkit.lab.check import forgetting as check
from labkit.lab.explore import forgetting as explore
from labkit.lab.figures import forgetting
from tests.lab import exercise_checks, explorers

# Exercises


def rise(base, tuned):
    return np.mean(np.subtract(tuned, base))


def by_rise(budget, gains, rises):
    order = np.argsort(rises)
    return np.interp(budget, [0, *np.array(rises)[order]], [0, *np.array(gains)[order]])


def bits(n, d, loss):
    return n * d * (math.log2(10) - loss * math.log2(math.e))


def half(values, t=None, ddof=1):
    n = len(values)
    t = t or {3: 4.302653, 4: 3.182446, 5: 2.776445}[n]
    return t * np.std(values, ddof=ddof) / math.sqrt(n)


CASES = [
    (
        check.forgetting_rise,
        rise,
        [
            (lambda b, t: np.mean(t), "loss after training"),
            (lambda b, t: np.mean(np.subtract(b, t)), "sign is flipped"),
            (lambda b, t: np.sum(np.subtract(t, b)), "sum over the domains"),
            (lambda b, t: np.mean(np.maximum(0, np.subtract(t, b))), "do not clip"),
            (lambda b, t: np.mean(np.abs(np.subtract(t, b))), "no absolute values"),
            (lambda b, t: np.mean(np.divide(t, b) - 1), "share of the base's loss"),
            (lambda b, t: max(np.subtract(t, b)), "worst domain"),
        ],
    ),
    (
        check.gap_share,
        lambda base, full, lora: 1 - (base - lora) / (base - full),
        [
            (lambda b, f, x: x / f - 1, "share of the \\*loss\\*"),
            (lambda b, f, x: (x - f) / b, "share of the base's loss"),
            (lambda b, f, x: (b - x) / (b - f), "share that LoRA reaches"),
            (lambda b, f, x: (x - f) / (b - x), "LoRA's own gain"),
            (lambda b, f, x: (f - x) / (b - f), "sign is flipped"),
            (lambda b, f, x: abs((x - f) / (b - f)), "no absolute value"),
            (lambda b, f, x: max(0, (x - f) / (b - f)), "do not clip at 0"),
            (lambda b, f, x: x - f, "these are nats"),
        ],
    ),
    (
        check.gain_within,
        by_rise,
        [
            (lambda b, g, r: np.interp(b, [0, *r], [0, *g]), "sort them by rise"),
            (lambda b, g, r: np.interp(b, *zip(*sorted(zip(r, g)))), "the base \\(0, 0\\) is a run too"),
            (lambda b, g, r: by_rise(b, r, g), "the other way round"),
            (lambda b, g, r: max([x for x, y in zip(g, r) if y <= b], default=0), "best run within the budget"),
            (lambda b, g, r: g[np.abs(np.subtract(r, b)).argmin()], "nearest to the budget"),
            (lambda b, g, r: max(g), "however much it forgot"),
        ],
    ),
    (
        check.bits_per_parameter,
        lambda n, d, loss, p: max(0, bits(n, d, loss)) / p,
        [
            (lambda n, d, loss, p: bits(n, d, loss) / p, "worse than guessing"),
            (lambda n, d, loss, p: max(0, n * d * (math.log2(10) - loss)) / p, "divide it by ln 2"),
            (lambda n, d, loss, p: max(0, n * d * (math.log(10) - loss)) / p, "these are nats"),
            (lambda n, d, loss, p: max(0, bits(n, 1, loss)) / p, "yours counts one"),
            (lambda n, d, loss, p: n * d * loss / math.log(2) / p, "still missing"),
            (lambda n, d, loss, p: n * d * math.log2(10) / p, "learned or not"),
            (lambda n, d, loss, p: max(0, bits(n, d, loss)), "divide by the number"),
        ],
    ),
]  # fmt: skip


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(CASES)


# Fronts

numbers = st.integers(-3, 8).map(lambda n: n / 4)  # few values, so ties are common
clouds = st.lists(st.tuples(numbers, numbers), max_size=8)


@given(clouds)
def test_a_front_is_what_no_run_beats(cloud):
    points = {(0.0, 0.0), *cloud}
    # as good in both and not the same: better in one
    beaten = {p for p in points for q in points if q != p and q[0] >= p[0] and q[1] <= p[1]}
    gains, rises = explore.front([g for g, _ in cloud], [r for _, r in cloud])
    assert list(zip(gains, rises)) == sorted(points - beaten)


@given(clouds, st.floats(-1, 3))
def test_the_cost_on_a_front_is_never_more_than_that_of_a_run_that_learns_enough(cloud, gain):
    gains, rises = [g for g, _ in cloud], [r for _, r in cloud]
    cost = explore.forgetting_at(gain, gains, rises)
    enough = [r for g, r in [(0, 0), *cloud] if g >= gain]
    assert math.isnan(cost) if not enough else cost <= min(enough) + 1e-12


def test_between_two_runs_the_cost_lies_on_the_straight_line_and_below_the_first_on_the_line_to_the_base():
    gains, rises = [0.8, 0.4, 0.7], [0.5, 0.1, 0.6]  # the last run is beaten by the first
    assert explore.forgetting_at(0.6, gains, rises) == pytest.approx(0.3)
    assert explore.forgetting_at(0.2, gains, rises) == pytest.approx(0.05)
    assert math.isnan(explore.forgetting_at(0.9, gains, rises))


def test_a_run_that_diverged_must_be_taken_out_first():
    with pytest.raises(ValueError, match="one finite number"):
        explore.front([0.1, math.nan], [0.1, 0.2])
    with pytest.raises(ValueError, match="2 gains and 1 rises"):
        explore.front([0.1, 0.2], [0.1])


# The plane and its explorer


@pytest.fixture(scope="module")
def runs():
    """Two seeds; at the same gain LoRA costs twice what full does, and three times that in the second
    domain.
    """
    rows = []
    for seed in (0, 1):
        for steps in (100, 300):
            for lr, gain in ((1e-3, 0.4), (2e-3, 0.8)):
                for family, price in (("full", 0.5 + 0.1 * seed), ("lora r=1", 1.0), ("lora r=8", 1.0)):
                    learned = gain * (0.5 if family == "lora r=1" else 1)
                    row = {"family": family, "steps": steps, "seed": seed, "lr": lr, "gain": learned}
                    kjv, pydocs = price * learned, 3 * price * learned
                    rows.append(row | {"kjv_rise": kjv, "pydocs_rise": pydocs, "rise": (kjv + pydocs) / 2})
    return pd.DataFrame(rows)


def test_costs_are_by_seed_and_leave_out_who_does_not_learn_enough(runs):
    costs = explore.costs_at(0.6, runs, "kjv_rise")
    assert costs == {"full": pytest.approx([0.3, 0.36]), "lora r=8": pytest.approx([0.6, 0.6])}


@pytest.fixture(scope="module")
def explorer(runs):
    return explorers.Explorer(explore, lambda: explore.plane_explorer(runs, gain=0.6))


def dots(figure):
    return [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "o"]


def test_the_explorer_shows_both_old_domains_headless_and_the_costs_of_each_seed(runs):
    kjv, pydocs = explorers.shown(explore, lambda: explore.plane_explorer(runs, gain=0.6))
    rows = [tick.get_text() for tick in kjv.axes[1].get_yticklabels()]
    assert rows == ["full", "lora r=8"]
    assert np.allclose(dots(kjv), [[0.3, 0.36], [0.6, 0.6]])
    assert np.allclose(dots(pydocs), [[0.9, 1.08], [1.8, 1.8]])


@pytest.mark.parametrize("steps", [100, 300, explore.ALL])
def test_the_explorer_draws_every_number_of_steps(explorer, steps):
    assert explorers.title(explorer.figure(steps=steps)) == f"{steps} steps"


@pytest.mark.parametrize("old", forgetting.OLD)
def test_the_explorer_draws_every_old_domain(explorer, old):
    assert explorer.figure(old=old).axes[1].get_xlabel() == f"forgotten: {old}"


def test_the_explorer_draws_the_lowest_gain_and_says_that_none_reaches_the_highest(explorer):
    assert "0.30" in explorers.title(explorer.figure(gain=0.3), axes=1)
    assert "none of them" in explorer.figure(gain=1.2).axes[1].texts[0].get_text()


@pytest.mark.parametrize("family", ["full", "lora r=1", "lora r=8"])
def test_the_explorer_draws_every_family_alone(runs, explorer, family):
    assert family in set(runs["family"])
    texts = [text.get_text() for text in explorer.figure(families=(family,)).axes[0].texts]
    assert texts == ["base", family]


def test_the_explorer_survives_no_family(explorer):
    figure = explorer.figure(families=())
    assert not figure.axes[0].lines and "none of them" in figure.axes[1].texts[0].get_text()


def test_every_run_is_a_dot_in_the_plane_and_hollow_dots_are_the_short_runs(runs):
    figure, axes = plt.subplots()
    forgetting.plane(runs, axes, "kjv_rise")
    dots = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_marker() != "*"]
    assert sum(len(line.get_xdata()) for line in dots) == len(runs)
    hollow = [line for line in dots if line.get_fillstyle() == "none"]
    assert sum(len(line.get_xdata()) for line in hollow) == (runs["steps"] == 100).sum()
    plt.close(figure)


def test_the_explorer_has_a_control_for_each_argument(runs):
    explorer = explorers.Explorer(explore, lambda: explore.plane_explorer(runs), interactive=True)
    assert set(explorer.controls) == {"families", "steps", "old", "gain"}


def test_what_is_missing_is_said(runs):
    with pytest.raises(ValueError, match="runs is empty"):
        explore.plane_explorer(runs[:0])
    with pytest.raises(ValueError, match="no column gain"):
        forgetting.plane(runs.drop(columns="gain"), axes=None)


def test_an_adapter_is_measured_once_for_each_strength(monkeypatch):
    asked = []

    def measure(strength):
        asked.append(strength)
        return 0.6 * strength**0.5, 0.7 * strength**2

    explorer = explorers.Explorer(explore, lambda: explore.turned_down_explorer(measure))
    asked.clear()
    figure = explorer.figure(strength=1.25)
    assert asked == [1.25] and explorers.title(figure, 1) == "learned 0.67, forgotten 1.09"
    explorer.figure(strength=1.25)
    assert asked == [1.25], "what was measured is known"
    assert len(explorers.shown(explore, lambda: explore.turned_down_explorer(measure))) == 1

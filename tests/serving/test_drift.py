"""Drift: false alarms counted over simulated samples, and changes that are found."""

import math

import numpy as np
import pytest
from scipy import stats

from labkit.serving.drift import find_drift, psi, psi_threshold


def lengths(chance, size, mean=40.0):
    """Numbers of tokens, as prompts have them: whole, skewed, with repeats."""
    return np.ceil(chance.gamma(2.0, mean / 2, size))


@pytest.mark.parametrize(("n", "m"), [(100, 100), (1000, 200), (2000, 2000)])
def test_equal_distributions_raise_false_alarms_as_often_as_was_asked_for(n, m):
    chance = np.random.default_rng(0)
    alarms = np.mean(
        [find_drift(lengths(chance, n), lengths(chance, m), alpha=0.05).found for _ in range(200)]
    )
    assert alarms <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)


def test_the_index_of_equal_distributions_has_the_distribution_that_the_threshold_assumes():
    chance = np.random.default_rng(1)
    counts = chance.multinomial(500, [0.1] * 10, (2, 1000))
    found = [psi(one, other) / (2 / 500) for one, other in zip(*counts)]
    assert stats.kstest(found, stats.chi2(9).cdf).statistic < 0.05


def test_the_usual_threshold_is_passed_by_small_samples_of_one_distribution():
    chance = np.random.default_rng(2)
    found = [psi(*chance.multinomial(50, [0.1] * 10, 2)) for _ in range(300)]
    assert (
        np.mean(np.array(found) > 0.1) > 0.9
        and np.mean(np.array(found) > psi_threshold(50, 50, 10, 0.05)) < 0.1
    )


def test_longer_prompts_and_other_shapes_are_found():
    chance = np.random.default_rng(3)
    before = lengths(chance, 1000)
    assert find_drift(before, lengths(chance, 1000, mean=50)).found
    assert find_drift(before, chance.normal(40, 5, 1000)).found
    assert find_drift(before, np.full(1000, 40.0)).found


def test_values_that_repeat_make_fewer_bins():
    chance = np.random.default_rng(4)
    same = find_drift(chance.integers(0, 2, 500), chance.integers(0, 2, 500))
    assert not same.found and same.threshold == psi_threshold(500, 500, 2, 0.005)
    assert (
        find_drift(np.zeros(100), np.zeros(100))[0] == 0.0
        and not find_drift(np.zeros(100), np.zeros(100)).found
    )


def test_the_index_is_symmetric_and_zero_of_equal_shares():
    assert psi([10, 20, 30], [10, 20, 30]) == 0
    assert psi([10, 20, 0], [0, 20, 10]) == psi([0, 20, 10], [10, 20, 0]) > 0


@pytest.mark.parametrize(
    ("before", "now"),
    [([1.0] * 49, [1.0] * 60), ([1.0] * 60, [math.nan] * 60), ([], []), ([math.inf] * 60, [1] * 60)],
)
def test_samples_that_say_nothing_are_refused(before, now):
    with pytest.raises(ValueError, match="must be finite, and at least 50 each for 10 bins"):
        find_drift(before, now)


@pytest.mark.parametrize(
    ("before", "now"), [([1, 2], [1, 2, 3]), ([-1, 2], [1, 2]), ([0, 0], [1, 2]), ([], [])]
)
def test_counts_that_do_not_compare_are_refused(before, now):
    with pytest.raises(ValueError, match="must be of the same bins"):
        psi(before, now)

"""Intervals against scipy's, and against what they must be by their definition."""

import numpy as np
import pytest
from scipy.stats import binomtest

from labkit.training.intervals import bootstrap, wilson


@pytest.mark.parametrize("right, n", [(0, 1), (0, 48), (3, 7), (20, 48), (81, 100), (4, 4), (499, 500)])
def test_wilson_equals_scipy(right, n):
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_wilson_after_four_of_four_is_not_certain():
    low, high = wilson(4, 4)
    assert low < 0.55 and high == 1
    assert wilson(0, 4) == pytest.approx((1 - high, 1 - low))


def test_bootstrap_agrees_with_the_normal_interval_for_many_records():
    totals = np.random.default_rng(1).gamma(2.0, 3.0, size=400)
    low, high = bootstrap(totals.tolist(), [1] * 400)
    half = 1.96 * totals.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((totals.mean() - half, totals.mean() + half), abs=0.1 * half)


def test_bootstrap_is_over_tokens_and_draws_whole_records():
    low, high = bootstrap([10.0, 0.0], [10, 90])
    assert (low, high) == pytest.approx((0.0, 1.0))  # one record drawn twice, either way
    assert bootstrap([6.0] * 9, [3] * 9) == pytest.approx((2.0, 2.0))  # equal records leave nothing to chance


def test_bootstrap_is_the_same_for_the_same_seed():
    totals, counts = [1.0, 5.0, 2.0, 8.0], [3, 4, 2, 7]
    assert (
        bootstrap(totals, counts, seed=3)
        == bootstrap(totals, counts, seed=3)
        != bootstrap(totals, counts, seed=4)
    )


@pytest.mark.parametrize("right, n", [(5, 4), (-1, 4), (0, 0), (True, 3), (1.5, 3)])
def test_a_share_that_is_none_is_refused(right, n):
    with pytest.raises(ValueError, match="right|n="):
        wilson(right, n)


@pytest.mark.parametrize("totals, counts", [([], []), ([1.0], []), ([1.0, 2.0], [3, 0])])
def test_totals_without_counts_are_refused(totals, counts):
    with pytest.raises(ValueError, match="counts"):
        bootstrap(totals, counts)

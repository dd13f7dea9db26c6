"""Do today's inputs, or answers, look like those that a version was judged on? Lengths, classes, scores.

The population stability index compares shares of bins, PSI = sum (p - q) ln(p / q). The usual thresholds .1 and .25 say
nothing of how many records there are: with 50 a side, equal distributions pass .1 most of the time, and with 50,000 a
real change never does. Under equal distributions PSI is about (1/n + 1/m) times a chi-squared number with one degree of
freedom less than there are bins; the threshold here is its quantile. Beside it stands the two-sample test of Kolmogorov
and Smirnov, which needs no bins.

Source: Yurdakul, "Statistical properties of population stability index", Western Michigan University, 2018, chapter 3.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from labkit.checks import check_number, check_whole, needed

SMOOTHING = 0.5  # added to each bin: an empty one would make the index infinite
RARE = 10  # records of a class in both samples together, below which it is pooled with the others


class Drift(NamedTuple):
    """How far two samples are from each other.

    Attributes:
        psi: the population stability index.
        threshold: what it stays below in a share 1 - alpha of all cases, if nothing has changed.
        p_value: of the two-sample test of Kolmogorov and Smirnov.
        found: does either say that something has changed?
    """

    psi: float
    threshold: float
    p_value: float
    found: bool


def find_drift(before: Sequence[float], now: Sequence[float], bins: int = 10, alpha: float = 0.01) -> Drift:
    """Compare two samples of numbers. Of both tests each gets half of `alpha`.

    Args:
        before: such as the lengths of the prompts that a version was judged on.
        now: of late.
        bins: at quantiles of both samples together; fewer, where values repeat.
        alpha: the share of false alarms.

    Raises:
        ValueError: fewer than five records a bin, or values that are not finite.
    """
    check_whole("bins", bins, at_least=2)
    check_number("alpha", alpha, at_least=1e-12, below=1)
    one, other = (np.asarray(values, dtype=float).ravel() for values in (before, now))
    if min(len(one), len(other)) < 5 * bins or not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError(
            f"{len(one)} and {len(other)} values must be finite, and at least {5 * bins} each for {bins} bins"
        )
    together = np.concatenate([one, other])
    edges = np.unique(np.quantile(together, np.linspace(0, 1, bins + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
        for values in (one, other)
    ]
    used = counts[0] + counts[1] > 0
    index = psi(counts[0][used], counts[1][used])
    threshold = psi_threshold(len(one), len(other), int(used.sum()), alpha / 2)
    stats = needed("scipy.stats", "the test of Kolmogorov and Smirnov")
    p_value = float(stats.ks_2samp(one, other, method="asymp").pvalue)
    return Drift(index, threshold, p_value, index > threshold or p_value < alpha / 2)


def find_class_drift(before: Sequence[Hashable], now: Sequence[Hashable], alpha: float = 0.01) -> Drift:
    """Compare two samples of classes, such as labels, or the first tokens of answers.

    Classes with fewer than ten records in both samples together are one class. The p-value is that of the index.

    Args:
        before, now, alpha: as for `find_drift`.

    Raises:
        ValueError: fewer than 50 records.
    """
    check_number("alpha", alpha, at_least=1e-12, below=1)
    if min(len(before), len(now)) < 50:
        raise ValueError(f"{len(before)} and {len(now)} classes must be at least 50 each")
    one, other = Counter(before), Counter(now)
    kept = [kind for kind, count in (one + other).items() if count >= RARE]
    counts = [
        [*(side[kind] for kind in kept), side.total() - sum(side[k] for k in kept)] for side in (one, other)
    ]
    if not counts[0][-1] + counts[1][-1]:
        counts = [side[:-1] for side in counts]
    index, bins = psi(*counts), len(counts[0])
    threshold = psi_threshold(len(before), len(now), bins, alpha)
    stats = needed("scipy.stats", "the tail of a chi-squared number")
    scaled = index / (1 / len(before) + 1 / len(now))
    return Drift(index, threshold, float(stats.chi2.sf(scaled, max(bins - 1, 1))), index > threshold)


def psi(before: Sequence[int] | np.ndarray, now: Sequence[int] | np.ndarray) -> float:
    """The population stability index of counts by bin, or by class.

    Raises:
        ValueError: counts that are negative, of other bins, or none.

    >>> round(psi([50, 50], [80, 20]), 3)
    0.406
    """
    one, other = np.asarray(before, dtype=float), np.asarray(now, dtype=float)
    if (
        one.shape != other.shape
        or one.ndim != 1
        or (one < 0).any()
        or (other < 0).any()
        or not one.sum() * other.sum()
    ):
        raise ValueError(
            f"counts {before!r} and {now!r} must be of the same bins, none negative, and not all 0"
        )
    p, q = ((counts + SMOOTHING) / (counts + SMOOTHING).sum() for counts in (one, other))
    return float(((p - q) * np.log(p / q)).sum())


def psi_threshold(n: int, m: int, bins: int, alpha: float) -> float:
    """What the index of samples of `n` and `m` passes with probability `alpha`, if nothing has changed.

    >>> round(psi_threshold(50, 50, 10, 0.05), 2), round(psi_threshold(50_000, 50_000, 10, 0.05), 4)
    (0.68, 0.0007)
    """
    stats = needed("scipy.stats", "the quantile of a chi-squared number")
    return float((1 / n + 1 / m) * stats.chi2.ppf(1 - alpha, max(bins - 1, 1)))

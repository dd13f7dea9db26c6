"""How far a number from few records may be off: 95 % intervals for a share, and for a mean over tokens.

*Share* (Wilson 1927): of n answers k are right. The interval holds every rate p at which k is no surprise,

    |k/n - p| <= z sqrt(p (1 - p) / n),      z = 1.96

The textbook's k/n ± z sqrt(k/n (1 - k/n) / n) takes the spread at k/n instead, which for 0 or n right answers is
zero: it would be certain after four of four.

*Mean over tokens* (bootstrap; Efron 1979): tokens of one record come together, so whole records are drawn, with
replacement, as many as there are, and the mean is taken again; the interval holds the middle 95 % of these means.
With a handful of records it is too narrow.
"""

import math
from collections.abc import Sequence

import numpy as np

from labkit.checks import check_whole

Z = 1.959964  # 97.5 % of a normal distribution lie below
DRAWS = 2000


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, of `right` among `n`.

    Raises:
        ValueError: n is no whole number of at least 1, or `right` is not one from 0 to n.

    >>> [round(bound, 3) for bound in wilson(4, 4)]
    [0.51, 1.0]
    """
    check_whole("n", n)
    check_whole("right", right, at_least=0)
    if right > n:
        raise ValueError(f"right={right} must be at most n={n}")
    share, z = right / n, Z * Z / n
    middle = (share + z / 2) / (1 + z)
    half = Z * math.sqrt(share * (1 - share) / n + z / (4 * n)) / (1 + z)
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def bootstrap(totals: Sequence[float], counts: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of sum(totals) / sum(counts), records drawn again and again.

    Args:
        totals: of each record, its summed loss; or the difference of two, for a paired comparison.
        counts: of each record, its tokens.
        seed: of the draws.

    Raises:
        ValueError: no records, not as many counts as totals, or counts that are not above 0.
    """
    if not len(totals) or len(totals) != len(counts) or min(counts) <= 0:
        raise ValueError(
            f"{len(totals)} totals with {len(counts)} counts; give as many of each, at least one, and counts above 0"
        )
    drawn = np.random.default_rng(seed).integers(len(totals), size=(DRAWS, len(totals)))
    means = np.asarray(totals, float)[drawn].sum(1) / np.asarray(counts, float)[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

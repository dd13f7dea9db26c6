"""Checks of the exercises of the capstone: how far the worst seed is ahead, and when paired evidence suffices."""

import math
import random
from collections.abc import Callable

from labkit.lab.check.compare import compare


def ahead(function: Callable) -> None:
    """`function(runs, rivals)`: the share by which the worst seed beats the best rival.

    `runs` holds a list of scores, 0 or 1, for each seed; `rivals` one for each baseline. All are of the same records.
    """

    def inputs():
        n = random.randint(20, 30)

        def scores(right):
            return random.sample([1] * right + [0] * (n - right), n)

        high = random.sample(range(n // 2 + 1, n), 3)
        low = random.sample(range(1, n // 2), 3)
        return [scores(right) for right in high], [scores(right) for right in low]

    def shares(lists):
        return [sum(scores) / len(scores) for scores in lists]

    def mean(values):
        return sum(values) / len(values)

    compare(
        "ahead",
        function,
        lambda runs, rivals: min(shares(runs)) - max(shares(rivals)),
        {
            "that is the *best* seed; whoever ships one run ships any of them": (
                lambda runs, rivals: max(shares(runs)) - max(shares(rivals))
            ),
            "that is the mean of the seeds; the gate asks for the worst one": (
                lambda runs, rivals: mean(shares(runs)) - max(shares(rivals))
            ),
            "that beats the *weakest* rival; take the strongest": (
                lambda runs, rivals: min(shares(runs)) - min(shares(rivals))
            ),
            "that beats the mean of the rivals; take the strongest": (
                lambda runs, rivals: min(shares(runs)) - mean(shares(rivals))
            ),
            "the sign: above zero means that the adapter is ahead": (
                lambda runs, rivals: max(shares(rivals)) - min(shares(runs))
            ),
            "that counts records; a share divides by how many there are": (
                lambda runs, rivals: min(map(sum, runs)) - max(map(sum, rivals))
            ),
        },
        inputs,
    )


def pairs_until(function: Callable) -> None:
    """`function(pairs, alpha)`: after how many pairs the evidence that the candidate is worse reaches 1/alpha; 0 if never.

    `pairs` holds (score of the control, score of the candidate), each 0 or 1. Equal scores count as a pair and say nothing.
    """
    cases: list[str] = []

    def inputs():
        if not cases:
            cases.extend(random.sample(["worse", "worse", "ties", "better", "late"], 5))
        case = cases.pop()
        worse, better, tie = (1, 0), (0, 1), random.choice([(0, 0), (1, 1)])
        pairs = {
            "worse": [worse] * 7 + [better] + [worse] * random.randint(10, 14),
            "ties": [pair for _ in range(16) for pair in (tie, worse)],
            "better": [better] * random.randint(12, 16) + [worse],
            "late": [better, better, better] + [worse] * random.randint(22, 26),
        }[case]
        return pairs, random.choice([0.05, 0.02])

    def until(pairs, alpha, with_this=False, both=False, ties=False, threshold=None, only_unequal=False):
        logs = total = unequal = 0.0
        seen = 0
        for n, (control, candidate) in enumerate(pairs, 1):
            if control == candidate and not ties:
                continue
            seen += 1
            d = (1 + candidate - control) / 2
            q = (total + 0.5 + d * with_this) / (unequal + 1 + with_this)
            if q < 0.5 or both:
                logs += d * math.log(2 * q) + (1 - d) * math.log(2 * (1 - q))
            total, unequal = total + d, unequal + 1
            if logs >= (math.log(1 / alpha) if threshold is None else threshold):
                return seen if only_unequal else n
        return 0

    compare(
        "pairs_until",
        function,
        until,
        {
            "q is the mean of the pairs *before*: yours has seen the pair that it bets on": (
                lambda pairs, alpha: until(pairs, alpha, with_this=True)
            ),
            "there is a bet only where q < 1/2: while the candidate looks better, the factor is 1": (
                lambda pairs, alpha: until(pairs, alpha, both=True)
            ),
            "pairs with equal scores say nothing: they change neither q nor the evidence": (
                lambda pairs, alpha: until(pairs, alpha, ties=True)
            ),
            "the evidence is a product: compare it with 1/alpha, not with alpha": (
                lambda pairs, alpha: until(pairs, alpha, threshold=math.log(alpha))
            ),
            "every pair counts as one that was asked, the equal ones too": (
                lambda pairs, alpha: until(pairs, alpha, only_unequal=True)
            ),
        },
        inputs,
    )

"""Checks of the exercises on your own data: near copies, the interval of a share, the steps that minutes hold."""

import math
import random
from collections.abc import Callable

from labkit.lab.check.compare import compare
from labkit.training.intervals import Z, wilson

WORDS = (
    "the",
    "path",
    "by",
    "mill",
    "river",
    "steps",
    "loose",
    "wet",
    "dog",
    "gate",
    "field",
    "rain",
    "closed",
)
RUN = 3


def runs(text: str, n: int = RUN) -> list[tuple[str, ...]]:
    """The runs of `n` words of a text, in lower case."""
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n))))


def shared(one: set, other: set) -> float:
    """|A ∩ B| / |A ∪ B|"""
    return len(one & other) / len(one | other)


def near_copy(function: Callable) -> None:
    """`function(one, other)`: what two texts have in common, of all their different runs of three words."""

    def inputs():
        words = [random.choice(WORDS) for _ in range(random.randint(11, 16))]
        start = random.randint(1, 3)
        changed = words[start:] + words[4:9] + [random.choice(WORDS)]  # a part of it stands there twice
        changed[0] = changed[0].upper()
        return " ".join(words), " ".join(changed)

    def right(one, other):
        return shared(set(runs(one)), set(runs(other)))

    compare(
        "near_copy",
        function,
        right,
        {
            "lower the case first: “The path” and “the path” are the same words": lambda a, b: shared(
                *(set(zip(*(t.split()[i:] for i in range(RUN)))) for t in (a, b))
            ),
            "these are single words, which any two texts on one subject share; compare runs of three": (
                lambda a, b: shared(set(a.lower().split()), set(b.lower().split()))
            ),
            "these are runs of two words; take three": lambda a, b: shared(set(runs(a, 2)), set(runs(b, 2))),
            "divided by the runs of one text: that is containment; divide by the runs that either has": (
                lambda a, b: len(set(runs(a)) & set(runs(b))) / len(set(runs(a)))
            ),
            "divided by the runs of both texts together, the common ones twice; divide by those of the union": (
                lambda a, b: len(set(runs(a)) & set(runs(b))) / (len(set(runs(a))) + len(set(runs(b))))
            ),
            "runs that stand in a text twice are counted twice; take sets": lambda a, b: (
                sum(run in set(runs(b)) for run in runs(a)) / len(set(runs(a)) | set(runs(b)))
            ),
        },
        inputs,
    )


def share_interval(function: Callable) -> None:
    """`function(right, n)`: Wilson's 95 % interval of a share, (low, high)."""

    def inputs():
        n = random.randint(10, 60)
        return random.choice([0, 1, random.randint(2, n - 1), n]), n

    def wilson_with(right, n, z=Z, centre=True, inner=True):
        share, zz = right / n, z * z / n
        middle = (share + zz / 2 if centre else share) / (1 + zz)
        half = z * math.sqrt(share * (1 - share) / n + (zz / (4 * n) if inner else 0)) / (1 + zz)
        return middle - half, middle + half

    def plain(right, n):
        share = right / n
        half = Z * math.sqrt(share * (1 - share) / n)
        return share - half, share + half

    compare(
        "share_interval",
        function,
        wilson,
        {
            "that is p ± z √(p(1 − p)/n), of width zero after n of n; Wilson's moves the middle towards one half": plain,
            "that is the plain interval, clipped to 0 and 1; Wilson's needs no clipping": lambda k, n: (
                max(0.0, plain(k, n)[0]),
                min(1.0, plain(k, n)[1]),
            ),
            "the middle is (p + z²/2n) / (1 + z²/n), not p / (1 + z²/n)": lambda k, n: wilson_with(
                k, n, centre=False
            ),
            "under the root, z²/4n² is missing": lambda k, n: wilson_with(k, n, inner=False),
            "z = 1.645 is for 90 %; 95 % on both sides takes 1.96": lambda k, n: wilson_with(k, n, z=1.645),
            "1 + z²/n divides both the middle and the half width": lambda k, n: tuple(
                bound * (1 + Z * Z / n) for bound in wilson_with(k, n)
            ),
        },
        inputs,
    )


def budget_steps(function: Callable) -> None:
    """`function(lengths, batch_size, minutes, tokens_per_second)`: how many whole steps the minutes hold."""

    def tokens_of_a_step(lengths, batch_size):
        return batch_size * sum(lengths) / len(lengths)

    def inputs():
        while True:
            lengths = [random.randint(20, 120) for _ in range(random.randint(30, 60))]
            batch_size, minutes, speed = (
                random.choice([2, 4, 8]),
                random.randint(2, 5),
                random.randint(150, 400),
            )
            part = minutes * 60 * speed / tokens_of_a_step(lengths, batch_size) % 1
            if 0.1 < part < 0.9:  # else rounding could decide
                return lengths, batch_size, minutes, speed

    compare(
        "budget_steps",
        function,
        lambda n, b, m, s: int(m * 60 * s / tokens_of_a_step(n, b)),
        {
            "minutes are 60 seconds each, and the speed is per second": lambda n, b, m, s: int(
                m * s / tokens_of_a_step(n, b)
            ),
            "that is how many records fit; a step takes batch_size of them": lambda n, b, m, s: int(
                m * 60 * s / tokens_of_a_step(n, 1)
            ),
            "each step is counted as long as the longest record; on average it has batch_size * mean tokens": (
                lambda n, b, m, s: int(m * 60 * s / (b * max(n)))
            ),
            "rounded up: the last step would not be done in time": lambda n, b, m, s: (
                1 + int(m * 60 * s / tokens_of_a_step(n, b))
            ),
            "that is how many passes over all records fit": lambda n, b, m, s: int(m * 60 * s / sum(n)),
            "a step is a whole number: a part of one is not taken": lambda n, b, m, s: (
                m * 60 * s / tokens_of_a_step(n, b)
            ),
        },
        inputs,
    )

"""Checks of the exercises on learning and forgetting: rises, gaps, gains within a budget, and bits."""

import math
import random
from collections.abc import Callable
from itertools import cycle, pairwise

import numpy as np

from labkit.lab.check.compare import compare


def mean(values) -> float:
    return sum(values) / len(values)


def forgetting_rise(function: Callable) -> None:
    """`function(base, tuned)`: the mean rise of the losses on the old domains, lists in the same order."""

    def inputs():
        n = random.randint(2, 5)
        base = [random.uniform(3, 4) for _ in range(n)]
        # one domain becomes easier, the others harder, and by different amounts
        tuned = [b + random.uniform(0.1, 0.9) for b in base]
        tuned[random.randrange(n)] -= 1.2
        return base, tuned

    def rises(base, tuned):
        return [t - b for b, t in zip(base, tuned)]

    compare(
        "forgetting_rise",
        function,
        lambda base, tuned: mean(rises(base, tuned)),
        {
            "that is the loss after training; forgetting is its *rise* over the base's": lambda b, t: mean(t),
            "the sign is flipped: a higher loss on an old domain is forgetting, and counts as positive": (
                lambda b, t: mean(rises(t, b))
            ),
            "that is the sum over the domains; take the mean, or two domains forget twice as much as one": (
                lambda b, t: sum(rises(b, t))
            ),
            "a domain that became easier counts too, as a negative rise; do not clip it at 0": (
                lambda b, t: mean([max(0.0, r) for r in rises(b, t)])
            ),
            "a domain that became easier is not forgotten: no absolute values": (
                lambda b, t: mean([abs(r) for r in rises(b, t)])
            ),
            "that is a share of the base's loss; the question asks for nats": (
                lambda b, t: mean([r / x for r, x in zip(rises(b, t), b)])
            ),
            "that is the worst domain; take the mean": lambda b, t: max(rises(b, t)),
        },
        inputs,
    )


def gap_share(function: Callable) -> None:
    """`function(base, full, lora)`: the share of full fine-tuning's gain that LoRA misses, from the three
    losses; 0 if it misses nothing.
    """

    lora_wins = cycle([False, True])  # alternately; first False, where a flipped sign differs from abs

    def inputs():
        base = random.uniform(4.5, 5.5)
        full = base - random.uniform(0.6, 1.0)
        return base, full, full + (-1 if next(lora_wins) else 1) * random.uniform(0.05, 0.3)

    compare(
        "gap_share",
        function,
        lambda base, full, lora: (lora - full) / (base - full),
        {
            "that is a share of the *loss*, most of which nobody can remove; divide by full's gain over the base": (
                lambda b, f, x: (x - f) / f
            ),
            "that is a share of the base's loss; divide by full's gain over the base": lambda b, f, x: (
                (x - f) / b
            ),
            "that is the share that LoRA reaches; the question asks for what is missing": (
                lambda b, f, x: (b - x) / (b - f)
            ),
            "that is a share of LoRA's own gain; full's gain is the yardstick": lambda b, f, x: (
                (x - f) / (b - x)
            ),
            "LoRA may win, and then the share is negative: no absolute value": (
                lambda b, f, x: abs(x - f) / (b - f)
            ),
            "do not clip at 0: a LoRA that learned more has a negative gap": (
                lambda b, f, x: max(0.0, x - f) / (b - f)
            ),
            "the sign is flipped: a LoRA that learned less has a positive gap": lambda b, f, x: (
                (f - x) / (b - f)
            ),
            "these are nats; the question asks for a share of full's gain": lambda b, f, x: x - f,
        },
        inputs,
    )


def gain_within(function: Callable) -> None:
    """`function(budget, gains, rises)`: what a method learns if it may forget `budget`, along straight lines
    between its runs in the order of their rise, starting from the base (0, 0). Both lists are ordered by
    learning rate.
    """

    # alternately, so both are tried; "between" first, where the nearest run and a missing base differ
    place = cycle(["between", "before the first"])

    def inputs():
        n = random.randint(4, 6)
        rises = [0.1 + 0.15 * k + random.uniform(0.01, 0.1) for k in range(n)]
        gains = [0.3 + 0.12 * k + random.uniform(0.01, 0.1) for k in range(n)]
        if next(place) == "between":
            k = random.randrange(n - 2)  # not before the last, which is the best of all
            # nearer to the next run, which exceeds the budget
            budget = rises[k] + random.uniform(0.6, 0.9) * (rises[k + 1] - rises[k])
        else:
            budget = rises[0] * random.uniform(0.55, 0.9)
        order = [*range(n - 2, -1, -1), n - 1]  # falling except for the last: a forgotten sort must show
        return budget, [gains[k] for k in order], [rises[k] for k in order]

    compare(
        "gain_within",
        function,
        lambda budget, gains, rises: line(budget, [0, *rises], [0, *gains]),
        {
            "the runs are ordered by learning rate: sort them by rise before you interpolate": (
                lambda b, g, r: unsorted_line(b, [0, *r], [0, *g])
            ),
            "the base (0, 0) is a run too: below the first run the line goes to it": lambda b, g, r: line(
                b, r, g
            ),
            "that is what a *gain* of `budget` costs; the question is the other way round": (
                lambda b, g, r: line(b, [0, *g], [0, *r])
            ),
            "that is what a *gain* of `budget` costs, without the base; the question is the other way round": (
                lambda b, g, r: line(b, g, r)
            ),
            "that is the best run within the budget; between two runs, follow the straight line": (
                lambda b, g, r: max([0.0] + [gain for gain, rise in zip(g, r) if rise <= b])
            ),
            "that is the run nearest to the budget; between two runs, follow the straight line": (
                lambda b, g, r: min(zip(r, g), key=lambda run: abs(run[0] - b))[1]
            ),
            "that is the best of all runs, however much it forgot": lambda b, g, r: max(g),
        },
        inputs,
    )


def line(x: float, xs: list[float], ys: list[float]) -> float:
    """Linear interpolation through the points, sorted by xs; constant beyond both ends."""
    points = sorted(zip(xs, ys))
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def unsorted_line(x: float, xs: list[float], ys: list[float]) -> float:
    """What numpy.interp makes of points that are not sorted."""
    return float(np.interp(x, xs, ys))


def bits_per_parameter(function: Callable) -> None:
    """`function(facts, digits, loss, parameters)`: bits learned per trained parameter; `loss` is the mean
    over the digits, in nats, and anything worse than guessing counts as 0.
    """

    guessing_is_better = cycle([False, False, True])

    def inputs():
        loss = random.uniform(2.4, 3.0) if next(guessing_is_better) else random.uniform(0.05, 2.0)
        return random.randint(100, 5000), random.randint(2, 6), loss, random.randint(10_000, 400_000)

    def bits(facts, digits, loss):
        return facts * digits * (math.log2(10) - loss / math.log(2))

    compare(
        "bits_per_parameter",
        function,
        lambda n, d, loss, p: max(0.0, bits(n, d, loss)) / p,
        {
            "worse than guessing counts as 0 bits, not as fewer": lambda n, d, loss, p: bits(n, d, loss) / p,
            "the loss is in nats; divide it by ln 2 to get bits": (
                lambda n, d, loss, p: max(0.0, n * d * (math.log2(10) - loss)) / p
            ),
            "these are nats; a nat is 1 / ln 2 = 1.44 bits": (
                lambda n, d, loss, p: max(0.0, n * d * (math.log(10) - loss)) / p
            ),
            "each fact has `digits` digits; yours counts one": (
                lambda n, d, loss, p: max(0.0, bits(n, 1, loss)) / p
            ),
            "these are the bits that are still missing; what was learned is the rest of log2(10) per digit": (
                lambda n, d, loss, p: n * d * loss / math.log(2) / p
            ),
            "that is what the facts hold, learned or not": lambda n, d, loss, p: n * d * math.log2(10) / p,
            "these are all the bits; divide by the number of trained parameters": (
                lambda n, d, loss, p: max(0.0, bits(n, d, loss))
            ),
        },
        inputs,
    )

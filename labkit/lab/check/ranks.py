"""Checks of the exercises on rank and targets: parameters, intervals, the best rate, the Pareto front."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle
from operator import itemgetter

from scipy import stats

from labkit.lab.check.compare import compare


def target_parameters(function: Callable) -> None:
    """`function(shapes, targets, layers, r)`: parameters of LoRA on the named matrices of every block.

    `shapes` is {name: (out, in)} of one block; `targets` are some of its names.
    """

    def inputs():
        # numbers of layers and ranks at which no two of the mistakes give the same answer
        return *block(), random.choice([6, 7, 8, 9]), random.choice([11, 13])

    compare(
        "target_parameters",
        function,
        lambda shapes, targets, layers, r: layers * r * total(shapes, targets),
        {
            "that is every matrix of the block; only the named ones get an adapter": (
                lambda shapes, targets, layers, r: layers * r * total(shapes, shapes)
            ),
            "that is one block; the model has `layers` of them": (
                lambda shapes, targets, layers, r: r * total(shapes, targets)
            ),
            "the rank is missing": lambda shapes, targets, layers, r: layers * total(shapes, targets),
            "that is twice the number: A has r * in and B has out * r, which makes r * (in + out)": (
                lambda shapes, targets, layers, r: 2 * layers * r * total(shapes, targets)
            ),
            "that is the number of weights in the matrices themselves, which LoRA freezes": (
                lambda shapes, targets, layers, r: layers * total(shapes, targets, math.prod)
            ),
            "yours multiplies the two sides; an adapter has r * in and r * out, and their *sum* is r * (in + out)": (
                lambda shapes, targets, layers, r: layers * r * total(shapes, targets, math.prod)
            ),
            "A alone is counted; B has out * r": (
                lambda shapes, targets, layers, r: layers * r * total(shapes, targets, itemgetter(1))
            ),
            "B alone is counted; A has r * in": (
                lambda shapes, targets, layers, r: layers * r * total(shapes, targets, itemgetter(0))
            ),
        },
        inputs,
    )


def rank_for_budget(function: Callable) -> None:
    """`function(shapes, targets, layers, budget)`: the largest rank within `budget` parameters."""

    def inputs():
        shapes, targets = block()
        layers = random.randint(3, 6)
        per_rank = layers * total(shapes, targets)
        rank, rest = random.randint(60, 200), random.uniform(0.6, 0.9)  # nearer to the next rank
        return shapes, targets, layers, int(per_rank * (rank + rest))

    def whole(shapes, targets, layers, budget):
        return budget // (layers * total(shapes, targets))

    compare(
        "rank_for_budget",
        function,
        whole,
        {
            "that is one rank too many: rounded to the nearest or up, it exceeds the budget": (
                lambda *given: whole(*given) + 1
            ),
            "a rank is a whole number: round down": (
                lambda shapes, targets, layers, budget: budget / (layers * total(shapes, targets))
            ),
            "that spends the budget on one block; it is for all `layers`": (
                lambda shapes, targets, layers, budget: budget // total(shapes, targets)
            ),
            "that counts every matrix of the block; only the named ones get an adapter": (
                lambda shapes, targets, layers, budget: budget // (layers * total(shapes, shapes))
            ),
            "that is half of it: a matrix costs r * (in + out), without another factor of 2": (
                lambda shapes, targets, layers, budget: budget // (2 * layers * total(shapes, targets))
            ),
            "that divides by the weights of the matrices; an adapter costs in + out per rank, not in * out": (
                lambda shapes, targets, layers, budget: budget // (layers * total(shapes, targets, math.prod))
            ),
        },
        inputs,
    )


def block() -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Shapes (out, in) of the matrices of a block, with grouped queries, and some of their names."""
    head = random.choice([16, 32, 64])
    hidden, kv, mlp = head * random.choice([4, 6, 8]), head * 2, head * random.choice([11, 13, 17])
    shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    shapes |= {"o_proj": (hidden, hidden)}
    shapes |= {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    # their outputs and inputs differ in sum, so A alone and B alone give different answers
    targets = [["q_proj", "v_proj"], ["k_proj", "v_proj"], ["gate_proj", "up_proj"], ["v_proj"]]
    return shapes, random.choice(targets)


def total(shapes: dict[str, tuple[int, int]], names: Iterable[str], of: Callable = sum) -> int:
    """Over the named matrices: the sum of `of` (out, in), by default of out + in."""
    return sum(of(shapes[name]) for name in names)


@cache
def student(quantile: float, freedom: int) -> float:
    """Quantile of Student's distribution with that many degrees of freedom."""
    return float(stats.t.ppf(quantile, freedom))


def interval95(function: Callable) -> None:
    """`function(values)`: (mean, half-width of the 95 % interval of the mean), by Student's t."""

    def inputs():
        centre = random.uniform(1, 6)
        return ([random.gauss(centre, 0.5) for _ in range(random.choice([3, 5, 6, 7]))],)  # at n = 4, √n is 2

    def answer(values, factor=None, ddof=1, root=True, whole=1):
        n = len(values)
        mean = sum(values) / n
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - ddof))
        factor = factor or student(0.975, n - 1)
        return mean, whole * factor * deviation / (math.sqrt(n) if root else 1)

    def ends(values):
        mean, half = answer(values)
        return mean - half, mean + half

    normal = float(stats.norm.ppf(0.975))  # 1.96
    compare(
        "interval95",
        function,
        answer,
        {
            "1.96 is for many values; with n of them use Student's t with n - 1 degrees of freedom": (
                lambda v: answer(v, normal)
            ),
            "√n is missing: that is how far single seeds scatter, not how well their mean is known": (
                lambda v: answer(v, root=False)
            ),
            "divide the sum of squares by n - 1: the mean was estimated from the same values": (
                lambda v: answer(v, ddof=0)
            ),
            "use Student's t instead of 1.96, and divide the sum of squares by n - 1": (
                lambda v: answer(v, normal, ddof=0)
            ),
            "Student's t has n - 1 degrees of freedom, not n": lambda v: answer(v, student(0.975, len(v))),
            "2.5 % are left out on each side: take the quantile 0.975, not 0.95": (
                lambda v: answer(v, student(0.95, len(v) - 1))
            ),
            "that is the whole width; give half of it": lambda v: answer(v, whole=2),
            "that is the standard deviation; multiply by Student's t and divide by √n": (
                lambda v: answer(v, factor=1, root=False)
            ),
            "that is the standard error; multiply by Student's t": lambda v: answer(v, factor=1),
            "those are the ends of the interval; give its centre and half its width": ends,
        },
        inputs,
    )


def best_rate(function: Callable) -> None:
    """`function(rates, losses)`: the rate at the bottom of the parabola in log(rate) through three points."""

    bottoms = cycle([-0.4, 0.4])  # alternately on either side of the middle point

    def inputs():
        middle, step = 10 ** random.uniform(-3, -2), random.choice([2.5, 3])
        rates = [middle / step, middle, middle * step]
        bottom = math.log(middle) + next(bottoms)
        curve, height = random.uniform(0.05, 0.2), random.uniform(2, 4)
        return rates, [height + curve * (math.log(rate) - bottom) ** 2 for rate in rates]

    compare(
        "best_rate",
        function,
        lambda rates, losses: math.exp(vertex(logs(rates), losses)),
        {
            "that is the best of the three that were tried; the bottom of the parabola lies between them": (
                lambda rates, losses: rates[losses.index(min(losses))]
            ),
            "your parabola is in the rate itself; learning rates act by factors, so take log(rate)": vertex,
            "that is the logarithm of the rate; take exp of it": (
                lambda rates, losses: vertex(logs(rates), losses)
            ),
            "that is log10 of the rate; take 10 to that power": (
                lambda rates, losses: vertex([math.log10(r) for r in rates], losses)
            ),
            "your logarithm is to base 10, but exp is to base e: use 10 ** x": (
                lambda rates, losses: math.exp(vertex([math.log10(r) for r in rates], losses))
            ),
            "the bottom of ax² + bx + c is at -b / (2a); yours is at +b / (2a)": (
                lambda rates, losses: math.exp(-vertex(logs(rates), losses))
            ),
            "the bottom of ax² + bx + c is at -b / (2a); yours is at -b / a": (
                lambda rates, losses: math.exp(2 * vertex(logs(rates), losses))
            ),
            "that is the loss at the bottom; the question asks for the rate": (
                lambda rates, losses: height_at(logs(rates), losses)
            ),
        },
        inputs,
    )


def logs(rates: Sequence[float]) -> list[float]:
    return [math.log(rate) for rate in rates]


def parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """a and b of the parabola a x² + b x + c through three points."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    a = ((y[2] - y[0]) / (x[2] - x[0]) - slope) / (x[2] - x[1])
    return a, slope - a * (x[0] + x[1])


def vertex(x: Sequence[float], y: Sequence[float]) -> float:
    a, b = parabola(x, y)
    return -b / (2 * a)


def height_at(x: Sequence[float], y: Sequence[float]) -> float:
    """The parabola's value at its bottom."""
    a, _ = parabola(x, y)
    bottom = vertex(x, y)
    return y[0] - a * (x[0] - bottom) ** 2


def pareto_front(function: Callable) -> None:
    """`function(points)`: the points (cost, loss) that no other one beats, in order of rising cost.

    A point is beaten if another is no worse in both and better in one.
    """

    def inputs():
        costs = [random.randint(5, 15), *random.sample(range(20, 80), 4), random.randint(85, 99)]
        points = [(float(cost), 6 - 0.04 * cost + random.uniform(-0.2, 0.2)) for cost in costs]
        best_cost, best_loss = min(points, key=lambda point: point[1])
        low_cost, low_loss = min(points)
        points += [
            (best_cost + 1, best_loss + 0.5),  # costs more and is worse
            (best_cost + 2, best_loss),  # costs more and is as good
            (low_cost, low_loss + 0.1),  # costs the same and is worse
        ]
        random.shuffle(points)
        if [p for p in points if p in front(points)] == front(points):
            points.reverse()  # never in order by chance
        return (points,)

    def beaten(point, points, worse):
        return any(worse(point, other) for other in points if other != point)

    def front(points, worse=lambda p, o: o[0] <= p[0] and o[1] <= p[1]):
        return sorted(p for p in points if not beaten(p, points, worse))

    def running_best(points):
        """Going up in cost, a point is kept if it is no worse than the last one kept."""
        kept: list[tuple[float, float]] = []
        for point in sorted(points):
            if not kept or point[1] <= kept[-1][1]:
                kept.append(point)
        return kept

    compare(
        "pareto_front",
        lambda points: function(list(points)),
        front,
        {
            "a point that is equal in one and worse in the other is beaten too: compare with <=, and leave out the "
            "point itself": lambda points: front(points, lambda p, o: o[0] < p[0] and o[1] < p[1]),
            "a point of the same loss at a higher cost is beaten: keep a point only if its loss is lower": running_best,
            "nothing is left: a point does not beat itself, nor one that is better in either of the two": (
                lambda points: []
            ),
            "those are the points that are beaten": (
                lambda points: sorted(p for p in points if p not in front(points))
            ),
            "in order of *rising* cost: yours falls": lambda points: front(points)[::-1],
            "the points are right; sort them by rising cost": (
                lambda points: [p for p in points if p in front(points)]
            ),
            "that is only the point of lowest loss; a cheaper one with a higher loss may be on the front too": (
                lambda points: [min(points, key=lambda p: (p[1], p[0]))]
            ),
            "a higher loss is worse, not better": (
                lambda points: front(points, lambda p, o: o[0] <= p[0] and o[1] >= p[1])
            ),
        },
        inputs,
    )

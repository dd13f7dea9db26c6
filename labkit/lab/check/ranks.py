"""Checks of the exercises on sweeps: counting parameters, intervals, the best learning rate, and what is worth its price."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import cycle

from scipy import stats

from labkit.lab.check.compare import compare


def target_parameters(function: Callable) -> None:
    """`function(shapes, targets, layers, r)`: trained parameters of LoRA on the named matrices of every block.

    `shapes` is {name: (out, in)} of one block; `targets` are some of its names.
    """

    def inputs():
        # numbers of layers and ranks at which no two of the mistakes give the same answer
        return *block(), random.choice([6, 7, 8, 9]), random.choice([11, 13])

    compare(
        "target_parameters",
        function,
        lambda shapes, targets, layers, r: layers * r * sides(shapes, targets),
        {
            "that is every matrix of the block; only the named ones get an adapter": (
                lambda shapes, targets, layers, r: layers * r * sides(shapes, shapes)
            ),
            "that is one block; the model has `layers` of them": lambda shapes, targets, layers, r: (
                r * sides(shapes, targets)
            ),
            "the rank is missing": lambda shapes, targets, layers, r: layers * sides(shapes, targets),
            "twice too many: A has r * in and B has out * r, which makes r * (in + out)": (
                lambda shapes, targets, layers, r: 2 * layers * r * sides(shapes, targets)
            ),
            "that is the number of weights in the matrices themselves, which LoRA freezes": (
                lambda shapes, targets, layers, r: layers * sum(math.prod(shapes[name]) for name in targets)
            ),
            "A alone is counted; B has out * r": lambda shapes, targets, layers, r: (
                layers * r * sum(shapes[name][1] for name in targets)
            ),
            "B alone is counted; A has r * in": lambda shapes, targets, layers, r: (
                layers * r * sum(shapes[name][0] for name in targets)
            ),
        },
        inputs,
    )


def rank_for_budget(function: Callable) -> None:
    """`function(shapes, targets, layers, budget)`: the largest rank at which no more than `budget` parameters train."""

    def inputs():
        shapes, targets = block()
        layers = random.randint(3, 6)
        per_rank = layers * sides(shapes, targets)
        rank, rest = random.randint(60, 200), random.uniform(0.6, 0.9)  # nearer to the next rank
        return shapes, targets, layers, int(per_rank * (rank + rest))

    def whole(shapes, targets, layers, budget):
        return budget // (layers * sides(shapes, targets))

    compare(
        "rank_for_budget",
        function,
        whole,
        {
            "that is one rank more: rounded to the nearest or up, it is above the budget": (
                lambda *given: whole(*given) + 1
            ),
            "a rank is a whole number: round down": lambda shapes, targets, layers, budget: (
                budget / (layers * sides(shapes, targets))
            ),
            "that spends the budget on one block; it is for all `layers`": (
                lambda shapes, targets, layers, budget: budget // sides(shapes, targets)
            ),
            "that counts every matrix of the block; only the named ones get an adapter": (
                lambda shapes, targets, layers, budget: budget // (layers * sides(shapes, shapes))
            ),
            "half of it: a matrix costs r * (in + out), without another 2": (
                lambda shapes, targets, layers, budget: budget // (2 * layers * sides(shapes, targets))
            ),
            "that divides by the weights of the matrices; an adapter costs in + out a rank, not in * out": (
                lambda shapes, targets, layers, budget: (
                    budget // (layers * sum(math.prod(shapes[name]) for name in targets))
                )
            ),
        },
        inputs,
    )


def block() -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Shapes (out, in) of the matrices of a block, with grouped queries, and some of their names."""
    head = random.choice([16, 32, 64])
    hidden, kv, mlp = head * random.choice([4, 6, 8]), head * 2, head * random.choice([11, 13, 17])
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "down_proj": (hidden, mlp),
    }
    # outputs and inputs of these differ in sum, so that A alone and B alone can be told apart
    return shapes, random.choice(
        [["q_proj", "v_proj"], ["k_proj", "v_proj"], ["gate_proj", "up_proj"], ["v_proj"]]
    )


def sides(shapes: dict[str, tuple[int, int]], names) -> int:
    return sum(sum(shapes[name]) for name in names)


def interval95(function: Callable) -> None:
    """`function(values)`: (mean, half-width of the 95 % interval of the mean), by Student's t."""

    def inputs():
        centre = random.uniform(1, 6)
        return ([random.gauss(centre, 0.5) for _ in range(random.choice([3, 5, 6, 7]))],)  # at n = 4, √n is 2

    def answer(values, quantile=0.975, ddof=1, root=True, normal=False, whole=1):
        n = len(values)
        mean = sum(values) / n
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - ddof))
        factor = stats.norm.ppf(quantile) if normal else stats.t.ppf(quantile, n - 1)
        return mean, whole * float(factor) * deviation / (math.sqrt(n) if root else 1)

    compare(
        "interval95",
        function,
        answer,
        {
            "1.96 is for many values; with n of them use Student's t with n - 1 degrees of freedom": lambda v: (
                answer(v, normal=True)
            ),
            "√n is missing: that is how far single seeds scatter, not how well their mean is known": lambda v: (
                answer(v, root=False)
            ),
            "divide the squares by n - 1: the mean was taken from the same values": lambda v: answer(
                v, ddof=0
            ),
            "use Student's t instead of 1.96, and divide the squares by n - 1": lambda v: answer(
                v, ddof=0, normal=True
            ),
            "Student's t has n - 1 degrees of freedom, not n": lambda v: (
                answer(v)[0],
                answer(v)[1] * float(stats.t.ppf(0.975, len(v)) / stats.t.ppf(0.975, len(v) - 1)),
            ),
            "2.5 % are left out on either side: take the quantile 0.975, not 0.95": lambda v: answer(
                v, quantile=0.95
            ),
            "that is the whole width; give half of it": lambda v: answer(v, whole=2),
            "that is the standard deviation; multiply by Student's t and divide by √n": lambda v: (
                answer(v)[0],
                answer(v, root=False)[1] / float(stats.t.ppf(0.975, len(v) - 1)),
            ),
            "that is the standard error; multiply by Student's t": lambda v: (
                answer(v)[0],
                answer(v)[1] / float(stats.t.ppf(0.975, len(v) - 1)),
            ),
            "those are the ends of the interval; give its middle and half its width": lambda v: (
                answer(v)[0] - answer(v)[1],
                answer(v)[0] + answer(v)[1],
            ),
        },
        inputs,
    )


def best_rate(function: Callable) -> None:
    """`function(rates, losses)`: the learning rate at the bottom of the parabola in log(rate) through three points."""

    bottoms = cycle([-0.4, 0.4])  # of the middle point, by turns: the bottom is on either side

    def inputs():
        middle, step = 10 ** random.uniform(-3, -2), random.choice([2.5, 3])
        rates = [middle / step, middle, middle * step]
        bottom = math.log(middle) + next(bottoms)
        curve, height = random.uniform(0.05, 0.2), random.uniform(2, 4)
        return rates, [height + curve * (math.log(rate) - bottom) ** 2 for rate in rates]

    compare(
        "best_rate",
        function,
        lambda rates, losses: math.exp(vertex([math.log(r) for r in rates], losses)),
        {
            "that is the best of the three tried; the bottom of the parabola lies between them": (
                lambda rates, losses: rates[losses.index(min(losses))]
            ),
            "the parabola is in the rate itself; learning rates act by factors, so take log(rate)": vertex,
            "that is the logarithm of the rate; take exp of it": lambda rates, losses: vertex(
                [math.log(r) for r in rates], losses
            ),
            "that is log10 of the rate; take 10 to that power": lambda rates, losses: vertex(
                [math.log10(r) for r in rates], losses
            ),
            "the logarithm was to base 10, and exp is to base e: use 10 ** x": lambda rates, losses: math.exp(
                vertex([math.log10(r) for r in rates], losses)
            ),
            "the bottom of ax² + bx + c is at -b / (2a); yours is at +b / (2a)": lambda rates, losses: (
                math.exp(-vertex([math.log(r) for r in rates], losses))
            ),
            "the bottom of ax² + bx + c is at -b / (2a); yours is at -b / a": lambda rates, losses: math.exp(
                2 * vertex([math.log(r) for r in rates], losses)
            ),
            "that is the loss at the bottom; the question asks for the rate": lambda rates, losses: height_at(
                [math.log(r) for r in rates], losses
            ),
        },
        inputs,
    )


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
    """`function(points)`: the points (cost, loss) that no other beats, by rising cost.

    A point is beaten if another is no worse in both and better in one.
    """

    def inputs():
        costs = [random.randint(5, 15), *random.sample(range(20, 80), 4), random.randint(85, 99)]
        points = [(float(cost), 6 - 0.04 * cost + random.uniform(-0.2, 0.2)) for cost in costs]
        best_cost, best_loss = min(points, key=lambda point: point[1])
        low_cost, low_loss = min(points)
        points += [
            (best_cost + 1, best_loss + 0.5),  # dearer and worse
            (best_cost + 2, best_loss),  # dearer and the same
            (low_cost, low_loss + 0.1),  # the same price, and worse
        ]
        random.shuffle(points)
        if [p for p in points if p in front(points)] == front(points):
            points.reverse()  # never in order by luck
        return (points,)

    def beaten(point, points, worse):
        return any(worse(point, other) for other in points if other != point)

    def front(points, worse=lambda p, o: o[0] <= p[0] and o[1] <= p[1]):
        return sorted(p for p in points if not beaten(p, points, worse))

    def running_best(points):
        """By rising cost, a point is kept if it is not worse than the last one kept."""
        kept = []
        for point in sorted(points):
            if not kept or point[1] <= kept[-1][1]:
                kept.append(point)
        return kept

    compare(
        "pareto_front",
        lambda points: as_lists(function(list(points))),
        lambda points: as_lists(front(points)),
        {
            "a point that is equal in one and worse in the other is beaten too: compare with <= and leave out the point itself": (
                lambda points: as_lists(front(points, lambda p, o: o[0] < p[0] and o[1] < p[1]))
            ),
            "a point of the same loss at a higher cost is beaten: keep one only if its loss is lower": (
                lambda points: as_lists(running_best(points))
            ),
            "nothing is left: a point does not beat itself, and one that is better in only one of the two beats nobody": lambda points: [],
            "those are the points that are beaten": lambda points: as_lists(
                sorted(p for p in points if p not in front(points))
            ),
            "by *rising* cost: yours falls": lambda points: as_lists(front(points)[::-1]),
            "by rising cost, please: sort them": lambda points: as_lists(
                [p for p in points if p in front(points)]
            ),
            "that is only the point of lowest loss; a cheaper one that is worse may be on the front too": (
                lambda points: as_lists([min(points, key=lambda p: (p[1], p[0]))])
            ),
            "a higher loss is worse, not better": lambda points: as_lists(
                front(points, lambda p, o: o[0] <= p[0] and o[1] >= p[1])
            ),
        },
        inputs,
    )


def as_lists(points):
    """Points as lists, so that tuples and lists are alike; anything else stays as it is."""
    if isinstance(points, (list, tuple)) and all(isinstance(p, (list, tuple)) for p in points):
        return [list(p) for p in points]
    return points

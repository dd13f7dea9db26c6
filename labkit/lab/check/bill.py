"""Checks of the exercises on the memory bill of a training step."""

import math
import random
from collections.abc import Callable

from labkit.lab.check.compare import compare


def static_bytes(function: Callable) -> None:
    """`function(parameters, weight, gradient, moment, master)`: bytes of weights, gradients and AdamW's
    state, given the bytes of one weight, one gradient and one number of a moment; `master`: an fp32 copy of
    every weight as well.
    """

    turns = iter([True, False])  # with and without a master copy

    def inputs():
        # widths so odd that no two mistakes give the same number
        widths = random.choice([(1, 2, 8), (8, 2, 0.5), (0.5, 1, 8), (8, 1, 0.25)])
        return random.randint(1_000, 9_000), *widths, next(turns, random.random() < 0.5)

    compare(
        "static_bytes",
        function,
        lambda n, w, g, m, copy: n * (w + g + 2 * m + 4 * copy),
        {
            "AdamW has two moments for every parameter; yours counts one": lambda n, w, g, m, copy: (
                n * (w + g + m + 4 * copy)
            ),
            "the master copy is in fp32: 4 bytes per weight; yours takes 2": lambda n, w, g, m, copy: (
                n * (w + g + 2 * m + 2 * copy)
            ),
            "the gradients are missing": lambda n, w, g, m, copy: n * (w + 2 * m + 4 * copy),
            "the weights themselves are missing": lambda n, w, g, m, copy: n * (g + 2 * m + 4 * copy),
            "the moments are missing": lambda n, w, g, m, copy: n * (w + g + 4 * copy),
            "the master copy is in fp32, 4 bytes per weight, whatever the weight itself takes": (
                lambda n, w, g, m, copy: n * (w + g + 2 * m + w * copy)
            ),
            "the master copy is missing": lambda n, w, g, m, copy: n * (w + g + 2 * m),
            "the master copy counts only where `master` is true": (
                lambda n, w, g, m, copy: n * (w + g + 2 * m + 4)
            ),
            "that is for one parameter; multiply by their number": (
                lambda n, w, g, m, copy: w + g + 2 * m + 4 * copy
            ),
            "those are bits; the arguments are already in bytes": (
                lambda n, w, g, m, copy: 8 * n * (w + g + 2 * m + 4 * copy)
            ),
        },
        inputs,
    )


def eight_bit_state(function: Callable) -> None:
    """`function(sizes)`: bytes of 8-bit AdamW's state for parameters of these sizes, in numbers: two moments
    of 1 byte per number, each with an fp32 scale for every 256 numbers; a parameter of fewer than 4096 keeps
    both in fp32.
    """

    def inputs():
        # small enough for a single scale to show, and with tails that would fit into one block together
        large = [256 * random.randint(17, 24) + random.randint(1, 100) for _ in range(2)]
        return ([*large, random.randint(500, 900), 4096],)

    def state(sizes, moments=2, block=256, small=4096, up=math.ceil, scale=4, wide=4):
        return sum(moments * (wide * n if n < small else n + scale * up(n / block)) for n in sizes)

    def pooled(sizes):
        large = sum(n for n in sizes if n >= 4096)
        return 2 * (large + 4 * math.ceil(large / 256)) + 8 * sum(n for n in sizes if n < 4096)

    compare(
        "eight_bit_state",
        function,
        state,
        {
            "AdamW has two moments; yours counts one": lambda s: state(s, moments=1),
            "the scales are missing: 4 bytes for every 256 numbers of each moment": lambda s: state(
                s, scale=0
            ),
            "a scale is in fp32, 4 bytes; yours counts 1": lambda s: state(s, scale=1),
            "an incomplete block needs its scale too: round up": lambda s: state(s, up=math.floor),
            "a parameter of fewer than 4096 numbers keeps fp32 moments": lambda s: state(s, small=0),
            "4096 numbers are enough for 8 bits; only smaller parameters stay in fp32": (
                lambda s: state(s, small=4097)
            ),
            "the small ones keep fp32, 4 bytes per number; yours counts 2": lambda s: state(s, wide=2),
            "blocks do not run on from one parameter to the next: round up for each": pooled,
            "each moment has scales of its own": (
                lambda s: sum(8 * n if n < 4096 else 2 * n + 4 * math.ceil(n / 256) for n in s)
            ),
            "that is AdamW in fp32": lambda s: state(s, small=math.inf),
        },
        inputs,
    )


def step_peak(function: Callable) -> None:
    """`function(static, gradients, activations, temporary)`: the most bytes live at one time. The
    activations, and the temporary scores, are live at the end of the forward pass, the gradients when the
    optimizer steps, and `static` always.
    """
    turns = iter([True, False])  # does the optimizer's step hold more?

    def inputs():
        gradients = random.randint(40, 60) if next(turns, random.random() < 0.5) else random.randint(1, 4)
        return random.randint(100, 200), gradients, random.randint(5, 12), random.randint(13, 20)

    compare(
        "step_peak",
        function,
        lambda s, g, a, t: s + max(g, a + t),
        {
            "that is the sum of all: gradients and activations are never live in full at the same time": (
                lambda s, g, a, t: s + g + a + t
            ),
            "that is the end of the forward pass; when the optimizer steps, more can be live": (
                lambda s, g, a, t: s + a + t
            ),
            "that is the optimizer's step; at the end of the forward pass, more can be live": (
                lambda s, g, a, t: s + g
            ),
            "the temporary scores are live together with the activations: add them before you compare": (
                lambda s, g, a, t: s + max(g, a, t)
            ),
            "the temporary scores are gone when the gradients are complete": (
                lambda s, g, a, t: s + max(g, a) + t
            ),
            "the temporary scores are missing": lambda s, g, a, t: s + max(g, a),
            "`static` is live at every moment: add it": lambda s, g, a, t: max(g, a + t),
            "the static bytes are not an alternative to the others; they are live all the time": (
                lambda s, g, a, t: max(s, g, a + t)
            ),
        },
        inputs,
    )


def largest_batch(function: Callable) -> None:
    """`function(card, reserve, static, gradients, per_example)`: the most examples that a step may have; 0 if
    none fits. All in bytes; `per_example`: of activations; the peak is as in `step_peak`, without temporary
    scores.
    """
    turns = iter(["fits", "gradients do not", "static does not"])

    def inputs():
        per_example, static = random.randint(7, 11), random.randint(100, 150)
        gradients = random.randint(12, 16)
        reserve = 2 * per_example + random.randint(1, 3)
        free = random.randint(3, 7) * per_example + random.randint(2, per_example - 1)
        kind = next(turns, "fits")
        if kind == "gradients do not":
            gradients = free + random.randint(2, 5)  # examples would fit, the gradients do not
        if kind == "static does not":
            free = -random.randint(2 * per_example, 3 * per_example)
        return static + free + reserve, reserve, static, gradients, per_example

    def most(card, reserve, static, gradients, per_example):
        free = card - reserve - static
        return max(0, free // per_example) if free >= gradients else 0

    compare(
        "largest_batch",
        function,
        most,
        {
            "the reserve is not yours to fill": lambda c, r, s, g, p: most(c, 0, s, g, p),
            "the static bytes come first; only the rest is free": lambda c, r, s, g, p: most(c, r, 0, g, p),
            "the gradients have to fit as well, when the optimizer steps; if they do not, no batch does": (
                lambda c, r, s, g, p: most(c, r, s, 0, p)
            ),
            "gradients and activations take turns: the gradients do not shrink the room for a batch": (
                lambda c, r, s, g, p: max(0, (c - r - s - g) // p)
            ),
            "you cannot train on half an example: round down": (
                lambda c, r, s, g, p: max(0, -(-(c - r - s) // p)) if c - r - s >= g else 0
            ),
            "a batch is a whole number of examples": (
                lambda c, r, s, g, p: max(0, (c - r - s) / p) if c - r - s >= g else 0
            ),
            "a batch cannot be negative: 0 if nothing fits": (
                lambda c, r, s, g, p: (c - r - s) // p if c - r - s >= g or c - r - s < 0 else 0
            ),
            "a batch of 1 that does not fit is not an answer: 0 if nothing fits": (
                lambda c, r, s, g, p: max(1, most(c, r, s, g, p))
            ),
        },
        inputs,
    )

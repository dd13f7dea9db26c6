"""Checks of the exercises on where the bytes of a training step go."""

import math
import random
from collections.abc import Callable
from itertools import accumulate

from labkit.lab.check.compare import compare


def peak_of_events(function: Callable) -> None:
    """`function(events)`: [the most live bytes, the number of the event after which they are live]; events
    are signed bytes, positive for an allocation, negative for a release.
    """

    def inputs():
        kept = [random.randint(5, 9) * 100 for _ in range(4)]
        # the largest single allocation; it comes after most was released, so it is not the peak
        late = sum(kept) + 2000
        up = [*kept[:2], 37, -37, *kept[2:], 1111]
        down = [-1111, *(-k for k in reversed(kept[1:]))]
        return (up + down + [late - kept[0] - 500, -300, 211],)

    def running(events):
        return list(accumulate(events))

    def right(events):
        live = running(events)
        return [max(live), live.index(max(live))]

    compare(
        "peak_of_events",
        function,
        right,
        {
            "that is what is live at the end; the most was live earlier": lambda e: [sum(e), len(e) - 1],
            "that adds up all allocations as if nothing was ever released": (
                lambda e: [sum(x for x in e if x > 0), right(e)[1]]
            ),
            "that is the largest single allocation; what was already live counts too": (
                lambda e: [max(e), e.index(max(e))]
            ),
            "the peak is right, but its moment is one too late: count events from 0": (
                lambda e: [right(e)[0], right(e)[1] + 1]
            ),
            "return both, [bytes, moment]": lambda e: right(e)[0],
            "bytes first, then the moment": lambda e: right(e)[::-1],
        },
        inputs,
    )


def linear_keeps(function: Callable) -> None:
    """`function(tokens, d_in, d_out, trains, rank)`: fp32 bytes of activations that a linear layer keeps for
    the backward pass; `trains`: does its own weight train; `rank`: of its LoRA adapter, 0 for none.
    """

    cases = [(True, 0), (False, 0), (False, random.choice([4, 8, 16])), (True, 8), (False, 32)]
    turn = iter(cases * 2)

    def inputs():
        trains, rank = next(turn)
        d_in = random.choice([256, 576, 1024])
        return random.randint(50, 500), d_in, 3 * d_in, trains, rank

    def right(tokens, d_in, d_out, trains, rank):
        return 4 * tokens * ((d_in if trains or rank else 0) + rank)

    compare(
        "linear_keeps",
        function,
        right,
        {
            "a frozen weight needs no input for its backward pass: without an adapter nothing is kept": (
                lambda t, i, o, trains, r: 4 * t * (i + r)
            ),
            "the adapter's A trains, so the layer keeps its whole input x: (tokens, d_in)": (
                lambda t, i, o, trains, r: 4 * t * ((i if trains else 0) + r)
            ),
            "B trains too: it keeps its own input z = A x, `rank` numbers per token": (
                lambda t, i, o, trains, r: 4 * t * (i if trains or r else 0)
            ),
            "the layer keeps what goes *in*: the gradient of W is that of the output times the input": (
                lambda t, i, o, trains, r: 4 * t * ((o if trains or r else 0) + r)
            ),
            "the base and A read the same x: it is kept once": (
                lambda t, i, o, trains, r: 4 * t * ((2 * i if r else i if trains else 0) + r)
            ),
            "fp32 takes 4 bytes per number": lambda t, i, o, trains, r: right(t, i, o, trains, r) / 4,
            "those are the bytes of the weights; activations grow with the tokens": (
                lambda t, i, o, trains, r: 4 * (i * o if trains else r * (i + o))
            ),
        },
        inputs,
    )


def checkpoint_bytes(function: Callable) -> None:
    """`function(layers, segment, block_input, per_block)`: the most bytes of activations when every `segment`
    blocks are checkpointed together: the input of each segment, and all that the blocks of one segment keep
    while it runs again.
    """

    def inputs():
        layers, segment = random.choice([(30, 4), (32, 5), (22, 3), (80, 7), (26, 4)])
        return layers, segment, random.randint(10, 20), random.randint(150, 250)

    def right(layers, segment, block_input, per_block):
        return math.ceil(layers / segment) * block_input + segment * per_block

    compare(
        "checkpoint_bytes",
        function,
        right,
        {
            "one segment at a time runs again in the backward pass, and its blocks then keep everything": (
                lambda n, k, i, b: math.ceil(n / k) * i
            ),
            "only the input of each *segment* is kept, not of each block": lambda n, k, i, b: n * i + k * b,
            "a last segment with fewer blocks has an input too: round up": (
                lambda n, k, i, b: n // k * i + k * b
            ),
            "segments come in whole numbers: round up": lambda n, k, i, b: n / k * i + k * b,
            "a whole segment runs again at once, not one block of it": (
                lambda n, k, i, b: math.ceil(n / k) * i + b
            ),
            "segments run again one after the other; they are not all live at once": (
                lambda n, k, i, b: math.ceil(n / k) * i + n * b
            ),
            "that is the other way round: there are layers / segment segments of `segment` blocks each": (
                lambda n, k, i, b: k * i + math.ceil(n / k) * b
            ),
        },
        inputs,
    )


def step_flops(function: Callable) -> None:
    """`function(weights, tokens, base_trains, checkpointing)`: floating-point operations of the products with
    the base weights in one step, 2 per weight and token for each product.
    """

    cases = [(True, False), (True, True), (False, True), (False, False), (False, True)]
    turn = iter(cases * 2)

    def inputs():
        return random.randint(3, 9) * 10**6, random.randint(100, 900), *next(turn)

    def products(base_trains, checkpointing):
        return 2 + base_trains + checkpointing

    compare(
        "step_flops",
        function,
        lambda n, t, trains, again: 2 * n * t * products(trains, again),
        {
            "a multiplication and an addition are two operations": (
                lambda n, t, trains, again: n * t * products(trains, again)
            ),
            "a frozen base needs no gradient of its weights: two products, not three": (
                lambda n, t, trains, again: 2 * n * t * products(True, again)
            ),
            "the gradient must flow through a frozen base too, to the adapters below: forward and input gradient": (
                lambda n, t, trains, again: 2 * n * t * (1 + 2 * trains + again)
            ),
            "checkpointing runs the forward pass again: one more product": (
                lambda n, t, trains, again: 2 * n * t * products(trains, False)
            ),
            "checkpointing repeats the forward pass, not the backward pass": (
                lambda n, t, trains, again: 2 * n * t * (products(trains, False) + again * (1 + trains))
            ),
            "a third more is right where everything trains; over a frozen base the step is shorter, and a forward "
            "pass more is half of it: count products, 2 + 1": (
                lambda n, t, trains, again: 2 * n * t * products(trains, False) * (4 / 3 if again else 1)
            ),
            "that is the forward pass alone": lambda n, t, trains, again: 2 * n * t,
        },
        inputs,
    )


def crossover_tokens(function: Callable) -> None:
    """`function(linear, others, bits, extra)`: the smallest number of tokens in a batch at which QLoRA, with
    everything that is not in 4 bits cast to fp32, takes more than LoRA in bf16.

    `linear`: weights in 4 bits under QLoRA, at `bits` bits with all constants; `others`: the other weights;
    `extra`: bytes of activations per token that the cast adds.
    """

    def inputs():
        others = random.randint(30, 60) * 10**6
        linear = others * random.randint(4, 9)
        return linear, others, 4.127, random.randint(300, 900) * 1000

    def tokens(saved, extra):
        return math.floor(saved / extra) + 1

    compare(
        "crossover_tokens",
        function,
        lambda n, o, bits, extra: tokens(n * (2 - bits / 8) - 2 * o, extra),
        {
            "the cast enlarges weights too: the others take 4 bytes instead of 2": (
                lambda n, o, bits, extra: tokens(n * (2 - bits / 8), extra)
            ),
            "the others already took 2 bytes under LoRA: the cast adds 2, not 4": (
                lambda n, o, bits, extra: tokens(n * (2 - bits / 8) - 4 * o, extra)
            ),
            "bits are not bytes: divide by 8": (
                lambda n, o, bits, extra: tokens(n * (16 - bits) - 2 * o, extra)
            ),
            "LoRA's base is in bf16, 2 bytes per weight, not in fp32": (
                lambda n, o, bits, extra: tokens(n * (4 - bits / 8) - 2 * o, extra)
            ),
            "the saving is the difference from bf16; yours is all that the 4-bit weights take": (
                lambda n, o, bits, extra: tokens(n * bits / 8 + 2 * o, extra)
            ),
            "the cast costs memory: subtract it from what is saved": (
                lambda n, o, bits, extra: tokens(n * (2 - bits / 8) + 2 * o, extra)
            ),
        },
        inputs,
    )

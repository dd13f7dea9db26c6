"""Checks of the exercises on the alternatives to LoRA: what they add, where they act, and what merges."""

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from labkit.lab.check.compare import compare


def bottleneck_parameters(function: Callable) -> None:
    """`function(width, size, layers)`: parameters, biases included, of bottleneck adapters after the
    attention and after the MLP of every block.
    """

    def inputs():
        # a width of 9 to 30 sizes, and numbers of layers that set all mistakes apart
        size = random.randint(5, 19)
        return size * random.randint(9, 30) + 1, size, random.choice([6, 7, 9, 11])

    compare(
        "bottleneck_parameters",
        function,
        lambda d, m, n: 2 * n * (2 * m * d + m + d),
        {
            "the biases are missing: `size` numbers on the way down, `width` on the way up": (
                lambda d, m, n: 2 * n * 2 * m * d
            ),
            "one adapter per block is counted; there is one after attention and one after the MLP": (
                lambda d, m, n: n * (2 * m * d + m + d)
            ),
            "that is one block; the model has `layers` of them": lambda d, m, n: 2 * (2 * m * d + m + d),
            "that is one adapter; each of the `layers` blocks has two": lambda d, m, n: 2 * m * d + m + d,
            "one matrix is counted; there is one down and one up": lambda d, m, n: 2 * n * (m * d + m + d),
            "the bias of the up-projection has `width` numbers, that of the down-projection `size`; yours has `width` "
            "twice": lambda d, m, n: 2 * n * (2 * m * d + 2 * d),
            "the bias of the up-projection has `width` numbers, that of the down-projection `size`; yours has `size` "
            "twice": lambda d, m, n: 2 * n * (2 * m * d + 2 * m),
            "that is a full matrix of width by width; the bottleneck is `size` wide": (
                lambda d, m, n: 2 * n * (2 * d * d + 2 * d)
            ),
        },
        inputs,
    )


def bottleneck_forward(function: Callable) -> None:
    """`function(f, x, down, up, form)`: the output of a sub-layer f with a bottleneck adapter; down and up
    are (weight, bias), form is "serial" or "parallel", the activation is relu.
    """

    forms = itertools.cycle(["serial", "parallel"])

    def inputs():
        inner = torch.randn(6, 6)
        down, up = (torch.randn(3, 6), torch.randn(3)), (torch.randn(6, 3), torch.randn(6))
        return lambda x: torch.tanh(x @ inner), torch.randn(4, 6), down, up, next(forms)

    def correction(h: Tensor, down, up, activation=torch.relu) -> Tensor:
        return activation(h @ down[0].T + down[1]) @ up[0].T + up[1]

    def right(f, x, down, up, form, activation=torch.relu):
        return f(x) + correction(f(x) if form == "serial" else x, down, up, activation)

    def swapped(f, x, down, up, form):
        return right(f, x, down, up, "parallel" if form == "serial" else "serial")

    compare(
        "bottleneck_forward",
        function,
        right,
        {
            "the adapter reads f's output in both forms; the parallel one should read x": (
                lambda f, x, down, up, form: right(f, x, down, up, "serial")
            ),
            "the adapter reads x in both forms; the serial one should read f's output": (
                lambda f, x, down, up, form: right(f, x, down, up, "parallel")
            ),
            # after the two that explain one form only: this one explains a mistake in both forms more often
            "serial and parallel are swapped: the serial adapter reads f's output, the parallel one f's input": swapped,
            "f's own output is lost: the adapter adds to it": (
                lambda f, x, down, up, form: correction(f(x) if form == "serial" else x, down, up)
            ),
            "x is added instead of f(x); the block's own sum, h + f(…), comes later": (
                lambda f, x, down, up, form: x + correction(f(x) if form == "serial" else x, down, up)
            ),
            "the nonlinearity between down and up is missing: without it this would be LoRA, and would merge": (
                lambda f, x, down, up, form: right(f, x, down, up, form, lambda z: z)
            ),
            "the nonlinearity belongs between down and up, not after up": lambda f, x, down, up, form: (
                f(x) + torch.relu(correction(f(x) if form == "serial" else x, down, up, lambda z: z))
            ),
            "the biases are missing": (
                lambda f, x, down, up, form: right(f, x, (down[0], 0 * down[1]), (up[0], 0 * up[1]), form)
            ),
        },
        inputs,
    )


def ia3_merge(function: Callable) -> None:
    """`function(weight, vector, on_input)`: the (out, in) weight with (IA)^3 merged, on output or input."""

    sides = itertools.cycle([True, False])

    def inputs():  # square, so the wrong side can be computed too
        return torch.randn(5, 5), 1 + torch.randn(5) / 2, next(sides)

    def right(w: Tensor, v: Tensor, on_input: bool) -> Tensor:
        return w * (v[None, :] if on_input else v[:, None])

    compare(
        "ia3_merge",
        function,
        right,
        {
            "columns are multiplied in both cases; PyTorch broadcasts a vector along the last axis, which is the "
            "input": lambda w, v, on_input: right(w, v, True),
            "rows are multiplied in both cases; a factor on the input scales columns": (
                lambda w, v, on_input: right(w, v, False)
            ),
            "the sides are swapped: an output is a row of the (out, in) weight, an input is a column": (
                lambda w, v, on_input: right(w, v, not on_input)
            ),
            "that multiplies by 1 + vector; the vector is the factor itself, and starts at one": (
                lambda w, v, on_input: right(w, 1 + v, on_input)
            ),
            "the vector is added; it should multiply": (
                lambda w, v, on_input: w + (v[None, :] if on_input else v[:, None])
            ),
            "that divides by the vector, which unmerges": lambda w, v, on_input: right(w, 1 / v, on_input),
            "that is the product of the matrix and the vector, which is no longer (out, in)": (
                lambda w, v, on_input: w @ v
            ),
        },
        inputs,
    )


def prefix_cache_bytes(function: Callable) -> None:
    """`function(length, layers, heads, kv_heads, head_dim, number_bytes)`: bytes of key-value cache that a
    prefix takes for one sequence.
    """

    numbers = itertools.cycle([4, 2])  # with 2 alone, "keys alone" and "no bytes" would give the same answer

    def inputs():
        kv_heads = random.choice([3, 5])  # not 2: one head of two would be half, as keys alone are
        shape = random.randint(7, 40), random.choice([6, 11, 13]), kv_heads * random.choice([3, 4]), kv_heads
        return *shape, random.choice([64, 80]), next(numbers)

    def right(n, layers, heads, kv_heads, dim, size):
        return 2 * n * layers * kv_heads * dim * size

    compare(
        "prefix_cache_bytes",
        function,
        right,
        {
            "all heads are counted; with grouped-query attention only `kv_heads` of them have keys and values": (
                lambda n, layers, heads, kv_heads, dim, size: 2 * n * layers * heads * dim * size
            ),
            "only keys (or only values) are counted; the cache holds both": lambda *given: right(*given) // 2,
            "that is one layer; each of the `layers` has its own": (
                lambda n, layers, heads, kv_heads, dim, size: right(n, 1, heads, kv_heads, dim, size)
            ),
            "that is how many numbers there are; each takes `number_bytes`": (
                lambda n, layers, heads, kv_heads, dim, size: right(n, layers, heads, kv_heads, dim, 1)
            ),
            "that is one position; the prefix has `length` of them": (
                lambda n, layers, heads, kv_heads, dim, size: right(1, layers, heads, kv_heads, dim, size)
            ),
            "that is one key head per layer; there are `kv_heads`": (
                lambda n, layers, heads, kv_heads, dim, size: right(n, layers, heads, 1, dim, size)
            ),
            "those are bits; the question asks for bytes": lambda *given: 8 * right(*given),
        },
        inputs,
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    hide_prefix: bool = False,
    scaled: bool = True,
) -> Tensor:
    """Causal attention of one head over prefix and text; the options are what people get wrong."""
    n, time = len(prefix_k), len(q)
    scores = q @ torch.cat([prefix_k, k]).T / (math.sqrt(q.shape[-1]) if scaled else 1)  # (time, n + time)
    mask = torch.ones(time, n + time, dtype=torch.bool).tril(0 if hide_prefix else n)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ torch.cat([prefix_v, v])


def prefix_attention(function: Callable) -> None:
    """`function(q, k, v, prefix_k, prefix_v)`: causal attention of one head, (time, dim), over a prefix, (n,
    dim), and the text.
    """

    def inputs():
        n, time, dim = 3, 5, 4
        return *(torch.randn(time, dim) for _ in range(3)), torch.randn(n, dim), torch.randn(n, dim)

    def alone(q, k, v):
        return attend(q, k, v, k[:0], v[:0])

    def unmasked(q, k, v, prefix_k, prefix_v):
        scores = q @ torch.cat([prefix_k, k]).T / math.sqrt(q.shape[-1])
        return scores.softmax(-1) @ torch.cat([prefix_v, v])

    def apart(q, k, v, prefix_k, prefix_v):
        return (q @ prefix_k.T / math.sqrt(q.shape[-1])).softmax(-1) @ prefix_v

    compare(
        "prefix_attention",
        function,
        attend,
        {
            "the causal mask hides part of the prefix: row i sees all of the prefix, and the text up to i": (
                lambda q, k, v, pk, pv: attend(q, k, v, pk, pv, hide_prefix=True)
            ),
            "there is no causal mask: a token sees the text after it": unmasked,
            "that adds two softmaxes; a single one runs over prefix and text together": (
                lambda q, k, v, pk, pv: alone(q, k, v) + apart(q, k, v, pk, pv)
            ),
            "the scores are not divided by the square root of the head's dimension": (
                lambda q, k, v, pk, pv: attend(q, k, v, pk, pv, scaled=False)
            ),
            "that is attention to the text alone": lambda q, k, v, pk, pv: alone(q, k, v),
            "that is attention to the prefix alone": apart,
        },
        inputs,
    )

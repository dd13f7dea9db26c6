"""Checks of the exercises on LoRA from scratch: forward, parameters, gradients, merging, and operations."""

import math
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare


def lora_forward(function: Callable) -> None:
    """`function(x, W, A, B, alpha, r)`: x (n, in), W (out, in), A (r, in), B (out, r) to (n, out)."""

    def inputs():
        n, d, k, r = random.sample(range(3, 10), 4)  # all different: a forgotten transpose does not fit
        shapes = (n, d), (k, d), (r, d), (k, r)
        return (*(torch.randn(s) for s in shapes), float(random.choice([8, 16, 32])), r)

    compare(
        "lora_forward",
        function,
        lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A.T @ B.T),
        {
            "the scaling is alpha / r; yours looks like alpha": (
                lambda x, W, A, B, alpha, r: x @ W.T + alpha * (x @ A.T @ B.T)
            ),
            "the scaling alpha / r is missing": lambda x, W, A, B, alpha, r: x @ W.T + x @ A.T @ B.T,
            "the scaling is alpha / r; yours looks like alpha / sqrt(r), which is rsLoRA's": (
                lambda x, W, A, B, alpha, r: x @ W.T + alpha / math.sqrt(r) * (x @ A.T @ B.T)
            ),
            "this is the correction alone; the base's x W^T is missing": (
                lambda x, W, A, B, alpha, r: alpha / r * (x @ A.T @ B.T)
            ),
            "the scaling multiplies the base too; it applies to the correction only": (
                lambda x, W, A, B, alpha, r: alpha / r * (x @ W.T + x @ A.T @ B.T)
            ),
            "W is (out, in) and x is (n, in): the base is x @ W.T; the transpose is missing": (
                lambda x, W, A, B, alpha, r: x @ W + alpha / r * (x @ A.T @ B.T)
            ),
            "A is (r, in) and x is (n, in): z is x @ A.T; the transpose is missing": (
                lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A @ B.T)
            ),
            "B is (out, r) and z is (n, r): the correction is z @ B.T; the transpose is missing": (
                lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A.T @ B)
            ),
            "that is B A x for a single column x; here each *row* of x is an input, so x comes first": (
                lambda x, W, A, B, alpha, r: W @ x + alpha / r * (B @ A @ x)
            ),
        },
        inputs,
    )


def llama_lora_parameters(function: Callable) -> None:
    """`function(hidden, heads, kv_heads, head_dim, mlp, layers, r)`: the number of parameters that train with
    LoRA on all seven linear layers of each block.
    """

    def inputs():
        kv_heads = random.randint(2, 4)
        heads = kv_heads * random.randint(2, 4)
        head_dim = random.choice([16, 32, 64])
        # not heads * head_dim, as in Qwen3 and Gemma, so no two mistakes give the same number
        hidden = heads * head_dim + random.randint(9, 15)
        mlp = 3 * hidden + random.randint(1, 99)
        return hidden, heads, kv_heads, head_dim, mlp, random.choice([2, 4, 5, 6]), random.randint(8, 11)

    def count(h, q, kv, mlp, copies, attention=True, feed_forward=3):
        sides = attention * (2 * (h + q) + 2 * (h + kv)) + feed_forward * (h + mlp)
        return copies * sides

    compare(
        "llama_lora_parameters",
        function,
        lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r),
        {
            "k and v are counted as wide as q; with grouped queries they have kv_heads * head_dim outputs": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, n * d, mlp, L * r)
            ),
            "that is twice the number: a layer has r * (in + out), without another factor of 2": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, 2 * L * r)
            ),
            "that is one block; multiply by the number of layers": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, r)
            ),
            "the MLP's gate, up and down are missing": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r, feed_forward=0)
            ),
            "the MLP has three matrices, gate, up and down; yours has two": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r, feed_forward=2)
            ),
            "the MLP has three matrices, gate, up and down; yours has one": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r, feed_forward=1)
            ),
            "q, k, v and o are missing": (
                lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L * r, attention=False)
            ),
            "q and o are counted as hidden * hidden; one side is heads * head_dim, which here is not hidden": (
                lambda h, n, kv, d, mlp, L, r: count(h, h, kv * d, mlp, L * r)
            ),
            "that is the number of weights in the layers themselves, which LoRA freezes": (
                lambda h, n, kv, d, mlp, L, r: L * h * (2 * n * d + 2 * kv * d + 3 * mlp)
            ),
            "the rank is missing": lambda h, n, kv, d, mlp, L, r: count(h, n * d, kv * d, mlp, L),
        },
        inputs,
    )


def lora_gradients(function: Callable) -> None:
    """`function(x, g, A, B, s)`: x (n, in), g = dL/dy (n, out) to gradients of A (r, in) and B (out, r)."""

    def inputs():
        n, d, k, r = random.sample(range(2, 9), 4)  # all different: a transposed matrix shows in its shape
        scaling = random.choice([0.5, 1.5, 2.5])  # never the number of tokens
        return torch.randn(n, d), torch.randn(n, k), torch.randn(r, d), torch.randn(k, r), scaling

    def of_A(x, g, A, B, s):
        return s * B.T @ g.T @ x

    def of_B(x, g, A, B, s):
        return s * g.T @ (x @ A.T)

    def pair(first, second):
        return lambda *inputs: (first(*inputs), second(*inputs))

    compare(
        "lora_gradients",
        function,
        pair(of_A, of_B),
        {
            "the scaling is missing: y = Wx + s B A x, so both gradients carry s": (
                lambda x, g, A, B, s: (of_A(x, g, A, B, 1), of_B(x, g, A, B, 1))
            ),
            "the two are swapped: A's gradient comes first": pair(of_B, of_A),
            "both are transposed: a gradient has the shape of its matrix": pair(
                lambda *i: of_A(*i).T, lambda *i: of_B(*i).T
            ),
            "A's gradient is transposed: it has A's shape, (r, in)": pair(lambda *i: of_A(*i).T, of_B),
            "B's gradient is transposed: it has B's shape, (out, r)": pair(of_A, lambda *i: of_B(*i).T),
            "A's gradient lacks the scaling": pair(lambda x, g, A, B, s: of_A(x, g, A, B, 1), of_B),
            "B's gradient lacks the scaling": pair(of_A, lambda x, g, A, B, s: of_B(x, g, A, B, 1)),
            "these are means over the tokens; a gradient is their sum": pair(
                lambda x, *i: of_A(x, *i) / len(x), lambda x, *i: of_B(x, *i) / len(x)
            ),
            "the sign is that of a step downhill; the gradient points uphill": pair(
                lambda *i: -of_A(*i), lambda *i: -of_B(*i)
            ),
        },
        inputs,
        parts=("A's gradient", "B's gradient"),
    )


def merged_weight(function: Callable) -> None:
    """`function(W, A, B, alpha, r)`: the weight with the correction added, (out, in), as a new tensor."""

    def inputs():
        d, r = random.randint(4, 9), random.randint(2, 3)
        # square, so a transposed correction has the right shape too, and only its values give it away
        return torch.randn(d, d), torch.randn(r, d), torch.randn(d, r), float(random.choice([8, 16])), r

    def theirs(W, A, B, alpha, r):
        given = W.clone()
        answer = function(W, A, B, alpha, r)
        changed = not torch.equal(W, given)
        W.copy_(given)  # the right answer is computed from it next
        if not torch.is_tensor(answer):
            return answer
        return answer.double().clone() if not changed else flagged(given, A, B, alpha, r)

    def right(W, A, B, alpha, r):
        return W + alpha / r * (B @ A)

    def flagged(W, A, B, alpha, r):
        return torch.full((1,), math.inf)  # a shape that no answer has

    compare(
        "merged_weight",
        theirs,
        right,
        {
            "W itself was changed: another layer may share it (tied embeddings), and merging again would add again. "
            "Write `W + …`, not `W += …`": flagged,
            "that is the correction alone; add W": lambda W, A, B, alpha, r: alpha / r * (B @ A),
            "the scaling is alpha / r; yours looks like alpha": lambda W, A, B, alpha, r: W + alpha * (B @ A),
            "the scaling alpha / r is missing": lambda W, A, B, alpha, r: W + B @ A,
            "the correction is transposed: it is B A, (out, in) like W": (
                lambda W, A, B, alpha, r: W + alpha / r * (B @ A).T
            ),
            "the scaling multiplies W too; it applies to the correction only": (
                lambda W, A, B, alpha, r: alpha / r * (W + B @ A)
            ),
            "that subtracts the correction; merging adds it": (
                lambda W, A, B, alpha, r: W - alpha / r * (B @ A)
            ),
        },
        inputs,
    )


def break_even_rank(function: Callable) -> None:
    """`function(n_in, n_out)`: the rank at which a step of LoRA takes as many operations as a full one."""
    compare(
        "break_even_rank",
        function,
        lambda d, k: d * k / (3 * (d + k)),
        {
            "at that rank LoRA has as many *parameters* as W; the frozen W still costs 4 operations per weight, "
            "and A and B cost 6": lambda d, k: d * k / (d + k),
            "yours lets W cost 2 operations; frozen, it still costs 4, forward and the gradient of the input": (
                lambda d, k: 2 * d * k / (3 * (d + k))
            ),
            "A and B train: they cost forward, gradient of the input and gradient of the weight, 6 and not 4": (
                lambda d, k: d * k / (2 * (d + k))
            ),
            "a layer has r * (in + out) parameters; yours has twice as many": (
                lambda d, k: d * k / (6 * (d + k))
            ),
            "the answer may be a fraction; yours is rounded down": lambda d, k: d * k // (3 * (d + k)),
        },
        lambda: (random.randrange(100, 900, 7), random.randrange(101, 900, 7)),
    )

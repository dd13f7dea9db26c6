"""Checks of the exercises on LoRA and on training."""

import itertools
import math
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare


def lora_forward(function: Callable) -> None:
    """`function(x, W, A, B, alpha, r)`: x (n, in), W (out, in), A (r, in), B (out, r) to (n, out)."""

    def inputs():
        n, d, k, r = (random.randint(3, 9) for _ in range(4))
        shapes = (n, d), (k, d), (r, d), (k, r)
        return (*(torch.randn(s) for s in shapes), float(random.choice([8, 16, 32])), r)

    compare(
        "lora_forward",
        function,
        lambda x, W, A, B, alpha, r: x @ W.T + alpha / r * (x @ A.T @ B.T),
        {
            "scaling is alpha / r; yours looks like alpha": lambda x, W, A, B, alpha, r: (
                x @ W.T + alpha * (x @ A.T @ B.T)
            ),
            "the scaling alpha / r is missing": lambda x, W, A, B, alpha, r: x @ W.T + x @ A.T @ B.T,
            "scaling is alpha / r; yours looks like alpha / sqrt(r), which is rsLoRA's": lambda x, W, A, B, alpha, r: (
                x @ W.T + alpha / math.sqrt(r) * (x @ A.T @ B.T)
            ),
            "this is the correction alone; the base's x W^T is missing": lambda x, W, A, B, alpha, r: (
                alpha / r * (x @ A.T @ B.T)
            ),
            "the scaling multiplies the base too; it belongs to the correction only": lambda x, W, A, B, alpha, r: (
                alpha / r * (x @ W.T + x @ A.T @ B.T)
            ),
        },
        inputs,
    )


def lora_parameters(function: Callable) -> None:
    """`function(shapes, r)`: trained parameters of LoRA on layers of (out, in) shapes."""

    def inputs():
        return [
            (random.randint(8, 900), random.randint(8, 900)) for _ in range(random.randint(2, 5))
        ], random.randint(2, 8)

    compare(
        "lora_parameters",
        function,
        lambda shapes, r: sum(r * (out + inp) for out, inp in shapes),
        {
            "twice too many: A has r * in and B has out * r, which makes r * (in + out) and not 2 * r * (in + out)": (
                lambda shapes, r: sum(2 * r * (out + inp) for out, inp in shapes)
            ),
            "that is the number of weights in the layers themselves, which LoRA freezes": (
                lambda shapes, r: sum(out * inp for out, inp in shapes)
            ),
            "only one of the two matrices is counted": lambda shapes, r: sum(r * inp for out, inp in shapes),
            "the product r * in * out is the cost of multiplying B A out; stored are only the two factors": (
                lambda shapes, r: sum(r * out * inp for out, inp in shapes)
            ),
        },
        inputs,
    )


def supervise(function: Callable) -> None:
    """`function(prompt_ids, completion_ids)`: the targets, -100 where there is no loss."""

    def inputs():
        return tuple([random.randint(5, 999) for _ in range(random.randint(3, 9))] for _ in range(2))

    compare(
        "supervise",
        function,
        lambda prompt, completion: [-100] * len(prompt) + completion,
        {
            "the prompt is supervised too; it should carry -100": lambda p, c: p + c,
            "the prompt is missing: targets are as long as prompt and completion together": lambda p, c: c,
            "shifted by one already; the loss does the shift, and twice is once too often": lambda p, c: (
                [-100] * (len(p) - 1) + c + [-100]
            ),
            "the completion carries -100 and the prompt is supervised; it is the other way round": lambda p, c: (
                p + [-100] * len(c)
            ),
            "use -100, cross_entropy's ignore_index; 0 is a real token": lambda p, c: [0] * len(p) + c,
        },
        inputs,
    )


def training_flops(function: Callable) -> None:
    """`function(weights, tokens, frozen)`: multiply-adds count two; forward and backward."""
    frozen = itertools.cycle([True, False])  # both come up, whatever the luck
    compare(
        "training_flops",
        function,
        lambda weights, tokens, frozen: (4 if frozen else 6) * weights * tokens,
        {
            "that is the forward pass alone: 2 operations a weight and token": lambda w, t, f: 2 * w * t,
            "a frozen weight needs no gradient of its own: forward 2 and gradient of the input 2 make 4": lambda w, t, f: (
                6 * w * t
            ),
            "a trained weight needs three products: forward, gradient of the input, gradient of the weight": lambda w, t, f: (
                4 * w * t
            ),
            "a multiplication and an addition are two operations": lambda w, t, f: (2 if f else 3) * w * t,
        },
        lambda: (random.randint(10**6, 10**8), random.randint(100, 2000), next(frozen)),
    )


def greedy_token(function: Callable) -> None:
    """`function(logits)`: logits (time, vocab) to the id of the next token, greedily."""
    compare(
        "greedy_token",
        function,
        lambda logits: int(logits[-1].argmax()),
        {
            "that predicts from the first position; the next token is predicted at the last": lambda x: int(
                x[0].argmax()
            ),
            "that is the largest logit's value; the question asks for its index": lambda x: float(
                x[-1].max()
            ),
            "argmax over the whole matrix; take the last row first": lambda x: int(x.argmax()),
            "that is a prediction for every position; only the last is new": lambda x: x.argmax(dim=-1),
        },
        lambda: (torch.randn(random.randint(3, 6), random.randint(20, 50)),),
    )

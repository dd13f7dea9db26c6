"""Checks of the exercises of the first lesson: bytes, operations, and the next token."""

import itertools
import random
from collections.abc import Callable

import torch

from labkit.lab.check.compare import compare


def weight_bytes(function: Callable) -> None:
    """`function(parameters, bits)`: the bytes that the weights take."""
    compare(
        "weight_bytes",
        function,
        lambda parameters, bits: parameters * bits / 8,
        {
            "that is bits; there are eight to a byte": lambda p, b: p * b,
            "that divides by 1024 or 10^6 somewhere; give plain bytes": lambda p, b: p * b / 8 / 1e6,
            "the bits are divided by 4; a byte has eight": lambda p, b: p * b / 4,
        },
        lambda: (random.randint(10**6, 10**9), random.choice([4, 8, 16, 32])),
    )


def training_flops(function: Callable) -> None:
    """`function(weights, tokens, frozen)`: operations of a training step; a multiply-add counts as two."""
    frozen = itertools.cycle([True, False])  # both are tried, whatever the luck
    compare(
        "training_flops",
        function,
        lambda weights, tokens, frozen: (4 if frozen else 6) * weights * tokens,
        {
            "that is the forward pass alone: 2 operations per weight and token": lambda w, t, f: 2 * w * t,
            "a frozen weight needs no gradient of its own: 2 for forward and 2 for the gradient of the input make 4": (
                lambda w, t, f: 6 * w * t
            ),
            "a trained weight needs three products: forward, gradient of the input, gradient of the weight": (
                lambda w, t, f: 4 * w * t
            ),
            "a multiplication and an addition are two operations": lambda w, t, f: (2 if f else 3) * w * t,
        },
        lambda: (random.randint(10**6, 10**8), random.randint(100, 2000), next(frozen)),
    )


def greedy_token(function: Callable) -> None:
    """`function(logits)`: logits (time, vocab) to the id of the next token, chosen greedily."""
    compare(
        "greedy_token",
        function,
        lambda logits: int(logits[-1].argmax()),
        {
            "that predicts from the first position; the next token is predicted at the last": (
                lambda x: int(x[0].argmax())
            ),
            "that is the value of the largest logit; the question asks for its index": (
                lambda x: float(x[-1].max())
            ),
            "that is argmax over the whole matrix; take the last row first": lambda x: int(x.argmax()),
            "that is a prediction for every position; only the last is new": lambda x: x.argmax(dim=-1),
        },
        lambda: (torch.randn(random.randint(3, 6), random.randint(20, 50)),),
    )

"""Checks of the exercises on four bits."""

import random
from collections.abc import Callable

from labkit.lab.check.compare import compare


def bits_per_weight(function: Callable) -> None:
    """`function(blocksize, nested_blocksize)`: bits a weight with 4-bit codes, 8-bit scales and fp32 scales of scales."""

    def inputs():
        return random.choice([32, 64, 128, 256]), random.choice([128, 256, 512])

    compare(
        "bits_per_weight",
        function,
        lambda b, n: 4 + 8 / b + 32 / (b * n),
        {
            "that is without double quantization: the scales are 8 bits now, not 32": lambda b, n: 4 + 32 / b,
            "the fp32 scales of the scales are missing: one for each nested block of blocksize * nested_blocksize weights": (
                lambda b, n: 4 + 8 / b
            ),
            "the second level serves nested_blocksize *scales*, that is blocksize * nested_blocksize weights": (
                lambda b, n: 4 + 8 / b + 32 / n
            ),
            "these are the bits of the scales alone; the 4-bit code of the weight itself is missing": lambda b, n: (
                8 / b + 32 / (b * n)
            ),
            "that is in bytes; the question asks for bits": lambda b, n: (4 + 8 / b + 32 / (b * n)) / 8,
        },
        inputs,
    )


def weight_bytes(function: Callable) -> None:
    """`function(parameters, bits)`: bytes that the weights take."""
    compare(
        "weight_bytes",
        function,
        lambda parameters, bits: parameters * bits / 8,
        {
            "that is bits; there are eight of them to a byte": lambda p, b: p * b,
            "that divides by 1024 or 10^6 somewhere; give plain bytes": lambda p, b: p * b / 8 / 1e6,
            "bits are divided by 4; a byte has eight": lambda p, b: p * b / 4,
        },
        lambda: (random.randint(10**6, 10**9), random.choice([4, 8, 16, 32])),
    )

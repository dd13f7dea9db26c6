"""Checks of the exercises on fine-tuning with QLoRA: what trains, what is supervised, bits per weight."""

import random
from collections.abc import Callable

from labkit.lab.check.compare import compare


def lora_parameters(function: Callable) -> None:
    """`function(shapes, r)`: the number of parameters that LoRA trains on layers of (out, in) shapes."""

    def inputs():
        shapes = [(random.randint(8, 900), random.randint(8, 900)) for _ in range(random.randint(2, 5))]
        return shapes, random.randint(2, 8)

    compare(
        "lora_parameters",
        function,
        lambda shapes, r: sum(r * (out + inp) for out, inp in shapes),
        {
            "that is twice the number: A has r * in and B has out * r, which makes r * (in + out), not 2 * r * (in + out)": (
                lambda shapes, r: sum(2 * r * (out + inp) for out, inp in shapes)
            ),
            "that is the number of weights in the layers themselves, which LoRA freezes": (
                lambda shapes, r: sum(out * inp for out, inp in shapes)
            ),
            "only one of the two matrices is counted": lambda shapes, r: sum(r * inp for out, inp in shapes),
            "r * in * out is the cost of multiplying B A out; only the two factors are stored": (
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
            "the prompt is missing: the targets are as long as prompt and completion together": lambda p, c: (
                c
            ),
            "already shifted by one; the loss does the shift, so yours would be shifted twice": lambda p, c: (
                [-100] * (len(p) - 1) + c + [-100]
            ),
            "the completion carries -100 and the prompt is supervised; it should be the other way round": (
                lambda p, c: p + [-100] * len(c)
            ),
            "use -100, cross_entropy's ignore_index; 0 is a real token": lambda p, c: [0] * len(p) + c,
        },
        inputs,
    )


def bits_per_weight(function: Callable) -> None:
    """`function(blocksize, nested_blocksize)`: bits per weight, with fp32 scales of 8-bit scales."""

    def inputs():
        return random.choice([32, 64, 128, 256]), random.choice([128, 256, 512])

    compare(
        "bits_per_weight",
        function,
        lambda b, n: 4 + 8 / b + 32 / (b * n),
        {
            "that is without double quantization: the scales are 8 bits now, not 32": lambda b, n: 4 + 32 / b,
            "the fp32 scales of the scales are missing: one for every blocksize * nested_blocksize weights": (
                lambda b, n: 4 + 8 / b
            ),
            "the second level serves nested_blocksize *scales*, that is blocksize * nested_blocksize weights": (
                lambda b, n: 4 + 8 / b + 32 / n
            ),
            "these are the bits of the scales alone; the 4-bit code of the weight itself is missing": (
                lambda b, n: 8 / b + 32 / (b * n)
            ),
            "that is in bytes; the question asks for bits": lambda b, n: (4 + 8 / b + 32 / (b * n)) / 8,
        },
        inputs,
    )

"""Checks of the exercises on double quantization: the scales of the scales."""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.lab.check.compare import compare
from labkit.quant.codebooks import dynamic8, midpoints

NESTED = 256


def constant_bytes(function: Callable) -> None:
    """`function(n_weights, blocksize)`: bytes of all the constants of a weight under double quantization."""

    def blocks(n: int, size: int) -> int:
        return -(-n // size)

    def inputs():  # an incomplete block, and few enough blocks for one more or less to show
        blocksize = random.choice([32, 64, 128])
        return blocksize * random.randint(300, 1500) + random.randint(1, blocksize - 1), blocksize

    compare(
        "constant_bytes",
        function,
        lambda n, b: blocks(n, b) + 4 * blocks(blocks(n, b), NESTED) + 4,
        {
            "4 bytes are missing: those of the mean, or of the fp32 scale of an incomplete last block of scales": (
                lambda n, b: blocks(n, b) + 4 * blocks(blocks(n, b), NESTED)
            ),
            "that is without double quantization: a scale is one byte now, not four": (
                lambda n, b: 4 * blocks(n, b)
            ),
            "the fp32 scales of the scales are missing": lambda n, b: blocks(n, b) + 4,
            "an incomplete last block needs a scale too: round up, not down": (
                lambda n, b: n // b + 4 * (n // b // NESTED) + 4
            ),
            "the packed codes of the weights are counted too; the question asks for the constants alone": (
                lambda n, b: -(-n // 2) + blocks(n, b) + 4 * blocks(blocks(n, b), NESTED) + 4
            ),
            "that is in bits; there are eight to a byte": (
                lambda n, b: 8 * (blocks(n, b) + 4 * blocks(blocks(n, b), NESTED) + 4)
            ),
        },
        inputs,
    )


def dynamic_decade(function: Callable) -> None:
    """`function(decade)`: the positive levels of one decade, 0 … 6, of the signed dynamic map, rising."""

    def middles(steps: int, exponent: int) -> Tensor:
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float64)
        return (edges[1:] + edges[:-1]) / 2 * 10.0**exponent

    decades = iter(random.sample(range(1, 7), 5))
    compare(
        "dynamic_decade",
        function,
        lambda d: middles(2**d, d - 6),
        {
            "these are the edges of the steps; a level is halfway between two edges": (
                lambda d: torch.linspace(0.1, 1, 2**d + 1, dtype=torch.float64)[1:] * 10.0 ** (d - 6)
            ),
            "these are the lower edges of the steps; a level is halfway between two edges": (
                lambda d: torch.linspace(0.1, 1, 2**d + 1, dtype=torch.float64)[:-1] * 10.0 ** (d - 6)
            ),
            "2^(decade + 1) levels make the unsigned map; here one bit is for the sign": (
                lambda d: middles(2 ** (d + 1), d - 6)
            ),
            "the factor 10^(decade - 6) is missing: only the last decade reaches up to 1": (
                lambda d: middles(2**d, 0)
            ),
            "the exponent is off by one: decade 6 spans 0.1 to 1, so its factor is 10^0": (
                lambda d: middles(2**d, d - 7)
            ),
            "the decades are in the wrong order: the largest magnitudes have the most levels": (
                lambda d: middles(2 ** (6 - d), d - 6)
            ),
            "your steps divide [0, 1]; a decade begins at 0.1": (
                lambda d: (torch.arange(2**d, dtype=torch.float64) + 0.5) / 2**d * 10.0 ** (d - 6)
            ),
            "the negative levels are there too; the question asks for the positive ones": (
                lambda d: torch.cat([-middles(2**d, d - 6).flip(0), middles(2**d, d - 6)])
            ),
        },
        lambda: (next(decades),),
        atol=0,  # or the smallest levels would all pass as zero
    )


def double_quantize(function: Callable) -> None:
    """`function(absmax, levels)`: fp32 scales (n,) to 8 bits and back; blocks of 256, `levels` rising."""

    def in_blocks(values: Tensor, size: int = NESTED) -> Tensor:
        return F.pad(values, (0, -len(values) % size)).view(-1, size)

    def over_largest(blocks: Tensor) -> Tensor:
        return blocks / blocks.abs().amax(dim=1, keepdim=True)

    def codes_of(absmax: Tensor, levels: Tensor) -> Tensor:
        scaled = over_largest(in_blocks(absmax - absmax.mean()))
        return torch.bucketize(scaled, midpoints(levels)).view(-1)[: len(absmax)]

    def back(absmax: Tensor, levels: Tensor, **changes) -> Tensor:
        """The scales as they are read back; the changes are what people get wrong."""
        offset = changes.get("offset", absmax.mean())
        blocks = in_blocks(absmax - offset, changes.get("block", NESTED))
        largest = changes.get("largest", lambda b: b.abs().amax(dim=1, keepdim=True))(blocks)
        codes = changes.get("code", lambda x: torch.bucketize(x, midpoints(levels)))(blocks / largest)
        values = (levels[codes.clamp(0, 255)] * largest).view(-1)[: len(absmax)]
        return values + changes.get("add", offset)

    def inputs():
        # three whole blocks of scales and an incomplete one; none so near a threshold that rounding in a
        # correct solution would decide
        while True:
            # the largest magnitudes of 64 normal weights, drawn by their quantile
            chance = torch.rand(3 * NESTED + random.randint(20, 200), dtype=torch.float64) ** (1 / 64)
            absmax = torch.special.ndtri((1 + chance) / 2).float()
            scaled = over_largest(in_blocks(absmax - absmax.mean()))
            edges = midpoints(dynamic8())
            near = torch.bucketize(scaled - 2e-6, edges) != torch.bucketize(scaled + 2e-6, edges)
            if not near.view(-1)[: len(absmax)].any():
                return absmax, dynamic8()

    compare(
        "double_quantize",
        function,
        back,
        {
            "the mean is not added back: half of the scales come out negative": lambda a, t: back(
                a, t, add=0
            ),
            "the mean is not subtracted first: the negative half of the codebook is never used": (
                lambda a, t: back(a, t, offset=torch.zeros(()))
            ),
            "that is one scale for all scales; the second level has blocks of 256": (
                lambda a, t: back(a, t, block=len(a))
            ),
            "the second level's blocks have 256 scales; yours look like 64": (
                lambda a, t: back(a, t, block=64)
            ),
            "a block is divided by its largest value; take the largest *magnitude*: once the mean is gone, both signs "
            "occur": lambda a, t: back(a, t, largest=lambda b: b.amax(dim=1, keepdim=True)),
            "that rounds down: the code is that of the *nearest* level, so compare with the midpoints between levels": (
                lambda a, t: back(a, t, code=lambda x: torch.bucketize(x, t, right=True) - 1)
            ),
            "that rounds up: the code is that of the *nearest* level, so compare with the midpoints between levels": (
                lambda a, t: back(a, t, code=lambda x: torch.bucketize(x, t))
            ),
            "these are codes; the question asks for the scales as they are read back": codes_of,
            "these are the scales as they were; nothing was quantized": lambda a, t: a,
        },
        inputs,
    )


def pair_table(function: Callable) -> None:
    """`function(levels)`: the two weights that each byte stands for, (256, 2)."""

    def table(levels: Tensor) -> Tensor:
        byte = torch.arange(256)
        return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)

    compare(
        "pair_table",
        function,
        table,
        {
            "the nibbles are swapped: the first weight is in the high four bits": lambda t: table(t).flip(1),
            "both columns hold the low four bits": lambda t: table(t)[:, 1:].expand(256, 2),
            "both columns hold the high four bits": lambda t: table(t)[:, :1].expand(256, 2),
            "the table is transposed: one row per byte, with its two weights side by side": lambda t: (
                table(t).T
            ),
            "these are the codes; look them up in `levels`": lambda t: table(torch.arange(16.0)),
        },
        lambda: (torch.randn(16).sort().values,),
    )

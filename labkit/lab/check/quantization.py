"""Checks of the exercises on four bits: blocks, packed codes, the nearest level, and NormalFloat itself."""

import random
from collections.abc import Callable
from itertools import cycle

import torch

from labkit.lab.check.compare import compare


def outlier_victims(function: Callable) -> None:
    """`function(position, n, blocksize)`: first, and one past last, of the weights that share its scale."""

    in_last_block = cycle([False, True])  # alternately, not by chance: each kind must be tried

    def inputs():
        blocksize = random.choice([32, 64, 128])
        n = blocksize * random.randint(3, 9) + random.randint(1, blocksize - 1)
        whole = n - n % blocksize
        position = random.randrange(whole, n) if next(in_last_block) else random.randrange(blocksize, whole)
        return position, n, blocksize

    compare(
        "outlier_victims",
        function,
        lambda position, n, b: (position // b * b, min(position // b * b + b, n)),
        {
            "the last block may be shorter: it ends where the weights end": (
                lambda p, n, b: (p // b * b, p // b * b + b)
            ),
            "blocks do not move with the outlier: they start at multiples of the block size": (
                lambda p, n, b: (p - b // 2, p + b // 2)
            ),
            "that is the block *after* the one that holds `position`; divide before you multiply": (
                lambda p, n, b: (p // b * b + b, min(p // b * b + 2 * b, n))
            ),
            "that is every weight, as with one scale for the whole tensor": lambda p, n, b: (0, n),
            "that is the number of the block; multiply by blocksize to get to its weights": (
                lambda p, n, b: (p // b, p // b + 1)
            ),
            "give one past the last weight, as Python's slices do": (
                lambda p, n, b: (p // b * b, min(p // b * b + b, n) - 1)
            ),
        },
        inputs,
    )


def unpack_nibbles(function: Callable) -> None:
    """`function(packed, n)`: packed (ceil(n / 2), 1) uint8 to its n codes, the first in the high bits."""

    def inputs():
        n = 2 * random.randint(3, 20) + 1
        return torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8), n

    def both(packed, first, second):
        return torch.stack([first(packed), second(packed)], dim=-1).view(-1)

    def high(packed):
        return packed >> 4

    def low(packed):
        return packed & 15

    compare(
        "unpack_nibbles",
        function,
        lambda packed, n: both(packed, high, low)[:n],
        {
            "the nibbles are swapped: the first weight is in the high four bits": (
                lambda p, n: both(p, low, high)[:n]
            ),
            "n is odd: the last low nibble is padding and must go": lambda p, n: both(p, high, low),
            "the nibbles are swapped, and the padding of the odd tail is still there": (
                lambda p, n: both(p, low, high)
            ),
            "all high nibbles come first, then all low ones; the two of one byte should be neighbours": (
                lambda p, n: torch.cat([high(p), low(p)]).view(-1)[:n]
            ),
            "the low nibble still has the high one above it: mask it with `& 15`": (
                lambda p, n: both(p, high, lambda q: q)[:n]
            ),
            "the high nibble has not been shifted down: use `>> 4`": (
                lambda p, n: both(p, lambda q: q & 240, low)[:n]
            ),
        },
        inputs,
    )


def nearest_code(function: Callable) -> None:
    """`function(x, levels)`: the index of the level nearest to each x; a tie goes to the lower level."""

    def inputs():
        # (16,) rising; midpoints are exact in fp32
        levels = (torch.randperm(127)[:16].sort().values - 63) / 64
        ties = (levels[1:] + levels[:-1]) / 2
        x = torch.cat([ties, torch.rand(20) * 2 - 1])
        return x[torch.randperm(len(x))], levels

    def middles(levels):
        return (levels[1:] + levels[:-1]) / 2

    compare(
        "nearest_code",
        function,
        lambda x, levels: torch.bucketize(x, middles(levels)),
        {
            "ties go to the lower level: count the thresholds *below* x, not those at x": (
                lambda x, levels: torch.bucketize(x, middles(levels), right=True)
            ),
            "x is compared with the levels; the decision is made at the midpoints between them": (
                lambda x, levels: torch.bucketize(x, levels)
            ),
            "that rounds down to the level below; the nearest may be the one above": (
                lambda x, levels: (torch.bucketize(x, levels, right=True) - 1).clamp(min=0)
            ),
            "that is the nearest level itself; what is stored is its index": (
                lambda x, levels: levels[torch.bucketize(x, middles(levels))]
            ),
            "the distance needs an absolute value: the most negative difference is not the nearest": (
                lambda x, levels: (x[:, None] - levels).argmin(dim=1)
            ),
            "that assumes that the levels are evenly spaced": lambda x, levels: (
                ((x + 1) * 7.5).round().long()
            ),
        },
        inputs,
    )


def scale_blocks(function: Callable) -> None:
    """`function(flat, blocksize)`: (n,) weights, each over its block's largest magnitude; zeros stay."""

    def inputs():
        blocksize = random.choice([8, 16])
        flat = torch.randn(blocksize * random.randint(4, 8) + random.randint(2, blocksize - 1))
        flat *= 10.0 ** torch.randint(-3, 3, ()).item()
        flat[blocksize : 2 * blocksize] = 0
        flat[0] = -5 * flat.abs().max()  # the first block's largest magnitude is a negative weight
        return flat, blocksize

    def in_blocks(flat, blocksize, scale):
        return torch.cat([block / scale(block) for block in flat.split(blocksize)])

    def absmax(block):
        return block.abs().max().clamp(min=1e-38)

    compare(
        "scale_blocks",
        function,
        lambda flat, b: in_blocks(flat, b, absmax),
        {
            "a block of zeros became NaN: 0 / 0. Keep its scale away from zero (clamp at 1e-38)": (
                lambda flat, b: in_blocks(flat, b, lambda block: block.abs().max())
            ),
            "the scale is the largest *magnitude*; yours is the largest value, which misses a negative outlier": (
                lambda flat, b: in_blocks(flat, b, lambda block: block.max().clamp(min=1e-38))
            ),
            "that is one scale for the whole tensor; each block has its own": (
                lambda flat, b: flat / flat.abs().max()
            ),
            "the incomplete last block is missing; it has a scale too": (
                lambda flat, b: in_blocks(flat[: len(flat) // b * b], b, absmax)
            ),
            "that divides by the standard deviation, so some values leave [-1, 1]": (
                lambda flat, b: in_blocks(flat, b, torch.std)
            ),
            "the weights are multiplied by their scale; to get into [-1, 1], divide": (
                lambda flat, b: torch.cat([block * absmax(block) for block in flat.split(b)])
            ),
        },
        inputs,
    )


def normal_float(function: Callable) -> None:
    """`function(bits, offset)`: the 2^bits levels of NormalFloat, rising from -1 to 1, with an exact zero."""

    offsets = cycle([0.9677083, 0.95, 0.98])

    def inputs():
        return random.choice([2, 3, 5, 6]), next(offsets)

    def quantiles(n, offset):
        return torch.special.ndtri(torch.linspace(offset, 0.5, n + 1)[:-1].double())  # (n,) falling

    def levels(n_below, n_above, offset, zeros=1):
        parts = [-quantiles(n_below, offset), torch.zeros(zeros).double(), quantiles(n_above, offset)]
        return torch.cat(parts).sort().values

    def probabilities(n_below, n_above, offset):
        below, above = (torch.linspace(offset, 0.5, n + 1)[:-1] - 0.5 for n in (n_below, n_above))
        return torch.cat([-below, torch.zeros(1), above]).sort().values

    def half(bits):
        return 2 ** (bits - 1)

    def over_max(x):
        return x / x.max()

    compare(
        "normal_float",
        function,
        lambda bits, offset: over_max(levels(half(bits) - 1, half(bits), offset)),
        {
            "the levels are not divided by the largest: they must reach from -1 to 1": (
                lambda bits, offset: levels(half(bits) - 1, half(bits), offset)
            ),
            "as many steps below zero as above leave no code for zero itself": (
                lambda bits, offset: over_max(levels(half(bits), half(bits), offset, zeros=0))
            ),
            "that is one level too many: zero takes a code, so one side has a step fewer": (
                lambda bits, offset: over_max(levels(half(bits), half(bits), offset))
            ),
            "the longer side should be the positive one; yours is the negative": (
                lambda bits, offset: over_max(levels(half(bits), half(bits) - 1, offset))
            ),
            "these are probabilities; a level is the quantile there (torch.special.ndtri)": (
                lambda bits, offset: over_max(probabilities(half(bits) - 1, half(bits), offset))
            ),
            "the outermost level is infinite: the quantile of probability 1. Start at `offset`": (
                lambda bits, offset: over_max(levels(half(bits) - 1, half(bits), 1.0))
            ),
            "`offset` is an argument; yours is fixed at 0.9677083": (
                lambda bits, offset: over_max(levels(half(bits) - 1, half(bits), 0.9677083))
            ),
            "one range of quantiles from 1 - offset to offset has no exact zero; build the two sides separately": (
                lambda bits, offset: over_max(
                    torch.special.ndtri(torch.linspace(1 - offset, offset, 2**bits).double())
                )
            ),
            "the levels must rise: sort them": lambda bits, offset: over_max(
                torch.cat([-quantiles(half(bits) - 1, offset), torch.zeros(1), quantiles(half(bits), offset)])
            ),
        },
        inputs,
    )

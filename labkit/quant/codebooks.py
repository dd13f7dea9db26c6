"""The sixteen values that a 4-bit weight can take, and the 256 of an 8-bit scale: derived, not pasted.

A codebook is an fp32 table `levels` with values in [-1, 1]. A weight is divided by the largest magnitude of
its block, so it lies in [-1, 1], and is stored as the index of the nearest level.

    int4               evenly spaced, which trained weights are not
    fp4, fp4-e3m0      small floating-point numbers: levels that double, dense around zero
    nf4                quantiles of the standard normal: within a block, trained weights are close to normal
    optimal-64, ...    the smallest expected error of a normal weight over the largest of its block
    dynamic8           8 bits, for scales: few bits of fraction for small magnitudes, many for large ones

Sources: QLoRA (Dettmers et al. 2023), section 3, appendix E; 8-bit Optimizers (Dettmers et al. 2022),
section 2; Yoshida 2023 (arXiv 2306.06965). Agrees with: bitsandbytes `functional.py`.
"""

from functools import cache, lru_cache

import torch
from torch import Tensor

from labkit.checks import check_choice


def normal_quantiles(n: int, offset: float) -> Tensor:
    """`n` standard-normal quantiles from probability `offset` down to, but not including, one half.

    The probabilities are spaced in fp32, although their quantiles are taken in float64: bitsandbytes does so,
    and in float64 throughout the table differs by up to 1.2e-7, which is enough to change packed bytes.

    Returns:
        float64 tensor of shape (n,), positive and falling.
    """
    probabilities = torch.linspace(offset, 0.5, n + 1, dtype=torch.float32)[:-1]  # (n,) fp32
    return torch.special.ndtri(probabilities.double())


@cache
def nf4(offset: float = 0.9677083) -> Tensor:
    """The 16 levels of NF4 (4-bit NormalFloat).

    Levels at equally spaced quantiles would each be used equally often. Two half-ranges are taken, eight
    steps above zero and seven below, so zero itself is a level: a pruned or padded weight stays exactly
    zero.

    Args:
        offset: probability of the outermost level; 1 would put it at infinity. The default is the value of
            bitsandbytes and of the paper.

    Returns:
        fp32 tensor of shape (16,), rising from -1 to 1, with an exact zero at index 7. Do not write to it.

    >>> nf4()[[0, 1, 7, 8, 15]].tolist()
    [-1.0, -0.6961928009986877, 0.0, 0.07958029955625534, 1.0]
    """
    above = normal_quantiles(8, offset)  # (8,)
    below = -normal_quantiles(7, offset)  # (7,)
    levels = torch.cat([below, above.new_zeros(1), above]).sort().values.float()  # (16,)
    return levels / levels.max()


@cache
def fp4() -> Tensor:
    """FP4 with two exponent bits and one fraction bit (E2M1), in bitsandbytes' order of codes.

    The levels do not rise with the code: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then the same with the sign
    bit set. Arithmetic would make the smallest magnitude 1/12, half the next one; bitsandbytes and its
    checkpoints have 1/192.

    Returns:
        fp32 tensor of shape (16,), not sorted, with zero at codes 0 and 8. Do not write to it.
    """
    magnitudes = torch.tensor([0.0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)  # (8,)
    return torch.cat([magnitudes, 0 - magnitudes]) / 12


@cache
def fp4_e3m0() -> Tensor:
    """FP4 with three exponent bits and no fraction: zero, and the powers of two 1/64 … 1, with both signs.

    Returns:
        fp32 tensor of shape (16,), rising, with zero twice, at 7 and 8. Do not write to it.
    """
    magnitudes = torch.cat(
        [torch.zeros(1, dtype=torch.float32), 2.0 ** torch.arange(-6, 1, dtype=torch.float32)]
    )  # (8,)
    return torch.cat([0 - magnitudes.flip(0), magnitudes])


@cache
def int4() -> Tensor:
    """Signed 4-bit integers -7 … 7, divided by 7. Symmetric, so the sixteenth code is spent on a second zero.

    Returns:
        fp32 tensor of shape (16,), rising, with zero at 7 and 8. Do not write to it.
    """
    return torch.cat([torch.arange(-7, 1), torch.arange(0, 8)]).float() / 7


@cache
def dynamic8(signed: bool = True) -> Tensor:
    """The 256 levels of the dynamic 8-bit type; the signed one stores the scales under double quantization.

    It is like a floating-point number whose exponent is written in unary. Magnitudes fall into seven decades,
    10^-6 … 10^0. Decade i has 2^i levels (2^(i+1) if no bit goes to the sign): the middles of equal steps of
    [0.1, 1], times 10^(i-6). Zero and one complete the table.

    Returns:
        fp32 tensor of shape (256,), rising from -0.99297 (0 if unsigned) to 1, with one zero. Do not write to
        it.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        n = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float32)
        magnitudes = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        levels += magnitudes.tolist() + ((-magnitudes).tolist() if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32)


@cache
def optimal(blocksize: int, edge_at_zero: bool = False) -> Tensor:
    """The levels that minimise the expected |error| of a normal weight, scaled by the largest of its block.

    A weight over the largest of its *block* is not normal. In a block of B normal weights, one is scaled to
    -1 or 1, so those two are levels; zero is kept as a third. The other weights are normals cut off at the
    largest, m, whose distribution function is (2Φ(m) - 1)^B, so

        G(x) = E_m [ (Φ(x m) - Φ(-m)) / (2Φ(m) - 1) ]

    is the distribution of a scaled weight. |error| is smallest when every level is the median of its cell,
    the values nearer to it than to its neighbours: G(level) = (G(lower edge) + G(upper edge)) / 2. Edges and
    medians are computed in turn until they settle (Lloyd's algorithm).

    The published table, "AF4", is a little worse than this one: it optimises the two sides with an edge at
    zero, as if zero were not a level, and adds the zero afterwards, so three levels crowd there.

    Args:
        blocksize: weights per scale, at least 2.
        edge_at_zero: compute the published table instead.

    Returns:
        fp32 tensor of shape (16,), rising from -1 to 1, with an exact zero at index 7. Do not write to it.

    Source: Yoshida 2023, sections 3 and 4 ("AF4").

    >>> [round(level, 3) for level in optimal(64, edge_at_zero=True)[[1, 6, 8, 14]].tolist()]
    [-0.694, -0.049, 0.043, 0.724]
    """
    if blocksize < 2:
        raise ValueError(
            f"blocksize={blocksize}: with one weight per block, every weight is its own scale; use 2 or more"
        )
    likely = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    largest = torch.special.ndtri((1 + likely ** (1 / blocksize)) / 2)  # (1024,) equally likely values of m
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    phi = torch.special.ndtr
    inside = (phi(x[:, None] * largest) - phi(-largest)) / (2 * phi(largest) - 1)  # (4001, 1024)
    distribution = inside.mean(dim=1)  # (4001,) G on the grid x
    levels = torch.linspace(-1, 1, 16, dtype=torch.float64)
    levels[7] = 0
    free = torch.tensor([1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14])
    for _ in range(1000):
        edges = (levels[:-1] + levels[1:]) / 2  # (15,)
        if edge_at_zero:
            edges[6:8] = 0
        mass = interpolate(edges, x, distribution)  # (15,) G at the edges
        median = interpolate((mass[:-1] + mass[1:]) / 2, distribution, x)  # (14,) of cells 1 … 14
        levels[free] = median[free - 1]
    return levels.float()


def interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The piecewise linear function through the points (x, y), x rising, at `at`."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    weight = (at - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + weight * (y[right] - y[right - 1])


CODEBOOKS = {
    "nf4": nf4(),
    "fp4": fp4(),
    "fp4-e3m0": fp4_e3m0(),
    "int4": int4(),
    "dynamic8": dynamic8(),
    "dynamic8-unsigned": dynamic8(signed=False),
}


def codebook(name: str) -> Tensor:
    """The levels of a codebook by name, fp32, in the order of their codes.

    Args:
        name: a key of `CODEBOOKS`, or "optimal-64" with any block size.

    Raises:
        ValueError: there is no codebook of that name.
    """
    try:
        return CODEBOOKS[name]
    except (KeyError, TypeError):  # an optimal one that is made on first use, or not a codebook at all
        family, _, blocksize = str(name).partition("-")
    if family != "optimal" or not blocksize.isdecimal():
        check_choice("codebook", name, dict.fromkeys([*CODEBOOKS, "optimal-64"]))
    CODEBOOKS[name] = optimal(int(blocksize))
    return CODEBOOKS[name]


def midpoints(levels: Tensor) -> Tensor:
    """Decision thresholds between neighbouring levels, rising, shape (len - 1,).

    The rank of the level nearest to a value is the number of thresholds below the value.
    """
    rising = levels.sort().values
    return (rising[:-1] + rising[1:]) / 2


def codes_by_rank(levels: Tensor) -> Tensor:
    """The codes of the levels, from the lowest level up: uint8, shape (len,). 0, 1, 2 … unless it is fp4."""
    return levels.argsort(stable=True).to(torch.uint8)


def search_tables(levels: Tensor) -> tuple[Tensor, Tensor]:
    """What a search for the nearest level needs: `midpoints` and `codes_by_rank`.

    They are kept, because making them takes as long as quantizing a small layer.
    """
    return kept_search_tables(tuple(levels.tolist()))


@lru_cache(maxsize=64)
def kept_search_tables(levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(levels, dtype=torch.float32)
    return midpoints(levels), codes_by_rank(levels)

"""Four bits on a real weight: codebook, block size, and what a single outlier does."""

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor

from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.quant.blockwise import dequantize_blocks, quantize_blocks
from labkit.quant.codebooks import codebook as levels_of

NAMES = ("int4", "fp4", "fp4-e3m0", "nf4", "optimal-64")
WHOLE = "whole tensor"
BLOCKSIZES = (32, 64, 256, 1024, 4096, WHOLE)
OUTLIERS = (0, 10, 30, 100, 300)  # size of the one planted weight, in standard deviations; 0 plants none
MOST = 1 << 18  # how many weights of a tensor are used; more would make the controls sluggish


def rounded(flat: Tensor, codebook: str, blocksize: int) -> Tensor:
    """`flat` (n,) fp32 after quantization and dequantization, with any block size."""
    codes, absmax = quantize_blocks(flat, levels_of(codebook), blocksize)
    return dequantize_blocks(codes, absmax, levels_of(codebook), blocksize)


def with_outlier(flat: Tensor, outlier: float) -> tuple[Tensor, Tensor]:
    """A copy whose middle weight is `outlier` standard deviations large, and a mask that excludes it."""
    planted, others = flat.clone(), torch.ones(len(flat), dtype=torch.bool)
    if outlier:
        planted[len(flat) // 2] = outlier * flat.std()
        others[len(flat) // 2] = False
    return planted, others


def relative_error(flat: Tensor, codebook: str, blocksize: int, outlier: float = 0) -> float:
    """Norm of the error over norm of the weights, without the planted outlier in either."""
    planted, others = with_outlier(flat, outlier)
    error = rounded(planted, codebook, blocksize) - planted
    return (error[others].norm() / planted[others].norm()).item()


def codebook_explorer(weights: dict[str, Tensor]) -> None:
    """Pick a weight, a codebook and a block size, and plant one outlier: see where the scaled weights fall
    between the levels, and the error of each codebook, computed live.

    Args:
        weights: {name: weight of any shape}; of a large one, only the first 262,144 numbers are used.

    Raises:
        ValueError: no weights.
    """
    if not weights:
        raise ValueError("weights is empty; give at least one, {name: tensor}")

    def draw(weight: str, codebook: str, blocksize: int | str, outlier: float) -> None:
        flat = weights[weight].detach().float().cpu().reshape(-1)[:MOST]  # (n,)
        size = len(flat) if isinstance(blocksize, str) else blocksize  # WHOLE is one block
        planted, _ = with_outlier(flat, outlier)
        scale = torch.cat([block.abs().max()[None] for block in planted.split(size)])
        scaled = planted / scale.clamp(min=1e-38).repeat_interleave(size)[: len(planted)]  # (n,) in [-1, 1]
        levels = levels_of(codebook)
        used = quantize_blocks(planted, levels, size)[0].unique().numel()

        figure, (left, right) = canvas(width=9, height=3.3, columns=2)
        counts, edges = torch.histogram(scaled, bins=120, range=(-1, 1))
        share = 100 * counts / len(scaled)
        left.stairs(share.numpy(), edges.numpy(), fill=True, color=COLOURS["base"])
        left.vlines(levels.numpy(), 0, share.max().item() * 1.06, color=COLOURS["nf4"], linewidth=1)
        title = f"Weights between the levels: {used} of 16 used"
        finish(left, title, "weight / absmax of its block", "% of the weights")
        errors = [100 * relative_error(flat, name, size, outlier) for name in NAMES]
        colours = [COLOURS["nf4"] if name == codebook else COLOURS["control"] for name in NAMES]
        bars = right.barh(NAMES, errors, color=colours)
        right.bar_label(bars, fmt="{:.1f} %", padding=3)
        right.invert_yaxis()
        right.margins(x=0.2)
        where = WHOLE if blocksize == WHOLE else f"blocks of {blocksize}"
        title = f"Error, {where}, " + (f"outlier {outlier} σ" if outlier else "no outlier")
        finish(right, title, "% of the norm", "")
        display(figure)
        plt.close(figure)

    first = next(iter(weights))
    static = [
        {"weight": first, "codebook": "nf4", "blocksize": 64, "outlier": 30},
        {"weight": first, "codebook": "nf4", "blocksize": WHOLE, "outlier": 30},
    ]
    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        slider = {"continuous_update": False, **WIDE}
        controls["weight"] = Dropdown(options=list(weights), description="weight", **WIDE)
        controls["codebook"] = Dropdown(options=NAMES, value="nf4", description="codebook", **WIDE)
        controls["blocksize"] = SelectionSlider(
            options=BLOCKSIZES, value=64, description="block size", **slider
        )
        controls["outlier"] = SelectionSlider(
            options=OUTLIERS, value=0, description="outlier, in σ", **slider
        )
    panel(draw, controls, static)


def normal_levels(bits: int, offset: float) -> Tensor:
    """The 2^bits levels of NormalFloat: (2^bits,), rising from -1 to 1, with an exact zero."""
    half = 2 ** (bits - 1)
    above, below = (
        torch.special.ndtri(torch.linspace(offset, 0.5, n + 1)[:-1].double()) for n in (half, half - 1)
    )
    levels = torch.cat([-below, torch.zeros(1).double(), above]).sort().values
    return (levels / levels.max()).float()


def levels_explorer() -> None:
    """Derive NormalFloat's levels for an offset and a number of bits. Left: equal steps of probability. Right:
    the error of normal weights in blocks of 64 at every offset.
    """
    flat = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    offsets = torch.linspace(0.9, 0.995, 20).tolist()

    def error(bits: int, offset: float) -> float:
        levels = normal_levels(bits, offset)
        codes, absmax = quantize_blocks(flat, levels, 64)
        return 100 * ((dequantize_blocks(codes, absmax, levels, 64) - flat).norm() / flat.norm()).item()

    def draw(bits: int, offset: float) -> None:
        figure, (left, right) = canvas(width=9, height=3.4, columns=2)
        top = torch.special.ndtri(torch.tensor(offset, dtype=torch.float64)).item()
        z = torch.linspace(-1.15 * top, 1.15 * top, 200)
        left.plot(z, torch.special.ndtr(z), color=COLOURS["base"], linewidth=2)
        levels = normal_levels(bits, offset)
        for level in (levels * top).tolist():
            p = torch.special.ndtr(torch.tensor(level)).item()
            left.plot([z[0], level, level], [p, p, 0], color=COLOURS["nf4"], linewidth=0.7)
        left.set_ylim(0, 1)
        first = levels[levels > 0][0].item()
        finish(
            left,
            f"{len(levels)} levels; the first above zero {first:.4f}",
            "normal variable",
            "probability below",
        )
        curve = [error(bits, one) for one in offsets]
        right.plot(offsets, curve, "-", color=COLOURS["nf4"])
        diamond = {"color": COLOURS["gold"], "markersize": 9, "markeredgecolor": "black"}
        here = error(bits, offset)
        right.plot(offset, here, "D", **diamond)
        right.axvline(0.9677083, color=COLOURS["control"], linewidth=1, zorder=0)
        right.text(0.9677083, max(curve), " NF4's", color=COLOURS["base"], va="top")
        finish(right, f"{bits} bits, blocks of 64: {here:.2f} %", "offset", "error (% of the norm)")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import FloatSlider, IntSlider

        slider = {"continuous_update": False, **WIDE}
        steps = {"min": 0.9, "max": 0.995, "step": 0.0025, "readout_format": ".4f"}
        controls["bits"] = IntSlider(4, 2, 6, description="bits", **slider)
        controls["offset"] = FloatSlider(0.9675, description="offset", **steps, **slider)
    panel(draw, controls, [{"bits": 4, "offset": 0.9677083}])

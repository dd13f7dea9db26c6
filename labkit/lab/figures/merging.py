"""A merge into four bits, weight by weight: which updates carry a weight over the middle to the next level, and
which do not.
"""

import torch
from matplotlib.axes import Axes
from torch import Tensor

from labkit.lab.plots import COLOURS, finish
from labkit.quant.codebooks import codebook
from labkit.quant.tensor import quantize

BLOCK = 64


def reach(weight: Tensor, delta: Tensor, name: str = "nf4") -> Tensor:
    """How far each update goes, in halves of the gap to the next level on its side: above 1 the code changes.

    Args:
        weight: one block in full precision, (n,). Its updates are added to the quantized weights, as a merge into
            four bits does.
        delta: the updates, (n,).
        name: of the codebook.

    Returns:
        (n,), with the sign of the update; 0 where there is no further level.
    """
    levels = codebook(name).unique() * weight.abs().max()  # sorted, without a second zero
    before = quantize(weight.float(), name, len(weight), False).dequantize(torch.float32)
    nearest = (before[:, None] - levels).abs().argmin(1)
    ends = torch.full((1,), torch.inf)
    gaps = torch.cat([ends, levels.diff(), ends])  # below and above each level
    return delta.float() / (torch.where(delta > 0, gaps[nearest + 1], gaps[nearest]) / 2)


def crossings(weight: Tensor, delta: Tensor, axes: Axes, title: str, name: str = "nf4") -> Tensor:
    """Draw what an update does to a block of 64 weights: a bar for each, beyond ±1 it gets another code.

    Args:
        weight: of a layer in full precision, (out, in); its first 64 are drawn.
        delta: its update, of the same shape.
        axes: where to draw.
        title: of the figure.
        name: of the codebook.

    Returns:
        Which of the weights drawn change their code, (64,).
    """
    reached = reach(weight.flatten()[:BLOCK], delta.flatten()[:BLOCK], name)
    moved = reached.abs() > 1
    colours = [COLOURS["qlora" if crosses else "base"] for crosses in moved.tolist()]
    axes.bar(range(len(reached)), reached, color=colours, width=0.8)
    for side in (-1, 1):
        axes.axhline(side, color=COLOURS["full"], linewidth=1, linestyle="--")
    limit = max(1.6, 1.35 * reached.abs().max().item())  # room for the words above the bars
    axes.set_ylim(-limit, limit)
    words = {"ha": "right", "va": "top", "fontsize": 9.5, "transform": axes.transAxes}
    axes.text(0.99, 0.99, "beyond the dashed lines: another code", **words)
    axes.set_xticks([])
    finish(axes, title, f"{len(reached)} weights of a block", "update, in half gaps")
    return moved

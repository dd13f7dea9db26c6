"""A run as it goes: its loss on the left, the singular values of one layer's update on the right.

Drawn without pyplot, and without the mathematical text of logarithmic axes: both keep state that a thread other
than the notebook's must not touch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.analysis.spectra import effective_rank
from labkit.lab.plots import COLOURS, finish, loss_curve
from labkit.training.history import History

EARLIER = 5  # spectra that are drawn behind the last one


def run_figure(
    history: History | None,
    total: int | None = None,
    spectra: Mapping[int, Sequence[float]] | None = None,
    layer: str = "",
    recorded: History | None = None,
    moves: Sequence[tuple[int, float]] = (),
) -> Figure:
    """Loss and spectrum of a run, finished or not.

    Args:
        history: of the run; None before it.
        total: steps of the whole run; default: those in `history`.
        spectra: {after which step: singular values of the layer's update}.
        layer: what it is called in the title.
        recorded: another run, drawn in grey behind the loss.
        moves: (after which step, what the learning rate was multiplied by from there on).
    """
    figure = Figure(figsize=(9.5, 3.5), dpi=96, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_loss(left, history, total, recorded, moves)
    draw_spectra(right, spectra or {}, layer)
    return figure


def draw_loss(
    axes: Axes,
    history: History | None,
    total: int | None,
    recorded: History | None,
    moves: Sequence[tuple[int, float]],
) -> None:
    """The loss of each step and the held-out points, over the steps of the whole run."""
    if recorded is not None and recorded.steps:
        behind = recorded.to_frame()["loss"].rolling(15, min_periods=1, center=True).mean()
        axes.plot(np.arange(1, len(behind) + 1), behind, color=COLOURS["control"], linewidth=2)
        corner = {"ha": "right", "transform": axes.transAxes}
        axes.text(0.98, 0.74, "grey: the recorded run", color=COLOURS["base"], **corner)
    if history is not None and history.steps:
        loss_curve(history, "Loss", axes)
    else:
        axes.set_yscale("log")
        finish(axes, "Loss", "step", "loss (nats per supervised token)")
        axes.set_ylim(0.1, 10)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    last = max(total or 0, *(len(one.steps) for one in (history, recorded) if one is not None), 1)
    axes.set_xlim(0, last + 0.5)
    for step, factor in moves:
        axes.axvline(step + 0.5, color=COLOURS["optimizer"], linewidth=1, linestyle=":")
        place = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"lr × {factor:g}", (step + 0.5, 0), xycoords=("data", "axes fraction"), **place)


def draw_spectra(axes: Axes, spectra: Mapping[int, Sequence[float]], layer: str) -> None:
    """The last spectrum, and a few before it in grey, evenly spaced in steps."""
    finish(axes, f"ΔW of {layer}" if layer else "ΔW", "number of the singular value", "singular value")
    steps = sorted(step for step, values in spectra.items() if any(values))
    if not steps:
        axes.text(0.5, 0.5, "no update yet", ha="center", color=COLOURS["base"], transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    chosen = sorted({steps[i] for i in np.linspace(0, len(steps) - 1, EARLIER + 1).round().astype(int)})
    for step in chosen:
        values = spectra[step]
        is_last = step == steps[-1]
        look = {"color": COLOURS["lora"], "linewidth": 2, "marker": "o", "markersize": 3.5}
        faded = {"color": COLOURS["base"], "linewidth": 1, "alpha": 0.35 + 0.5 * step / steps[-1]}
        axes.plot(range(1, len(values) + 1), values, **(look if is_last else faded))
    last = torch.tensor(spectra[steps[-1]])
    corner = {"ha": "right", "va": "top", "transform": axes.transAxes}
    axes.text(0.98, 0.97, f"after step {steps[-1]}", color=COLOURS["lora"], **corner)
    axes.text(0.98, 0.88, f"effective rank {effective_rank(last):.1f} of {len(last)}", fontsize=9, **corner)
    if len(chosen) > 1:
        axes.text(0.98, 0.80, f"grey: from step {chosen[0]} on", color=COLOURS["base"], fontsize=9, **corner)
    axes.set_ylim(0, 1.08 * max(max(spectra[step]) for step in chosen))
    axes.xaxis.get_major_locator().set_params(integer=True)

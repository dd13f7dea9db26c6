"""Sick fine-tunes in pictures: loss curves beside a healthy one, and which probe finds which specimen."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labkit.doctor.findings import SICK, UNKNOWN
from labkit.lab.plots import COLOURS, STYLE, finish

SMOOTH = 5  # steps of a running mean
SHADES = LinearSegmentedColormap.from_list("found", ["#ffffff", COLOURS["qlora"]])


def smooth(losses: Sequence[float | None]) -> np.ndarray:
    """A running mean over `SMOOTH` steps, of as many as there are at the ends; NaN where the loss is."""
    values = np.array([np.nan if loss is None else loss for loss in losses], dtype=float)
    half = SMOOTH // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def beside_healthy(
    axes: Axes, losses: Sequence[float | None], healthy: Sequence[float | None], title: str
) -> None:
    """A run's loss (orange, each step as a dot) over that of a healthy one (grey)."""
    for curve, colour, width in ((healthy, "base", 4.0), (losses, "qlora", 1.8)):
        axes.plot(range(1, len(curve) + 1), smooth(curve), color=COLOURS[colour], linewidth=width)
    kept = [(i + 1, loss) for i, loss in enumerate(losses) if loss is not None]
    if kept:
        axes.plot(*zip(*kept), ".", color=COLOURS["qlora"], markersize=3)
    finish(axes, title, "", "")


def curve_wall(
    runs: Mapping[str, Sequence[float | None]],
    healthy: Sequence[float | None],
    columns: int = 4,
    height: float = 1.55,
) -> Figure:
    """Small curves, each over the same healthy one; a run without a curve says so.

    Args:
        runs: {title: the losses of its steps}; empty if nobody kept them.
        healthy: those of a healthy run.
        columns: of the figure.
        height: of each row, in inches.
    """
    plt.rcParams.update(STYLE)
    rows = -(-len(runs) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.15 * columns, height * rows),
        dpi=80,
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    top = 1.15 * max(loss for loss in healthy if loss is not None)
    for axes, (title, losses) in zip(grid.flat, runs.items()):
        beside_healthy(axes, losses, healthy, title)
        axes.set_title(title, loc="left", fontsize=9.5)
        axes.set_ylim(0, 1.35 * top)
        axes.set_xticks([])
        words = (
            "no curve was kept" if not losses else "NaN" if all(loss is None for loss in losses[1:]) else ""
        )
        axes.text(0.5, 0.5, words, ha="center", transform=axes.transAxes, fontsize=10)
    for axes in list(grid.flat)[len(runs) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("nats")
    return figure


def matrix_figure(lines: Sequence[Mapping], probes: Sequence[str]) -> Figure:
    """The confusion matrix: a row for each specimen, a column for each probe, the share of the seeds in which it is sick.

    A frame marks the probe that should be first. A grey dot: the probe could not say, for no seed. Where only some seeds
    are sick, it says how many.

    Args:
        lines: of data/results/doctor_matrix.jsonl.
        probes: their names, in order.
    """
    plt.rcParams.update(STYLE)
    by_name: dict[str, list[Mapping]] = {}
    for line in sorted(lines, key=lambda line: line["expected"] is None):  # the sick first
        by_name.setdefault(line["specimen"], []).append(line)
    names = list(by_name)
    shares = np.array([[share_of(by_name[name], probe, SICK) for probe in probes] for name in names])
    silent = np.array([[share_of(by_name[name], probe, UNKNOWN) for probe in probes] for name in names])
    figure, axes = plt.subplots(figsize=(7.6, 0.2 * len(names) + 1.2), dpi=70, layout="constrained")
    axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1.25, aspect="auto")
    for row, name in enumerate(names):
        for column, probe in enumerate(probes):
            if 0 < shares[row, column] < 1:
                share = f"{round(shares[row, column] * len(by_name[name]))} of {len(by_name[name])}"
                axes.text(column, row, share, ha="center", va="center", fontsize=8)
            elif silent[row, column] == 1:
                axes.plot(column, row, ".", color=COLOURS["control"], markersize=3)
            if by_name[name][0]["expected"] == probe:
                frame = {"fill": False, "edgecolor": COLOURS["full"], "linewidth": 1.6}
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
    sick = sum(bool(by_name[name][0]["expected"]) for name in names)
    axes.axhline(sick - 0.5, color=COLOURS["full"], linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xticks(range(len(probes)), probes, rotation=35, ha="left", fontsize=9.5)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    return figure


def share_of(lines: Sequence[Mapping], probe: str, outcome: str) -> float:
    """In which share of the lines a probe has this outcome."""
    return sum(line["findings"][probe]["outcome"] == outcome for line in lines) / len(lines)

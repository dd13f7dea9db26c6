"""Plots in the style of the course: readable at half width and in grey, labelled directly."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.sweeps.records import mean_interval, summarize

# one colour per concept through the whole course; they also differ in brightness, for greyscale
COLOURS = {
    "base": "#8a8a8a",
    "full": "#222222",
    "lora": "#1f77b4",
    "qlora": "#d95f02",
    "nf4": "#7b3294",
    "constants": "#c2a5cf",
    "optimizer": "#66a61e",
    "gradients": "#a6761d",
    "control": "#bdbdbd",
    "simple": "#5b8db8",
    "gold": "#e6ab02",
}
STYLE = {
    "figure.dpi": 96,
    "savefig.dpi": 96,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": False,
}


def canvas(width: float = 7.0, height: float = 3.6, columns: int = 1) -> tuple[Figure, Any]:
    """A figure in the style of the course, sizes in inches, and its `Axes`: an array for several columns."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the axis labels with their units; hide the spines that carry nothing."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def loss_curve(history, title: str, axes: Axes | None = None, colour: str = COLOURS["qlora"]) -> Axes:
    """Training loss of each step, its running mean, and the held-out loss with its values.

    Args:
        history: a `labkit.training.history.History`.
        title: what the figure shows.
        axes: where to draw; default: a new figure.
    """
    frame = history.to_frame()
    if axes is None:
        _, axes = canvas()
    axes.plot(frame["step"], frame["loss"], color=colour, alpha=0.3, linewidth=1)
    smooth = frame["loss"].rolling(15, min_periods=1, center=True).mean()
    axes.plot(frame["step"], smooth, color=colour, linewidth=2)
    corner = {"ha": "right", "transform": axes.transAxes}
    axes.text(0.98, 0.92, "training: each step, and running mean", color=colour, **corner)
    held = frame.dropna(subset="held_out")
    if len(held):
        axes.plot(held["step"], held["held_out"], "o", color=COLOURS["full"], markersize=6)
        for step, loss in zip(held["step"], held["held_out"]):
            where = {"xytext": (0, -17), "textcoords": "offset points", "ha": "center", "fontsize": 10}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
            axes.annotate(f"{loss:.2f}", (step, loss), bbox=box, **where)
        axes.text(0.98, 0.83, "● held-out", color=COLOURS["full"], **corner)
    axes.set_yscale("log")
    finish(axes, title, "step", "loss (nats per supervised token)")
    return axes


def memory_bars(rows: dict[str, dict[str, float]], title: str, axes: Axes | None = None) -> Axes:
    """Stacked horizontal bars of megabytes: one bar per method, one segment per part with its size.

    Args:
        rows: {method: {part: bytes}}; a part keeps its colour if its name is in `COLOURS`.
    """
    if axes is None:
        _, axes = canvas(height=0.75 * len(rows) + 1.6)
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    spare = ["#4c72b0", "#9ecae1", "#dd8452", "#937860", "#cccccc", "#55a868"]
    hatches = ["", "//", "..", "xx", "\\\\", "--"]
    widest = max(sum(row.values()) for row in rows.values()) / 1e6
    for n, part in enumerate(parts):
        left = [sum(v for p, v in row.items() if parts.index(p) < n) / 1e6 for row in rows.values()]
        size = [row.get(part, 0) / 1e6 for row in rows.values()]
        look = {"color": COLOURS.get(part, spare[n % len(spare)]), "hatch": hatches[n % len(hatches)]}
        axes.barh(list(rows), size, left=left, edgecolor="white", label=part, **look)
        for y, (start, width) in enumerate(zip(left, size)):
            if width > 0.07 * widest:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                place = {"ha": "center", "va": "center", "fontsize": 9, "bbox": box}
                axes.text(start + width / 2, y, f"{width:.0f}" if widest > 20 else f"{width:.2f}", **place)
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    finish(axes, title, "megabytes", "")
    return axes


def compare_bars(groups: dict[str, dict[str, float]], title: str, y: str, axes: Axes | None = None) -> Axes:
    """Grouped bars with their values: {series: {category: value}}; a series in `COLOURS` keeps its colour."""
    if axes is None:
        _, axes = canvas()
    categories = list(next(iter(groups.values())))
    width = 0.8 / len(groups)
    for n, (series, values) in enumerate(groups.items()):
        x = [i + (n - (len(groups) - 1) / 2) * width for i in range(len(categories))]
        bars = axes.bar(
            x, [values[c] for c in categories], width * 0.95, color=COLOURS.get(series), label=series
        )
        axes.bar_label(bars, fmt="{:.0%}" if max(values.values()) <= 1 else "{:.3g}", fontsize=9, padding=1)
    axes.set_xticks(range(len(categories)), categories)
    axes.legend(frameon=False, fontsize=10, ncols=len(groups), loc="upper left", bbox_to_anchor=(0, 1.02))
    axes.margins(y=0.18)
    finish(axes, title, "", y)
    return axes


def seed_curve(
    frame: pd.DataFrame, x: str, y: str, axes: Axes, colour: str, label: str = "", base: float = 10
) -> pd.DataFrame:
    """A sweep along `x` on a logarithmic axis: seeds as dots, means joined, the 95 % interval as a band.

    No band where there are only two seeds: Student's t is 12.7 there, and the band would be mostly that.

    Args:
        frame: one row per run (`labkit.sweeps.records.Results.to_frame`).
        x, y: its columns: the setting that varies, and the metric.
        label: written beside the last point.
        base: of the logarithm; 2 for ranks.

    Returns:
        What was drawn: mean, half-width of the interval and n for each value of `x`.
    """
    table = summarize(frame.sort_values(x), x, y)
    axes.set_xscale("log", base=base)
    half = table["half"].where(table["n"] > 2)
    low, high = table["mean"] - half, table["mean"] + half
    axes.fill_between(table[x], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(table[x], table["mean"], "-", color=colour, linewidth=1.5)
    axes.plot(frame[x], frame[y], "o", color=colour, markersize=3.5)
    if label:
        last = table.iloc[-1]
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (last[x], last["mean"]), color=colour, **beside)
    if base == 2:
        axes.set_xticks(table[x], [f"{v:g}" for v in table[x]])
        axes.minorticks_off()
    else:  # 0.001, 0.003, 0.01: the default labels run into each other when the axis spans a single decade
        axes.xaxis.set_major_locator(LogLocator(base, subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    return table


def seed_dots(
    groups: Mapping[str, Sequence[float]],
    title: str,
    x: str,
    colours: dict[str, str] | None = None,
    marks: dict[str, float] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """One row per group: seeds as dots, their mean as a line, the 95 % interval of the mean as a band.

    Args:
        groups: {name: one value per seed}.
        title, x: of the figure, and of its axis with the unit.
        colours: {name: colour}; default: that of LoRA.
        marks: {name: a value to mark in its row}, for instance from a run made just now.
        axes: where to draw; default: a new figure.
    """
    if axes is None:
        _, axes = canvas(height=0.42 * len(groups) + 1.3)
    for row, (name, values) in enumerate(groups.items()):
        mean, half = mean_interval(values)
        colour = (colours or {}).get(name, COLOURS["lora"])
        rows = [row - 0.3, row + 0.3]
        axes.fill_betweenx(rows, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        axes.plot([mean, mean], rows, color=colour, linewidth=2)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=5)
        if marks and name in marks:
            axes.plot(marks[name], row, "D", color=COLOURS["full"], fillstyle="none", markersize=9)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    finish(axes, title, x, "")
    return axes

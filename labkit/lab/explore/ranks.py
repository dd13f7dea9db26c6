"""Recorded sweeps: pick a task, an axis and how the learning rate is chosen, and see every seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish, seed_curve, seed_dots
from labkit.sweeps.records import summarize

AXES = {"rank": "r", "learning rate": "lr", "alpha": "alpha", "targets": "targets"}
BEST = "each its best, on validation"
SETTINGS = ("r", "alpha", "targets", "variant", "batch_size", "steps", "lr")


@dataclass(frozen=True)
class RecordedSweep:
    """The recorded runs of a task, for `sweep_explorer`.

    Args:
        frame: one row per run (`labkit.sweeps.records.Results.to_frame`), of adapters only.
        reference: {setting: value} of the run that all axes go through; the settings that an axis does not
            vary have these values. Settings left out may have any value.
        metrics: {column of `frame` to look at: its unit}.
        validation: the column by which learning rates are chosen; lower is better.
        same_budget: the targets axis compares runs whose trained parameters differ by at most this share.
    """

    frame: pd.DataFrame
    reference: Mapping[str, object]
    metrics: Mapping[str, str]
    validation: str = "validation_loss"
    same_budget: float = 0.05


def along(sweep: RecordedSweep, axis: str) -> pd.DataFrame:
    """The runs of `sweep` along `axis` at every learning rate; other settings are those of the reference.

    For targets the rank varies too, because a fair comparison fixes the number of parameters: only runs with
    as many parameters as the reference, up to `same_budget`, are kept.
    """
    column, frame = AXES[axis], sweep.frame
    free = {column, "lr"} | ({"r"} if axis == "targets" else set())
    for name in SETTINGS:
        if name in sweep.reference and name not in free:
            frame = frame[frame[name] == sweep.reference[name]]
    if axis == "targets" and len(frame):
        at_reference = frame[frame["targets"] == sweep.reference["targets"]]
        at_reference = at_reference[at_reference["r"] == sweep.reference["r"]]
        budget = at_reference["parameters"].mean()
        frame = frame[(frame["parameters"] - budget).abs() <= sweep.same_budget * budget]
    return frame


def at_rate(frame: pd.DataFrame, column: str, rate: float | str, validation: str) -> pd.DataFrame:
    """The runs at one rate per value of `column`: `rate`, or for `BEST` the best on mean validation loss."""
    if rate != BEST:
        return frame[frame["lr"] == rate]
    means = frame.groupby([column, "lr"], as_index=False)[validation].mean()
    chosen = means.loc[means.groupby(column)[validation].idxmin(), [column, "lr"]]
    return frame.merge(chosen)


def sweep_explorer(
    sweeps: Mapping[str, RecordedSweep],
    lines: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]] | None = None,
) -> None:
    """Pick a task, an axis, a metric, the learning rate and how many seeds; see the runs and their mean.

    Args:
        sweeps: {task: its recorded runs}.
        lines: {task: {metric: {label: (value, name of a colour in `COLOURS`)}}}, drawn across; the base
            model, say.

    Raises:
        ValueError: no sweeps.
    """
    if not sweeps:
        raise ValueError("sweeps is empty; give at least one, {task: RecordedSweep}")
    lines = lines or {}
    seeds = max(sweep.frame["seed"].nunique() for sweep in sweeps.values())

    def draw(task: str, axis: str, metric: str, rate: float | str, seeds: int) -> None:
        sweep = sweeps[task]
        if metric not in sweep.metrics:  # of another task
            metric = next(iter(sweep.metrics))
        column, unit = AXES[axis], sweep.metrics[metric]
        shown = sorted(sweep.frame["seed"].unique())[:seeds]
        frame = along(sweep, axis)
        frame = frame[frame["seed"].isin(shown)].dropna(subset=[metric])
        if axis != "learning rate":
            frame = at_rate(frame, column, rate, sweep.validation)
        figure, axes = canvas(width=8, height=3.6)
        title = f"{task}: {metric.replace('_', ' ')}, {len(shown)} seed" + "s" * (len(shown) > 1)
        if frame[column].nunique() < 2:
            text = f"no recorded runs of “{task}” vary {axis} at this learning rate"
            axes.text(0.5, 0.5, text, ha="center")
            axes.set_axis_off()
        elif axis == "targets":
            draw_targets(frame, metric, title, unit, axes)
        else:
            colour = COLOURS["lora"]
            seed_curve(frame, column, metric, axes, colour, base=10 if axis == "learning rate" else 2)
            if axis != "learning rate":
                write_rates(frame, column, metric, axes)
            for label, (value, name) in lines.get(task, {}).get(metric, {}).items():
                axes.axhline(value, color=COLOURS[name], linewidth=1)
                place = {"ha": "left", "va": "bottom", "transform": axes.get_yaxis_transform()}
                axes.text(0.01, value, label, color=COLOURS[name], **place)
            finish(axes, title, axis, unit)
        display(figure)
        plt.close(figure)

    static = [
        {"task": task, "axis": "rank", "metric": next(iter(sweep.metrics)), "rate": BEST, "seeds": seeds}
        for task, sweep in sweeps.items()
    ]
    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, IntSlider

        wide = {"layout": {"width": "30em"}, "style": {"description_width": "8em"}}
        metrics = list(dict.fromkeys(m for sweep in sweeps.values() for m in sweep.metrics))
        tried = sorted({float(lr) for sweep in sweeps.values() for lr in sweep.frame["lr"]})
        rates = [BEST, *((f"{rate:g}", rate) for rate in tried)]
        count = {"value": seeds, "min": 1, "max": seeds, "description": "seeds"}
        controls["task"] = Dropdown(options=list(sweeps), description="task", **wide)
        controls["axis"] = Dropdown(options=list(AXES), description="axis", **wide)
        controls["metric"] = Dropdown(options=metrics, description="metric", **wide)
        controls["rate"] = Dropdown(options=rates, description="learning rate", **wide)
        controls["seeds"] = IntSlider(continuous_update=False, **count, **wide)
    panel(draw, controls, static)


def write_rates(frame: pd.DataFrame, column: str, metric: str, axes: Axes) -> None:
    """The learning rate of each point, below it: it is half of what a point says."""
    table = summarize(frame, column, metric)
    for value, mean, half in zip(table[column], table["mean"], table["half"]):
        rate = frame.loc[frame[column] == value, "lr"].iloc[0]
        low = min(frame.loc[frame[column] == value, metric].min(), mean - (0 if math.isnan(half) else half))
        below = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center", "fontsize": 8.5}
        axes.annotate(f"lr {rate:g}", (value, low), color=COLOURS["base"], **below)
    axes.margins(y=0.18)


def draw_targets(frame: pd.DataFrame, metric: str, title: str, unit: str, axes: Axes) -> None:
    """One row per set of matrices, the lowest mean first."""
    order: Sequence[str] = frame.groupby("targets")[metric].mean().sort_values().index
    groups = {}
    for targets in order:
        rows = frame[frame["targets"] == targets]
        name = f"{short_targets(targets)}, r {rows['r'].iloc[0]}, lr {rows['lr'].iloc[0]:g}"
        groups[name] = list(rows[metric])
    seed_dots(groups, title, unit, axes=axes)


def short_targets(targets: str) -> str:
    """ ".*(q_proj|k_proj)" as "q, k"; "q_proj" as "q"."""
    return targets.removeprefix(".*").strip("()").replace("_proj", "").replace("|", ", ")

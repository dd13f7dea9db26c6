"""What each default of a trainer costs: a record of runs that change one setting at a time, as a table and a picture.

Runs are paired by seed: the same seed draws the same adapter and the same order of records. So a setting's price is the
mean over seeds of its difference from the reference, with Student's interval for the loss, and for the fields right one that
draws seeds and tickets anew together (`labkit.sweeps.records.two_way_interval`). A setting of a single seed has a difference
and no interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from labkit.data.tickets import TICKET_FIELDS
from labkit.files.reading import read_json_lines
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.paths import data_folder
from labkit.sweeps.records import mean_interval, two_way_interval

REFERENCE = "reference"


@dataclass(frozen=True)
class Price:
    """What a setting costs against the reference, over the seeds that both have.

    Attributes:
        setting: its name in the record.
        seeds: that both were run with.
        loss: held-out, mean over these seeds, in nats a token.
        loss_change: its mean difference, and the ends of the 95 % interval.
        fields: share of the fields of the test tickets that are right.
        fields_change: its mean difference, and the ends of the 95 % interval.
        exact: share of the test tickets that are right in all fields.
        steps: optimizer steps of a run.
        parameters: trainable.
        cpu: CPU seconds of training, as a multiple of the reference's; taken beside other work.
        peak: bytes that the process held at most while it trained, mean.
    """

    setting: str
    seeds: tuple[int, ...]
    loss: float
    loss_change: tuple[float, float, float]
    fields: float
    fields_change: tuple[float, float, float]
    exact: float
    steps: int
    parameters: int
    cpu: float
    peak: float

    @property
    def shows(self) -> bool:
        """Does the interval of the loss leave zero out?"""
        _, low, high = self.loss_change
        return low > 0 or high < 0


def load_prices(path: str | Path | None = None) -> list[dict]:
    """The lines of `data/results/trl_prices.jsonl`, or of another file that `recipes/trl_prices.py` made."""
    return read_json_lines(data_folder() / "results" / "trl_prices.jsonl" if path is None else Path(path))


def price_all(lines: Sequence[Mapping[str, Any]]) -> list[Price]:
    """The price of each setting of a record, in its order, the reference first; a setting that has no seed in
    common with the reference is left out.

    Raises:
        ValueError: the reference is not among the lines, or a run is there twice.
    """
    runs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        of_seed = runs.setdefault(line["setting"], {})
        if line["seed"] in of_seed:
            raise ValueError(
                f"{line['setting']!r} is recorded twice with seed {line['seed']}; keep one line of it"
            )
        of_seed[line["seed"]] = line
    if REFERENCE not in runs:
        raise ValueError(
            f"no line has the setting {REFERENCE!r}, against which the others are priced; there are {sorted(runs)}"
        )
    names = [REFERENCE, *(name for name in runs if name != REFERENCE)]
    return [found for name in names if (found := price(name, runs[name], runs[REFERENCE]))]


def price(
    setting: str, runs: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]
) -> Price | None:
    """The price of one setting, its runs and the reference's given by seed; None without a seed in common."""
    seeds = tuple(sorted(runs.keys() & reference.keys()))
    if not seeds:
        return None
    pairs = [(runs[seed], reference[seed]) for seed in seeds]
    losses = [number(one["held_out_loss"]) for one, _ in pairs]
    change, half = mean_interval(
        [loss - number(other["held_out_loss"]) for loss, (_, other) in zip(losses, pairs)]
    )
    right = np.array([[one["fields_right"], other["fields_right"]] for one, other in pairs]) / len(
        TICKET_FIELDS
    )
    difference = right[:, 0] - right[:, 1]  # (seeds, tickets)
    return Price(
        setting,
        seeds,
        float(np.mean(losses)),
        (change, change - half, change + half),
        float(right[:, 0].mean()),
        two_way_interval(difference) if len(seeds) > 1 else (float(difference.mean()), np.nan, np.nan),
        float(np.mean([one["exact_match"] for one, _ in pairs])),
        pairs[0][0]["steps"],
        pairs[0][0]["parameters"],
        float(np.mean([one["cpu_seconds"] / other["cpu_seconds"] for one, other in pairs])),
        float(np.mean([one["peak_bytes"] for one, _ in pairs])),
    )


def number(loss: float | None) -> float:
    """A loss; NaN for one that was not finite, which JSON has no number for."""
    return np.nan if loss is None else loss


def price_table(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`price_all` for reading: a row for each setting, in words and with intervals."""
    rows = []
    for one in price_all(lines):
        reference = one.setting == REFERENCE
        rows.append(
            {
                "switched": one.setting,
                "seeds": len(one.seeds),
                "steps": one.steps,
                "held-out loss": f"{one.loss:.3f}",
                "against the reference": "" if reference else interval(one.loss_change, "+.3f"),
                "fields right": f"{one.fields:.0%}",
                "points": "" if reference else interval([100 * v for v in one.fields_change], "+.0f"),
                "all six": f"{one.exact:.0%}",
                "CPU time": f"{one.cpu:.2f}",
                "peak, GB": f"{one.peak / 1e9:.2f}",
            }
        )
    return pd.DataFrame(rows).set_index("switched")


def interval(values: Sequence[float], form: str) -> str:
    """A difference and the ends of its interval; the difference alone if there is none."""
    mean, low, high = (format(value, form) for value in values)
    return mean if np.isnan(values[1]) else f"{mean} ({low} to {high})"


def price_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each setting: its held-out loss on a logarithmic axis, and the share of fields right; seeds as dots, their
    mean as a bar, over the band of the reference's seeds. Filled dots: the interval of the loss leaves zero out.
    """
    found = price_all(lines)
    by_run = {(line["setting"], line["seed"]): line for line in lines}
    figure, panels = canvas(width=9.5, height=0.34 * len(found) + 1.3, columns=2)
    for axes, title, x in (
        (panels[0], "Held-out loss", "nats per supervised token"),
        (panels[1], "Fields right", "share, test tickets"),
    ):
        for row, one in enumerate(found):
            values = [value_of(by_run[one.setting, seed], axes is panels[0]) for seed in one.seeds]
            if one.setting == REFERENCE:
                axes.axvspan(min(values), max(values), color=COLOURS["control"], alpha=0.35, linewidth=0)
            colour = COLOURS["base" if one.setting == REFERENCE else "qlora"]
            full = one.shows or one.setting == REFERENCE
            axes.plot(
                values,
                [row] * len(values),
                "o",
                color=colour,
                markersize=5,
                fillstyle="full" if full else "none",
            )
            axes.plot([np.mean(values)] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2)
        axes.set_yticks(range(len(found)), [one.setting for one in found] if axes is panels[0] else [])
        axes.set_ylim(len(found) - 0.5, -0.5)
        finish(axes, title, x, "")
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set_xticks([tick for tick in (0.2, 0.3, 0.5, 1, 2, 3) if within(tick, panels[0].get_xlim())])
    panels[0].minorticks_off()
    panels[1].set_xlim(left=min(0, panels[1].get_xlim()[0]))
    return figure


def value_of(line: Mapping[str, Any], loss: bool) -> float:
    return (
        number(line["held_out_loss"]) if loss else float(np.mean(line["fields_right"])) / len(TICKET_FIELDS)
    )


def within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]

"""Learning against forgetting: every run in one plane, and methods compared where they learn the same.

Whoever changes less forgets less. So two methods are compared at equal learning: of each method's runs take those that no
other of its runs beats in both, its *front*, and read off there what a gain costs. The base is on every front: it
has learned nothing and forgotten nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish, seed_dots

OLD = {"both old domains": "rise", "King James Bible": "kjv_rise", "Python documentation": "pydocs_rise"}
COLUMNS = ("family", "steps", "seed", "lr", "gain", *OLD.values())
BLUES = ("#6baed6", "#4a9acb", "#3182bd", "#1f77b4", "#08519c", "#08306b", "#041f45")  # of ranks, low to high
ALL = "all"
MARKERS = {"full": "s", "qlora": "D"}


def front(gains: Sequence[float], rises: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The runs that no other run beats in both: learns at least as much and forgets less. The base, (0, 0), is one of them.

    Returns:
        Their gains, rising, and their rises; both (n,).

    Raises:
        ValueError: lists of other lengths, or a value that is not finite.
    """
    gains, rises = (np.array([0, *values], dtype=float) for values in (gains, rises))
    if gains.shape != rises.shape or not np.isfinite([gains, rises]).all():
        raise ValueError(
            f"{len(gains) - 1} gains and {len(rises) - 1} rises; give one finite number of each for every run"
        )
    order = np.lexsort((-rises, gains))  # by gain; at equal gain the one that forgets more first
    gains, rises = gains[order], rises[order]
    least_from_here = np.minimum.accumulate(rises[::-1])[::-1]
    last_of_its_value = np.append(least_from_here[1:] > rises[:-1], True)
    kept = (rises <= least_from_here) & last_of_its_value
    return gains[kept], rises[kept]


def forgetting_at(gain: float, gains: Sequence[float], rises: Sequence[float]) -> float:
    """What a gain costs on the front of these runs, between two of its runs by a straight line; nan if none learns so much."""
    x, y = front(gains, rises)
    return float(np.interp(gain, x, y)) if gain <= x[-1] else math.nan


def costs_at(gain: float, runs: pd.DataFrame, old: str = "rise") -> dict[str, list[float]]:
    """{family: `forgetting_at` of its runs of each seed}, without families that do not learn that much with every seed."""
    costs = {
        family: [forgetting_at(gain, one["gain"], one[old]) for _, one in group.groupby("seed")]
        for family, group in runs.groupby("family", sort=False)
    }
    return {family: values for family, values in costs.items() if np.isfinite(values).all()}


def look(family: str, families: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a family, named such as "full", "lora r=8" or "qlora r=8"."""
    method = family.split()[0].rstrip(",")
    if method == "lora":
        ranks = [name for name in families if name.startswith("lora")]
        place = ranks.index(family) * (len(BLUES) - 1) // max(1, len(ranks) - 1) if family in ranks else 3
        return BLUES[place if len(ranks) > 1 else 3], "o"
    colour = COLOURS["base"] if "," in family else COLOURS.get(method, COLOURS["control"])
    return colour, MARKERS.get(method, "^")


def plane(runs: pd.DataFrame, axes: Axes, old: str = "rise", label: bool = True) -> None:
    """Every run as a dot: how much it learned, and how much it forgot; the shortest runs are hollow.

    The means over seeds are joined in the order of the learning rate, for each family and number of steps.

    Args:
        runs: a row a run, with the columns `COLUMNS`.
        old: which old domain, a value of `OLD`.
        label: write the name of each family beside its last mean; of many ranks, of the first and the last.

    Raises:
        ValueError: a column is missing.
    """
    missing = [name for name in COLUMNS if name not in runs]
    if missing:
        raise ValueError(f"runs has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    families = list(dict.fromkeys(runs["family"]))
    ranks = [name for name in families if name.startswith("lora")]
    unnamed = set(ranks[1:-1]) if len(ranks) > 3 else set()
    axes.plot(0, 0, "*", color=COLOURS["base"], markersize=13)
    axes.annotate("base", (0, 0), xytext=(9, 4), textcoords="offset points", color=COLOURS["base"])
    for (family, steps), group in runs.groupby(["family", "steps"], sort=False):
        colour, marker = look(family, families)
        fill = {"fillstyle": "none"} if steps == runs["steps"].min() else {}
        axes.plot(group["gain"], group[old], marker, color=colour, markersize=5, linestyle="", **fill)
        means = group.groupby("lr")[["gain", old]].mean().sort_index()
        axes.plot(means["gain"], means[old], "-", color=colour, linewidth=1, alpha=0.7)
        if label and family not in unnamed and steps == runs.loc[runs["family"] == family, "steps"].min():
            end = tuple(means.iloc[-1])
            below = -13 if family.startswith("qlora") else 4  # its dots lie on those of LoRA
            place = {"xytext": (6, below), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
            axes.annotate(family, end, color=colour, **place)
    axes.set_xlim(left=min(-0.03, runs["gain"].min() - 0.03))


def plane_explorer(runs: pd.DataFrame, gain: float = 0.7) -> None:
    """Choose methods, steps and the old domain, and a gain. Left: the plane. Right: what that gain costs each method, by seed.

    Args:
        runs: see `plane`.
        gain: of the new domain at the start, nats a token.

    Raises:
        ValueError: no runs, or a column is missing.
    """
    if not len(runs):
        raise ValueError("runs is empty; give a row a run")
    families, lengths = tuple(dict.fromkeys(runs["family"])), sorted({int(n) for n in runs["steps"]})

    def draw(families: Sequence[str], steps: int | str, old: str, gain: float) -> None:
        chosen = runs[runs["family"].isin(families) & ((runs["steps"] == steps) | (steps == ALL))]
        figure, (left, right) = canvas(width=9.5, height=3.8, columns=2)
        if len(chosen):
            plane(chosen, left, OLD[old])
            left.axvline(gain, color=COLOURS["control"], linewidth=1, zorder=0)
        finish(left, f"{steps} steps", "learned (nats a token)", "forgotten (nats a token)")
        costs = costs_at(gain, chosen, OLD[old])
        colours = {name: look(name, list(dict.fromkeys(chosen["family"])))[0] for name in costs}
        if costs:
            seed_dots(costs, f"The price of learning {gain:.2f}", f"forgotten: {old}", colours, axes=right)
        else:
            right.text(0.5, 0.5, "none of them learns that much", ha="center", transform=right.transAxes)
            right.set_axis_off()
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, FloatSlider, SelectMultiple

        wide = {"layout": {"width": "28em"}, "style": {"description_width": "7em"}}
        rows = min(10, len(families))
        controls = {
            "families": SelectMultiple(
                options=families, value=families, description="methods", rows=rows, **wide
            ),
            "steps": Dropdown(options=[*lengths, ALL], description="steps", **wide),
            "old": Dropdown(options=list(OLD), description="old domain", **wide),
            "gain": FloatSlider(
                value=gain, min=0.3, max=1.2, step=0.05, description="equal gain", continuous_update=False, **wide
            ),
        }  # fmt: skip
    static = [
        {"families": families, "steps": lengths[0], "old": name, "gain": gain}
        for name in ("King James Bible", "Python documentation")
    ]
    panel(draw, controls, static)

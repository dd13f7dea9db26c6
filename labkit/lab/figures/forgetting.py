"""Learning against forgetting: every run as a dot in one plane, with the base in the corner."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from labkit.lab.plots import COLOURS

OLD = {"both old domains": "rise", "King James Bible": "kjv_rise", "Python documentation": "pydocs_rise"}
COLUMNS = ("family", "steps", "seed", "lr", "gain", *OLD.values())
BLUES = ("#6baed6", "#4a9acb", "#3182bd", "#1f77b4", "#08519c", "#08306b", "#041f45")  # of ranks, low to high
MARKERS = {"full": "s", "qlora": "D"}


def look(family: str, families: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a family of runs, with a name such as "full", "lora r=8" or "qlora r=8"."""
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
        runs: one row per run, with the columns `COLUMNS`.
        axes: where to draw.
        old: which old domain, one of the values of `OLD`.
        label: write the name of each family beside its last mean; of many ranks, only those of the first and
            the last.

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
            height = -13 if family.startswith("qlora") else 4  # its dots lie on those of LoRA
            place = {"xytext": (6, height), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
            axes.annotate(family, end, color=colour, **place)
    axes.set_xlim(left=min(-0.03, runs["gain"].min() - 0.03))

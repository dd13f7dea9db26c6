"""The residency map: which optimizer state is in memory while a step goes through the parameters."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes

from labkit.lab.plots import COLOURS, finish
from labkit.optim.page import PageEvent
from labkit.optim.page_table import PageTable


def residency(events: Iterable[PageEvent], names: list[str]) -> tuple[np.ndarray, list[int]]:
    """What was in memory at each update.

    Args:
        events: the log of a `PageTable` without prefetching; each update is a "create", a "hit" or a "fault".
        names: of the pages, one row each.

    Returns:
        (len(names), updates) array: 0 out, 1 in, 2 just read, 3 just created; and the step of each update.
    """
    row = {name: n for n, name in enumerate(names)}
    inside: set[str] = set()
    columns, steps = [], []
    for event in events:
        if event.kind == "evict":
            inside.discard(event.name)
            continue
        inside.add(event.name)
        column = np.zeros(len(names), dtype=int)
        column[[row[name] for name in inside]] = 1
        column[row[event.name]] = {"hit": 1, "fault": 2, "create": 3}[event.kind]
        columns.append(column)
        steps.append(event.step)
    return np.array(columns).T, steps


def residency_map(table: PageTable, axes: Axes, title: str) -> None:
    """One column per update, one row per parameter. Green: in memory; orange: just read; yellow: new."""
    picture, steps = residency(table.events, [page.name for page in table.pages.values()])
    shades = np.array([[1, 1, 1], [0.72, 0.82, 0.60], [0.85, 0.37, 0.01], [0.9, 0.67, 0.01]])
    axes.imshow(shades[picture], aspect="auto", interpolation="nearest")
    for n in range(1, len(steps)):
        if steps[n] != steps[n - 1]:
            axes.axvline(n - 0.5, color=COLOURS["full"], linewidth=0.8)
    finish(axes, title, "update, one parameter each (lines: steps)", "state of parameter")

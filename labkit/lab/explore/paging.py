"""The explorer of paged optimizers, and its figure: which state is in memory while a step goes through the parameters."""

from collections.abc import Callable, Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from torch import Tensor

from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.page_table import POLICIES, Event, PageTable
from labkit.optim.paging import attach_paging

OPTIMIZERS: dict[str, Callable] = {
    "AdamW": lambda p: AdamW(p, lr=1e-4),
    "AdamW, 8 bits": lambda p: AdamW8bit(p, lr=1e-4),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
}
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


def residency(events: Iterable[Event], names: list[str]) -> tuple[np.ndarray, list[int]]:
    """What was in memory at each update.

    Args:
        events: of a `PageTable` without prefetching; each update is a "create", a "hit" or a "fault".
        names: of the pages, one row each.

    Returns:
        (len(names), updates) array: 0 out, 1 in, 2 read just now, 3 made just now; and the step of each update.
    """
    row, inside, columns, steps = {name: n for n, name in enumerate(names)}, set(), [], []
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
    """A column for each update, a row for each parameter: grey is in memory, dark was read from the store just now."""
    picture, steps = residency(table.events, [page.name for page in table.pages.values()])
    shades = np.array([[1, 1, 1], [0.72, 0.82, 0.60], [0.85, 0.37, 0.01], [0.9, 0.67, 0.01]])
    axes.imshow(shades[picture], aspect="auto", interpolation="nearest")
    for n in range(1, len(steps)):
        if steps[n] != steps[n - 1]:
            axes.axvline(n - 0.5, color=COLOURS["full"], linewidth=0.8)
    finish(axes, title, "update, one parameter each (lines: steps)", "state of parameter")


def paged_run(
    parameters: Mapping[str, Tensor], make: Callable, share: float, policy: str, steps: int = 4
) -> PageTable:
    """Steps with random gradients over copies of `parameters`; the page table afterwards, with its log.

    A budget that is less than the largest state is raised to that.
    """
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters.values()]
    sizes = attach_paging(make(copies), 2**50)
    largest = max(1, *(page.nbytes for page in sizes.table.pages.values()))
    budget = max(largest, int(share * sizes.table.total_bytes))
    sizes.close()
    optimizer = make(copies)
    generator = torch.Generator().manual_seed(0)
    with attach_paging(optimizer, budget, policy=policy, prefetch=False) as pager:
        for _ in range(steps):
            for p in copies:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return pager.table


def paging_explorer(parameters: Mapping[str, Tensor]) -> None:
    """Choose a budget, a policy and an optimizer. Left: what was in memory at every update of four real steps. Right: bytes moved
    in a step, and the hit rate, at every budget.

    Args:
        parameters: {name: tensor}; a few hundred thousand numbers answer at once.

    Raises:
        ValueError: no parameter.
    """
    if not parameters:
        raise ValueError("give at least one parameter, as {name: tensor}")
    known: dict[tuple, PageTable] = {}

    def run(optimizer: str, share: float, policy: str) -> PageTable:
        key = optimizer, share, policy
        if key not in known:
            known[key] = paged_run(parameters, OPTIMIZERS[optimizer], share, policy)
        return known[key]

    def draw(optimizer: str, share: float, policy: str) -> None:
        table = run(optimizer, share, policy)
        figure, (left, right) = canvas(width=10, height=3.6, columns=2)
        residency_map(
            table, left, f"{policy.upper()}, {table.budget / 1e6:.2f} of {table.total_bytes / 1e6:.2f} MB"
        )
        for name, style, colour in (("lru", "o-", "qlora"), ("mru", "s--", "lora")):
            tables = [run(optimizer, s, name) for s in SHARES]
            right.plot(
                [100 * s for s in SHARES],
                [100 * t.hit_rate for t in tables],
                style,
                color=COLOURS[colour],
                markersize=6,
            )
            right.annotate(
                name.upper(), (50, 100 * tables[SHARES.index(0.5)].hit_rate), xytext=(0, 7), textcoords="offset points",
                color=COLOURS[colour], fontweight="bold",
            )  # fmt: skip
        right.axvline(100 * share, color=COLOURS["control"], linewidth=1, zorder=0)
        moved = (table.bytes_in + table.bytes_out) / 1e6
        right.set_ylim(-5, 110)
        finish(
            right,
            f"hits {table.hit_rate:.0%}; {moved:.1f} MB moved in 4 steps",
            "budget (% of the state)",
            "hit rate (%)",
        )
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        wide = {"style": {"description_width": "7em"}, "layout": {"width": "28em"}}
        controls = {
            "optimizer": Dropdown(options=list(OPTIMIZERS), description="optimizer", **wide),
            "share": SelectionSlider(
                options=[(f"{s:.0%}", s) for s in reversed(SHARES)],
                value=0.5,
                description="budget",
                continuous_update=False,
                **wide,
            ),
            "policy": Dropdown(options=POLICIES, description="policy", **wide),
        }
    panel(
        draw,
        controls,
        [{"optimizer": "AdamW", "share": 0.5, "policy": policy} for policy in POLICIES],
    )

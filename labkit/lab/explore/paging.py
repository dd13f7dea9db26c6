"""A paged optimizer at work: what is in memory at each update, and the hit rate at every budget."""

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import Tensor

from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.figures.bill import CARDS
from labkit.lab.figures.paging import residency_map
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.formulas import plan
from labkit.models.shapes import known_models
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.page_table import POLICIES, PageTable
from labkit.optim.paging import attach_paging

OPTIMIZERS: dict[str, Callable] = {
    "AdamW": lambda p: AdamW(p, lr=1e-4),
    "AdamW, 8 bits": lambda p: AdamW8bit(p, lr=1e-4),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
}
SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)


def paged_run(
    parameters: Mapping[str, Tensor], make: Callable, share: float, policy: str, steps: int = 4
) -> PageTable:
    """Take steps with random gradients on copies of `parameters`, and return the page table with its log.

    A budget smaller than the largest state is raised to that size.
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
    """Choose a budget, a policy and an optimizer. Left: what was in memory at every update of four real
    steps. Right: the hit rate at every budget, and the megabytes moved.

    Args:
        parameters: {name: tensor}; with a few hundred thousand numbers the controls respond at once.

    Raises:
        ValueError: no parameters.
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
        size = f"{table.budget / 1e6:.2f} of {table.total_bytes / 1e6:.2f} MB"
        residency_map(table, left, f"{policy.upper()}, {size}")
        budgets = [100 * s for s in SHARES]
        for name, style, colour in (("lru", "o-", COLOURS["qlora"]), ("mru", "s--", COLOURS["lora"])):
            rates = [100 * run(optimizer, s, name).hit_rate for s in SHARES]
            right.plot(budgets, rates, style, color=colour, markersize=6)
            above = {"xytext": (0, 7), "textcoords": "offset points", "fontweight": "bold"}
            right.annotate(name.upper(), (50, rates[SHARES.index(0.5)]), color=colour, **above)
        right.axvline(100 * share, color=COLOURS["control"], linewidth=1, zorder=0)
        moved = (table.bytes_in + table.bytes_out) / 1e6
        right.set_ylim(-5, 110)
        title = f"hits {table.hit_rate:.0%}; {moved:.1f} MB moved in 4 steps"
        finish(right, title, "budget (% of the state)", "hit rate (%)")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        budgets = {
            "options": [(f"{s:.0%}", s) for s in reversed(SHARES)],
            "value": 0.5,
            "description": "budget",
        }
        controls = {
            "optimizer": Dropdown(options=list(OPTIMIZERS), description="optimizer", **WIDE),
            "share": SelectionSlider(**budgets, **SLOW),
            "policy": Dropdown(options=POLICIES, description="policy", **WIDE),
        }
    panel(draw, controls, [{"optimizer": "AdamW", "share": 0.5, "policy": policy} for policy in POLICIES])


LENGTHS = (256, 512, 1024, 2048, 4096)
FULL = "full"
RANKS = (8, 16, 64, 256, FULL)  # of QLoRA, or every weight


def card_explorer() -> None:
    """Choose a model, what trains, and a card: up to which length does a step fit, with the optimizer's state on
    the card and without it?

    Without it is the most that paging can save: all state is out when the activations are largest.
    """

    def draw(model: str, trains: int | str, card: float, checkpointing: bool) -> None:
        settings: dict[str, Any] = {"method": "qlora", "r": trains}
        if trains == FULL:
            settings = {"method": "full", "state_dtype": "fp32"}
        ledgers = {n: plan(model, max_length=n, checkpointing=checkpointing, **settings) for n in LENGTHS}
        peaks = {"state on the card": [one.peak / 1e9 for one in ledgers.values()]}
        out = [(one.peak - one.at_peak("optimizer")) / 1e9 for one in ledgers.values()]
        peaks["state paged out"] = out
        figure, axes = canvas(width=8, height=3.4)
        looks = ("o-", "s--"), ("qlora", "optimizer"), ("bottom", "top")
        for (name, values), style, colour, side in zip(peaks.items(), *looks):
            axes.plot(LENGTHS, values, style, color=COLOURS[colour], markersize=6)
            beside = {"xytext": (7, 0), "textcoords": "offset points", "va": side}
            axes.annotate(name, (LENGTHS[-1], values[-1]), color=COLOURS[colour], **beside)
        axes.axhline(card, color=COLOURS["full"], linewidth=1, linestyle=":")
        axes.annotate(
            f"{card:g} GB", (LENGTHS[0], card), xytext=(0, -4), textcoords="offset points", va="top"
        )
        reach = [
            max((n for n, gb in zip(LENGTHS, values) if gb <= card), default=0) for values in peaks.values()
        ]
        if reach[1] > reach[0]:
            before = f"from {reach[0]} to {reach[1]}" if reach[0] else f"at {reach[1]}"
            said = f"paging saves the run {before} tokens"
        else:
            said = f"paging changes nothing: {reach[0] or 'no'} tokens either way"
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes.set_xlim(LENGTHS[0] / 1.2, 3.2 * LENGTHS[-1])
        axes.set_ylim(0, 1.1 * max(card, *peaks["state on the card"]))
        what = "every weight" if trains == FULL else f"QLoRA, rank {trains}"
        finish(axes, f"{model}, {what}: {said}", "tokens in a batch of one", "peak (GB)")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Checkbox, Dropdown, SelectionSlider

        controls = {
            "model": Dropdown(options=known_models(), value="llama-2-7b", description="model", **WIDE),
            "trains": SelectionSlider(options=RANKS, value=64, description="trains: rank", **SLOW),
            "card": SelectionSlider(options=CARDS, value=24, description="card, GB", **SLOW),
            "checkpointing": Checkbox(value=True, description="gradient checkpointing"),
        }
    start = {"model": "llama-2-7b", "card": 8, "checkpointing": True}
    panel(draw, controls, [start | {"trains": 16}, start | {"trains": FULL, "card": 80}])

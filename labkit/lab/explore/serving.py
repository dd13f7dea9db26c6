"""Many tenants on one base: how fast, in how much memory, how often an adapter is there, and from where sharing wins."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from IPython.display import display
from matplotlib import pyplot as plt
from torch import nn

from labkit.checks import check_positive
from labkit.lab.explore.panel import SLOW, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.serving.adapter_cache import che_hit_rate
from labkit.serving.costs import (
    Machine,
    ServedSizes,
    adapters_that_fit,
    break_even_memory,
    break_even_time,
    calls_of,
    copies_bytes,
    copies_that_fit,
    count_sizes,
    distinct_adapters,
    shared_bytes,
    shared_step,
    zipf,
)

TENANTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
RANKS, BATCHES, BITS = (2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32, 64), (32, 16, 4)


class Outlook(NamedTuple):
    """What so many tenants mean.

    Attributes:
        distinct: adapters in a batch, on average.
        shared, copies: tokens a second with one base, and with a merged copy for each tenant; None where they do not fit.
        shared_bytes, copies_bytes: memory for all of them.
        hit_rate: of requests that find their adapter in the memory that the base leaves.
    """

    distinct: float
    shared: float | None
    copies: float | None
    shared_bytes: float
    copies_bytes: float
    hit_rate: float


def look_ahead(
    sizes: ServedSizes, machine: Machine, tenants: int, skew: float, batch: int, memory: float
) -> Outlook:
    """What serving `tenants` costs, by the closed forms of `labkit.serving.costs`.

    Args:
        sizes, machine: of the model, and what it runs on.
        tenants: each with an adapter of its own.
        skew: of their popularity; see `labkit.serving.costs.zipf`.
        batch: rows.
        memory: bytes for weights.
    """
    popularity = zipf(tenants, skew)
    n = distinct_adapters(popularity, batch)
    fits = sizes.resident_bytes + sizes.adapter_bytes <= memory
    shared = batch / shared_step(sizes, machine, batch, n, calls_of(sizes, n)) if fits else None
    one_copy = shared_step(sizes, machine, batch / n, 0)
    copies = batch / (n * one_copy) if tenants <= copies_that_fit(sizes, memory) else None
    room = adapters_that_fit(sizes, memory)
    hits = 1.0 if room >= tenants else che_hit_rate(popularity, room) if room else 0.0
    bytes_of = shared_bytes(sizes, tenants), copies_bytes(sizes, tenants)
    return Outlook(n, shared, copies, *bytes_of, hits)


def serving_explorer(model: nn.Module, machine: Machine, memory: float = 4e9) -> None:
    """Choose tenants, their skew, rank, batch and bits of the base. Left: tokens a second for one base with adapters and
    for merged copies, over the number of tenants. Right: the memory of both.

    Args:
        model: the base, whose layers are counted.
        machine: its bandwidth and speed, as measured.
        memory: bytes for weights.

    Raises:
        ValueError: no memory.
    """
    check_positive("memory", memory)
    counted: dict[tuple[int, int], ServedSizes] = {}

    def sizes_of(r: int, bits: int) -> ServedSizes:
        if (r, bits) not in counted:
            counted[r, bits] = count_sizes(model, r, bits=bits)
        return counted[r, bits]

    def draw(tenants: int, skew: float, r: int, batch: int, bits: int) -> None:
        sizes = sizes_of(r, bits)
        all_ = {n: look_ahead(sizes, machine, n, skew, batch, memory) for n in {*TENANTS, tenants}}
        figure, (left, right) = canvas(width=9, height=3.5, columns=2)
        lines(left, {n: (one.shared, one.copies) for n, one in all_.items()})
        lines(right, {n: (one.shared_bytes / 1e9, one.copies_bytes / 1e9) for n, one in all_.items()})
        now = all_[tenants]
        for axes, value in ((left, now.shared), (right, now.shared_bytes / 1e9)):
            if value is not None:
                axes.plot(tenants, value, "D", color=COLOURS["full"], markersize=7, zorder=4)
        right.axhline(memory / 1e9, color=COLOURS["full"], linewidth=1)
        right.set_yscale("log")
        where = {"transform": right.get_yaxis_transform(), "va": "bottom", "fontsize": 9.5}
        right.text(0.02, memory / 1e9, f"{memory / 1e9:g} GB", **where)
        left.set_ylim(0, 1.15 * left.get_ylim()[1])
        finish(left, titled(now, tenants), "tenants", "tokens a second, at most")
        wins = break_even_time(sizes, machine, batch, memory=memory)
        fewer = break_even_memory(sizes)
        words = f"a/W = {sizes.share:.1%}; sharing wins in time from {wins or 'no n'}\nadapters in a batch, in memory from {fewer or 'no n'}"
        finish(right, words, "tenants", "GB of weights")
        display(figure)
        plt.close(figure)

    start = {"tenants": 64, "skew": 1.0, "r": 16, "batch": 16, "bits": 32}
    panel(draw, controls_for(start), [start, start | {"tenants": 512, "batch": 64, "bits": 4}])


def controls_for(start: Mapping[str, Any]) -> dict:
    """The widgets; none where nobody can move them."""
    if not is_interactive():
        return {}
    from ipywidgets import FloatSlider, SelectionSlider

    def chosen(name: str, options: tuple[int, ...], words: str) -> SelectionSlider:
        return SelectionSlider(options=options, value=start[name], description=words, **SLOW)

    skews = {"min": 0.0, "max": 2.0, "step": 0.25, "description": "skew"}
    return {
        "tenants": chosen("tenants", TENANTS, "tenants"),
        "skew": FloatSlider(start["skew"], **skews, **SLOW),
        "r": chosen("r", RANKS, "rank"),
        "batch": chosen("batch", BATCHES, "rows"),
        "bits": chosen("bits", BITS, "bits of base"),
    }


def lines(axes, values: Mapping[int, tuple[float | None, float | None]]) -> None:
    """Two curves over the number of tenants: one base with adapters, and merged copies as far as they fit."""
    for which, (name, colour) in enumerate((("one base", "lora"), ("merged copies", "base"))):
        kept = [(n, pair[which]) for n, pair in sorted(values.items()) if pair[which] is not None]
        if not kept:
            continue
        axes.plot(*zip(*kept), "o-", color=COLOURS[colour], markersize=3.5)
        beside = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
        axes.annotate(name, kept[-1], color=COLOURS[colour], **beside)
    axes.set_xlim(0.7, 25 * max(values))  # room for the names
    axes.set_xscale("log", base=2)
    axes.set_xticks(TENANTS[::2], [str(n) for n in TENANTS[::2]])
    axes.minorticks_off()


def titled(now: Outlook, tenants: int) -> str:
    """The numbers of one choice."""
    speed = "does not fit" if now.shared is None else f"{now.shared:,.0f} tokens/s"
    gain = "" if now.shared is None or now.copies is None else f", {now.shared / now.copies:.1f}× the copies'"
    return f"{tenants} tenants, {now.distinct:.1f} in a batch:\n{speed}{gain}, hit rate {now.hit_rate:.0%}"

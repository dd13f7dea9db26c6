"""The peak of a training step by component: as a bar, and against the length of the examples."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from labkit.lab.plots import COLOURS
from labkit.memory.ledger import Ledger

PARTS = {  # drawn as one: (components or kinds of a ledger, colour, hatch)
    "weights": (("weights", "constants", "overhead"), COLOURS["base"], ""),
    "adapters": (("lora",), COLOURS["lora"], "//"),
    "optimizer": (("optimizer",), COLOURS["optimizer"], ""),
    "gradients": (("gradients",), COLOURS["gradients"], "xx"),
    "activations": (("activations",), COLOURS["qlora"], ""),
    "temporary": (("temporary",), COLOURS["gold"], ".."),
}


def at_peak(ledger: Ledger) -> dict[str, float]:
    """GB of each of `PARTS` at the peak; they add up to it."""
    return {part: sum(ledger.at_peak(name) for name in names) / 1e9 for part, (names, _, _) in PARTS.items()}


def peak_bar(ledger: Ledger, axes: Axes) -> None:
    """The peak as one stacked bar; segments that have room show their name and size."""
    start = 0.0
    for part, size in at_peak(ledger).items():
        _, colour, hatch = PARTS[part]
        axes.barh(0, size, left=start, color=colour, edgecolor="white", hatch=hatch, height=0.5)
        if size > 0.08 * ledger.peak / 1e9:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
            place = {"ha": "center", "va": "center", "rotation": 90, "fontsize": 8.5}
            axes.text(start + size / 2, 0, f"{part}\n{size:.2g}", bbox=box, **place)
        start += size
    axes.set_yticks([])
    axes.set_ylim(-0.45, 0.45)


def peak_areas(ledgers: Mapping[int, Ledger], axes: Axes) -> None:
    """The peak against the length of the examples, {tokens: ledger}: its parts as stacked areas."""
    rows, grid = [at_peak(ledger) for ledger in ledgers.values()], list(ledgers)
    tops = [sum(row.values()) for row in rows]
    axes.plot(grid, tops, color=COLOURS["full"], linewidth=1.5)
    low = [0.0] * len(grid)
    for part, (_, colour, hatch) in PARTS.items():
        high = [a + row[part] for a, row in zip(low, rows)]
        axes.fill_between(grid, low, high, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3)
        low = high
    axes.set_xscale("log", base=2)
    axes.set_xticks(grid, [str(tokens) for tokens in grid])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(tops))

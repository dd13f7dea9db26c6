"""The memory bill of a training step as a bar, component by component, against the memory of common cards."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.ledger import Ledger

CARDS = (8, 16, 24, 40, 80)  # gigabytes of common GPUs
LOOK = {  # colour, and a hatch for greyscale
    "weights": (COLOURS["base"], ""),
    "constants": (COLOURS["constants"], "x"),
    "lora": (COLOURS["lora"], ""),
    "gradients": (COLOURS["gradients"], "/"),
    "optimizer": (COLOURS["optimizer"], "."),
    "activations": (COLOURS["gold"], "\\"),
    "temporary": ("#ffffff", "-"),
    "overhead": (COLOURS["full"], ""),
}


# as shares of the longest bar
NARROWEST = 0.085  # has room for a number
VISIBLE = 0.005  # can be seen at all


def bill_bars(
    ledgers: Mapping[str, Ledger],
    title: str,
    axes: Axes | None = None,
    at_peak: bool = True,
    cards: Sequence[float] = CARDS,
    names: bool = True,
) -> Axes:
    """Stacked horizontal bars, one per ledger: its components in GB, their sum at the end, and a dotted line
    for each card within reach. Components without room for their name are named below the axes.

    Args:
        ledgers: {name: ledger}, from top to bottom.
        title: of the figure.
        axes: where to draw; default: a new figure.
        at_peak: draw what is live at the peak; False: all components at full size.
        cards: memory of the cards, GB.
        names: write a component's name in every segment that has room; False: only in the first bar that has
            room.

    Raises:
        ValueError: no ledger.
    """
    if not ledgers:
        raise ValueError("give at least one ledger to draw, as {name: ledger}")
    if axes is None:
        _, axes = canvas(width=8.4, height=0.48 * len(ledgers) + 1.6)
    sums = [ledger.peak if at_peak else ledger.total for ledger in ledgers.values()]
    widest = max(sums) / 1e9
    axes.set_xlim(0, 1.13 * widest)
    named: set[str] = set()
    seen: dict[str, tuple[BarContainer, float]] = {}  # {component: its first visible segment, and its width}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.88}
    for y, (ledger, total) in enumerate(zip(ledgers.values(), sums)):
        start = 0.0
        for part, size in ledger.components(at_peak).items():
            colour, hatch = LOOK[part]
            width = size / 1e9
            edge = "#555555" if part == "temporary" else "white"
            look = {"color": colour, "hatch": hatch, "edgecolor": edge, "linewidth": 0.6}
            bars = axes.barh(y, width, left=start, height=0.68, **look)
            if width > VISIBLE * widest:
                seen.setdefault(part, (bars, width))
            if width > NARROWEST * widest:
                call = (names or part not in named) and width > 0.0125 * len(part) * widest
                named |= {part} if call else set()
                text = f"{part}\n{width:.3g}" if call else f"{width:.3g}"
                place = {"ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 0.95}
                axes.text(start + width / 2, y, text, bbox=box, **place)
            start += width
        end = start + 0.012 * widest
        axes.text(end, y, f"{total / 1e9:.3g} GB", va="center", fontsize=10, fontweight="bold", bbox=box)
    axes.set_yticks(range(len(ledgers)), list(ledgers))
    axes.set_ylim(len(ledgers) - 0.5, -0.85)
    mark_cards(axes, [card for card in cards if card < 1.13 * widest])
    unnamed = {part: one for part, one in seen.items() if part not in named}
    if unnamed:
        labels = [
            f"{part} {width:.2g}" if len(ledgers) == 1 else part for part, (_, width) in unnamed.items()
        ]
        handles = [bars for bars, _ in unnamed.values()]
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False
        )
    finish(axes, title, "gigabytes (10⁹ bytes)" + (" at the peak" if at_peak else ""), "")
    return axes


def mark_cards(axes: Axes, cards: Sequence[float]) -> None:
    """A dotted line for each card, with its size above it."""
    for card in cards:
        axes.axvline(card, color=COLOURS["full"], linestyle=":", linewidth=1, zorder=0)
        unit = " GB card" if card == cards[-1] else ""
        axes.text(card, -0.62, f"{card:g}{unit}", fontsize=8.5, ha="right" if unit else "center")

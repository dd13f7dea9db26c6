"""The bill of a training step against the memory of common cards: model × method × rank × context × batch × optimizer.

A bar is what a `Ledger` of `labkit.memory.formulas` holds at its peak, component by component, so its length is what the card has to hold.
"""

from collections.abc import Mapping, Sequence

from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from labkit.lab.explore.memory import CARDS
from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.formulas import plan
from labkit.memory.ledger import Ledger
from labkit.memory.setup import OPTIMIZERS
from labkit.models.shapes import known_models

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
RESERVE = 1.0  # GB that CUDA itself and the screen take
RANKS = (4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16)
NARROWEST = 0.085  # of the longest bar: what has room for a number
VISIBLE = 0.005  # of it: what an eye can find


def bill_bars(
    ledgers: Mapping[str, Ledger],
    title: str,
    axes: Axes | None = None,
    at_peak: bool = True,
    cards: Sequence[float] = CARDS,
    names: bool = True,
) -> Axes:
    """Stacked horizontal bars, one a ledger: its components in GB, the sum at the end, and a dotted line for each card in reach.

    Components without room for their name are named below the axes.

    Args:
        ledgers: {name: ledger}, from top to bottom.
        title: of the figure.
        axes: draw here; default: a new figure.
        at_peak: what is there at the peak; False: all components at full size.
        cards: memory of the cards, GB.
        names: write the component's name in its segment where there is room; else only in the first bar that has some.

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
    named, seen = set(), {}
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
    """A dotted line for each card, its size above it."""
    for card in cards:
        axes.axvline(card, color=COLOURS["full"], linestyle=":", linewidth=1, zorder=0)
        unit = " GB card" if card == cards[-1] else ""
        axes.text(card, -0.62, f"{card:g}{unit}", fontsize=8.5, ha="right" if unit else "center")


def verdict(ledger: Ledger, cards: Sequence[float] = CARDS, reserve: float = RESERVE) -> str:
    """Which cards the peak fits, with `reserve` GB kept free.

    >>> verdict(Ledger([]), cards=(8, 16), reserve=1)
    'fits 8, 16 GB'
    """
    fits = [f"{card:g}" for card in cards if ledger.fits(card, reserve)]
    misses = [f"{card:g}" for card in cards if not ledger.fits(card, reserve)]
    said = [f"fits {', '.join(fits)} GB"] if fits else []
    said += [f"does not fit {', '.join(misses)} GB"] if misses else []
    return "; ".join(said)


def bill_explorer(model: str = "llama-2-7b") -> None:
    """Choose a model, a method and the sizes of a step: the bar of its peak, and which cards it fits.

    Args:
        model: the one it starts with, of `labkit.memory.formulas.known_models()`.

    Raises:
        ValueError: an unknown model.
    """
    if model not in known_models():
        raise ValueError(f"model={model!r} is not known; choose one of {', '.join(known_models())}")

    def draw(
        model: str,
        method: str,
        rank: int,
        sequence: int,
        batch: int,
        optimizer: str,
        checkpointing: bool,
        mixed: bool = False,
    ) -> None:
        figure, axes = canvas(width=9, height=2.4)
        settings = {
            "sequence": sequence,
            "batch": batch,
            "optimizer": optimizer,
            "checkpointing": checkpointing,
        }
        settings |= {"master": mixed} if method == "full" else {"rank": rank}
        try:
            ledger = plan(model, method, **settings)
        except ValueError as error:
            axes.text(0, 0.5, str(error), wrap=True, transform=axes.transAxes)
            axes.set_axis_off()
        else:
            what = "full fine-tuning" if method == "full" else f"{method}, rank {rank}"
            what += " (fp32 copy)" if method == "full" and mixed else ""
            how = f"{batch} × {sequence} tokens, {optimizer}" + (", checkpointing" if checkpointing else "")
            reach = [card for card in CARDS if card > ledger.peak / 1e9][
                :1
            ]  # the smallest card that may hold it
            shown = [card for card in CARDS if card <= max([ledger.peak / 1e9, *reach])]
            bill_bars({what: ledger}, f"{model}, {what}, {how}:\n{verdict(ledger)}", axes, cards=())
            if reach:
                axes.set_xlim(0, max(axes.get_xlim()[1], 1.02 * reach[0]))
            mark_cards(axes, shown)
            axes.set_yticks([0], [f"peak in\n“{ledger.moment}”"])
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Checkbox, Dropdown, SelectionSlider

        wide = {"style": {"description_width": "8em"}, "layout": {"width": "30em"}}
        controls = {
            "model": Dropdown(options=known_models(), value=model, description="model", **wide),
            "method": Dropdown(options=["full", "lora", "qlora"], value="full", description="method", **wide),
            "rank": SelectionSlider(options=RANKS, value=16, description="rank", **wide),
            "sequence": SelectionSlider(options=CONTEXTS, value=1024, description="context", **wide),
            "batch": SelectionSlider(options=BATCHES, value=1, description="batch", **wide),
            "optimizer": Dropdown(options=OPTIMIZERS, description="optimizer", **wide),
            "checkpointing": Checkbox(value=False, description="gradient checkpointing"),
            "mixed": Checkbox(value=True, description="fp32 master copy (full only)"),
        }
    start = {"model": model, "rank": 16, "sequence": 1024, "batch": 1, "optimizer": "adamw"}
    static = [
        start | {"method": "full", "checkpointing": False, "mixed": True},
        start | {"method": "qlora", "checkpointing": True},
    ]
    panel(draw, controls, static)

"""The memory bill of a training step against common cards: model, method, rank, context, batch and optimizer.

The bar shows what a `Ledger` of `labkit.memory.formulas` holds at its peak, so its length is what the card
must hold.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.checks import check_choice
from labkit.lab.explore.panel import panel
from labkit.lab.figures.bill import CARDS, bill_bars, mark_cards
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import canvas
from labkit.memory.formulas import plan
from labkit.memory.ledger import Ledger
from labkit.memory.setup import OPTIMIZERS
from labkit.models.shapes import known_models

RESERVE = 1.0  # GB that CUDA itself and the display take
RANKS = (4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16)
TARGETS = ("all-linear", "attention", "mlp")
MOST = 1 << 12  # examples; more are not tried


def verdict(ledger: Ledger, cards: Sequence[float] = CARDS, reserve: float = RESERVE) -> str:
    """Say which cards the peak fits, with `reserve` GB kept free.

    >>> verdict(Ledger([]), cards=(8, 16), reserve=1)
    'fits 8, 16 GB'
    """
    fits = [f"{card:g}" for card in cards if ledger.fits(card, reserve)]
    misses = [f"{card:g}" for card in cards if not ledger.fits(card, reserve)]
    said = [f"fits {', '.join(fits)} GB"] if fits else []
    said += [f"does not fit {', '.join(misses)} GB"] if misses else []
    return "; ".join(said)


def largest_batch(card: float, model: str, method: str, reserve: float = RESERVE, **settings: Any) -> int:
    """The most examples whose peak fits a card of so many GB with `reserve` kept free; 0 if none does."""
    return largest_batches([card], model, method, reserve, **settings)[card]


def largest_batches(
    cards: Sequence[float], model: str, method: str, reserve: float = RESERVE, **settings: Any
) -> dict[float, int]:
    """`largest_batch` of each card; a batch is planned once for all of them."""
    ledger = cache(lambda batch: plan(model, method, **settings | {"batch_size": batch}))

    def fits(card: float, batch: int) -> bool:
        return ledger(batch).fits(card, reserve)

    return {card: most(partial(fits, card)) for card in cards}


def most(fits: Callable[[int], bool]) -> int:
    """The most examples that fit, up to `MOST`; more never fit where fewer do not."""
    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bill_explorer(model: str = "llama-2-7b") -> None:
    """Choose a model, a method and the sizes of a step: see the bar of its peak, which cards it fits, and the
    largest batch on each.

    Args:
        model: the one to start with, of `labkit.models.shapes.known_models()`.

    Raises:
        ValueError: an unknown model.
    """
    check_choice("model", model, known_models())

    def draw(
        model: str,
        method: str,
        r: int,
        max_length: int,
        batch_size: int,
        optimizer: str,
        checkpointing: bool,
        mixed: bool = False,
        targets: str = "all-linear",
        double_quant: bool = True,
        completion: float = 1.0,
    ) -> None:
        figure, axes = canvas(width=9, height=2.6)
        settings: dict[str, Any] = {"master": mixed} if method == "full" else {"r": r, "targets": targets}
        settings |= {"double_quant": double_quant} if method == "qlora" else {}
        settings |= {"max_length": max_length, "batch_size": batch_size, "supervised": completion}
        settings |= {"optimizer": optimizer, "checkpointing": checkpointing}
        try:
            ledger = plan(model, method, **settings)
        except ValueError as error:
            axes.text(0, 0.5, str(error), wrap=True, transform=axes.transAxes)
            axes.set_axis_off()
        else:
            what = "full fine-tuning" if method == "full" else f"{method}, rank {r}"
            what += " (fp32 copy)" if method == "full" and mixed else ""
            how = f"{batch_size} × {max_length} tokens, {optimizer}"
            how += ", checkpointing" if checkpointing else ""
            # the smallest card that may hold it
            reach = [card for card in CARDS if card > ledger.peak / 1e9][:1]
            shown = [card for card in CARDS if card <= max([ledger.peak / 1e9, *reach])]
            rooms = largest_batches(CARDS, model, method, **settings)
            room = "largest batch: " + ", ".join(f"{n or 'none'} on {card:g} GB" for card, n in rooms.items())
            bill_bars({what: ledger}, f"{model}, {what}, {how}:\n{verdict(ledger)}\n{room}", axes, cards=())
            if reach:
                axes.set_xlim(0, max(axes.get_xlim()[1], 1.02 * reach[0]))
            mark_cards(axes, shown)
            axes.set_yticks([0], [f"peak in\n“{ledger.moment}”"])
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Checkbox, Dropdown, FloatSlider, SelectionSlider

        wide = {"style": {"description_width": "8em"}, "layout": {"width": "30em"}}
        controls = {
            "model": Dropdown(options=known_models(), value=model, description="model", **wide),
            "method": Dropdown(options=["full", "lora", "qlora"], value="full", description="method", **wide),
            "r": SelectionSlider(options=RANKS, value=16, description="rank", **wide),
            "max_length": SelectionSlider(options=CONTEXTS, value=1024, description="context", **wide),
            "batch_size": SelectionSlider(options=BATCHES, value=1, description="batch", **wide),
            "optimizer": Dropdown(options=OPTIMIZERS, description="optimizer", **wide),
            "checkpointing": Checkbox(value=False, description="gradient checkpointing"),
            "mixed": Checkbox(value=True, description="fp32 master copy (full only)"),
            "targets": Dropdown(options=TARGETS, description="targets", **wide),
            "double_quant": Checkbox(value=True, description="double quantization (qlora only)"),
            "completion": FloatSlider(
                value=1.0,
                min=0.1,
                max=1,
                step=0.1,
                description="in the loss",
                continuous_update=False,
                **wide,
            ),
        }
    start = {"model": model, "r": 16, "max_length": 1024, "batch_size": 1, "optimizer": "adamw"}
    static = [
        start | {"method": "full", "checkpointing": False, "mixed": True},
        start | {"method": "qlora", "checkpointing": True},
    ]
    panel(draw, controls, static)

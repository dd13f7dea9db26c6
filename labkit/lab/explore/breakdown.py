"""The peak of a training step: what it is made of, and what grows when the examples get longer."""

from typing import Any

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.explore.panel import panel
from labkit.lab.figures.bill import CARDS
from labkit.lab.figures.breakdown import peak_areas, peak_bar
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.formulas import plan
from labkit.memory.setup import OPTIMIZERS
from labkit.models.shapes import config_of, known_models

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
STATIC_REST = dict(checkpointing=False, logits="supervised", supervised=1.0)
TARGETS = ("all-linear", "attention", "mlp")
NO_CARD = 0


def peak_explorer() -> None:
    """Pick a model and a step: the peak that `plan` predicts, and how it grows with longer examples."""

    def draw(
        model: str,
        method: str,
        max_length: int,
        batch_size: int,
        checkpointing: bool,
        logits: str,
        supervised: float,
        r: int = 16,
        targets: str = "all-linear",
        adapter_dtype: str = "fp32",
        optimizer: str = "adamw",
        cast_rest: bool = False,
        card: float = NO_CARD,
    ) -> None:
        settings: dict[str, Any] = dict(
            batch_size=batch_size, checkpointing=checkpointing, logits=logits, supervised=supervised
        )
        settings |= dict(optimizer=optimizer)
        if method != "full":
            settings |= dict(r=r, targets=targets, adapter_dtype=adapter_dtype)
        if method == "qlora" and cast_rest:  # as PEFT's prepare_model_for_kbit_training does
            settings |= dict(dtype="fp32", compute_dtype="bf16")
        longest = getattr(config_of(model), "max_position_embeddings", LENGTHS[-1])
        chosen = min(max_length, longest)
        ledger = plan(model, method, max_length=chosen, **settings)
        ledgers = {s: plan(model, method, max_length=s, **settings) for s in LENGTHS if s <= longest}
        figure, (left, right) = canvas(width=9, height=3.3, columns=2)
        peak_bar(ledger, left)
        short = "" if chosen == max_length else f" (its longest: {longest})"
        title = (
            f"{model}, {method}, {batch_size} × {chosen}{short}\n{ledger.peak / 1e9:.3g} GB: {ledger.moment}"
        )
        finish(left, title, "GB at the peak", "")
        peak_areas(ledgers, right)
        right.plot(chosen, ledger.peak / 1e9, "D", color=COLOURS["full"], markersize=7)
        if card:
            right.axhline(card, color=COLOURS["full"], linestyle="--", linewidth=1)
            right.text(LENGTHS[0], card, f" {card:g} GB", va="bottom")
            right.set_ylim(0, max(right.get_ylim()[1], 1.1 * card))
        finish(right, "the same for every length", "tokens per example (log scale)", "GB at the peak")
        display(figure)
        plt.close(figure)

    start = dict(model="llama-3-8b", method="qlora", max_length=2048, batch_size=1, **STATIC_REST)
    start |= dict(
        r=16, targets="all-linear", adapter_dtype="fp32", optimizer="adamw", cast_rest=False, card=24
    )
    controls = {}
    if is_interactive():
        from ipywidgets import Checkbox, Dropdown, FloatSlider, SelectionSlider

        wide = {"layout": {"width": "28em"}, "style": {"description_width": "8em"}}
        methods = {"options": ["full", "lora", "qlora"], "value": "qlora", "description": "method"}
        shares = {"min": 0.1, "max": 1, "step": 0.1, "value": 1.0, "description": "in the loss"}
        controls = {
            "model": Dropdown(options=known_models(), value="llama-3-8b", description="model", **wide),
            "method": Dropdown(**methods, **wide),
            "max_length": SelectionSlider(options=LENGTHS, value=2048, description="tokens", **wide),
            "batch_size": SelectionSlider(options=[1, 2, 4, 8, 16], value=1, description="examples", **wide),
            "checkpointing": Checkbox(value=False, description="checkpointing", **wide),
            "logits": Dropdown(options=["supervised", "all"], description="logits", **wide),
            "supervised": FloatSlider(**shares, **wide),
            "r": SelectionSlider(options=[4, 8, 16, 32, 64, 128], value=16, description="rank", **wide),
            "targets": Dropdown(options=TARGETS, description="targets", **wide),
            "adapter_dtype": Dropdown(options=["fp32", "bf16"], description="adapters in", **wide),
            "optimizer": Dropdown(options=OPTIMIZERS, description="optimizer", **wide),
            "cast_rest": Checkbox(value=False, description="cast the rest to fp32 (qlora)", **wide),
            "card": Dropdown(options=[("none", NO_CARD), *CARDS], description="card, GB", **wide),
        }
    panel(draw, controls, [start, start | {"checkpointing": True, "logits": "all"}])

"""The peak of a training step under the hands: what it is made of, and what grows when the examples get longer."""

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.memory.formulas import plan
from labkit.models.shapes import config_of, known_models

SEQUENCES = (128, 256, 512, 1024, 2048, 4096, 8192)
PARTS = {  # what is drawn as one: (components or kinds of a ledger, colour, hatch)
    "weights": (("weights", "constants", "overhead"), COLOURS["base"], ""),
    "adapters": (("lora",), COLOURS["lora"], "//"),
    "optimizer": (("optimizer",), COLOURS["optimizer"], ""),
    "gradients": (("gradients",), COLOURS["gradients"], "xx"),
    "activations": (("activations",), COLOURS["qlora"], ""),
    "temporary": (("temporary",), COLOURS["gold"], ".."),
}
STATIC_REST = dict(checkpointing=False, logits="supervised", supervised=1.0)


def at_peak(ledger) -> dict[str, float]:
    """GB of each of `PARTS` at the peak; they add up to it."""
    return {part: sum(ledger.at_peak(name) for name in names) / 1e9 for part, (names, _, _) in PARTS.items()}


def peak_explorer() -> None:
    """Pick a model and a step: the predicted peak by component, and over the length of the examples; computed by `plan`."""

    def draw(
        model: str,
        method: str,
        sequence: int,
        batch: int,
        checkpointing: bool,
        logits: str,
        supervised: float,
    ) -> None:
        settings = dict(batch=batch, checkpointing=checkpointing, logits=logits, supervised=supervised)
        longest = getattr(config_of(model), "max_position_embeddings", SEQUENCES[-1])
        chosen = min(sequence, longest)
        ledger = plan(model, method, sequence=chosen, **settings)
        figure, (left, right) = canvas(width=9, height=3.3, columns=2)
        start = 0.0
        for part, size in at_peak(ledger).items():
            _, colour, hatch = PARTS[part]
            left.barh(0, size, left=start, color=colour, edgecolor="white", hatch=hatch, height=0.5)
            if size > 0.08 * ledger.peak / 1e9:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                text = f"{part}\n{size:.2g}"
                left.text(
                    start + size / 2, 0, text, ha="center", va="center", fontsize=8.5, rotation=90, bbox=box
                )
            start += size
        left.set_yticks([])
        left.set_ylim(-0.45, 0.45)
        short = "" if chosen == sequence else f" (its longest: {longest})"
        finish(
            left,
            f"{model}, {method}, {batch} × {chosen}{short}\n{ledger.peak / 1e9:.3g} GB: {ledger.moment}",
            "GB at the peak",
            "",
        )
        grid = [s for s in SEQUENCES if s <= longest]
        rows = [at_peak(plan(model, method, sequence=s, **settings)) for s in grid]
        tops = [sum(row.values()) for row in rows]
        right.plot(grid, tops, color=COLOURS["full"], linewidth=1.5)
        low = [0.0] * len(grid)
        for part, (_, colour, hatch) in PARTS.items():
            high = [a + row[part] for a, row in zip(low, rows)]
            right.fill_between(
                grid, low, high, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3
            )
            low = high
        right.plot(chosen, ledger.peak / 1e9, "D", color=COLOURS["full"], markersize=7)
        right.set_xscale("log", base=2)
        right.set_xticks(grid, [str(s) for s in grid])
        right.minorticks_off()
        right.set_ylim(0, 1.08 * max(tops))
        finish(right, "the same over the length", "tokens of an example (log scale)", "GB at the peak")
        display(figure)
        plt.close(figure)

    static = [
        dict(model="llama-3-8b", method="qlora", sequence=2048, batch=1, **STATIC_REST),
        dict(
            model="llama-3-8b",
            method="qlora",
            sequence=2048,
            batch=1,
            **{**STATIC_REST, "checkpointing": True, "logits": "all"},
        ),
    ]
    controls = {}
    if is_interactive():
        from ipywidgets import Checkbox, Dropdown, FloatSlider, SelectionSlider

        wide = {"layout": {"width": "28em"}, "style": {"description_width": "8em"}}
        controls["model"] = Dropdown(options=known_models(), value="llama-3-8b", description="model", **wide)
        controls["method"] = Dropdown(
            options=["full", "lora", "qlora"], value="qlora", description="method", **wide
        )
        controls["sequence"] = SelectionSlider(options=SEQUENCES, value=2048, description="tokens", **wide)
        controls["batch"] = SelectionSlider(options=[1, 2, 4, 8, 16], value=1, description="examples", **wide)
        controls["checkpointing"] = Checkbox(value=False, description="checkpointing", **wide)
        controls["logits"] = Dropdown(options=["supervised", "all"], description="logits", **wide)
        controls["supervised"] = FloatSlider(
            min=0.1, max=1, step=0.1, value=1.0, description="in the loss", **wide
        )
    panel(draw, controls, static)

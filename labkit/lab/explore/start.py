"""The bytes of a model's weights in four formats, against the memory of common cards."""

from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.explore.panel import panel
from labkit.lab.figures.bill import CARDS
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish

SIZES = {"135M": 0.135e9, "1.7B": 1.7e9, "7B": 6.7e9, "13B": 13e9, "70B": 69e9}
BITS = {"fp32": 32, "bf16": 16, "8 bits": 8, "NF4, double quantization": 4.127}


def weight_memory() -> None:
    """Pick a model size: the bytes of its weights in four formats, against the memory of common cards."""

    def draw(model: str) -> None:
        figure, axes = canvas(width=8, height=2.8)
        sizes = [SIZES[model] * bits / 8 / 1e9 for bits in BITS.values()]
        colours = [COLOURS[name] for name in ("full", "lora", "constants", "nf4")]
        bars = axes.barh(list(BITS), sizes, color=colours)
        axes.bar_label(bars, fmt="{:.2f}" if max(sizes) < 10 else "{:.0f}", padding=3)
        axes.invert_yaxis()
        for card in CARDS:
            if card < 1.1 * max(sizes):
                axes.axvline(card, color=COLOURS["full"], linestyle=":", linewidth=1)
                axes.annotate(f"{card} GB", (card, -0.55), fontsize=9, ha="center", annotation_clip=False)
        axes.margins(x=0.1)
        finish(axes, f"Weights of a {model} model; dotted: memory of common cards", "gigabytes", "")
        axes.set_title(axes.get_title("left"), loc="left", fontweight="bold", fontsize=12, pad=12)
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import SelectionSlider

        controls["model"] = SelectionSlider(options=list(SIZES), value="7B", description="model")
    panel(draw, controls, [{"model": "7B"}])

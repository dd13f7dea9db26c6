"""What the alternatives to LoRA cost on models of real size: parameters, operations, cache, and positions."""

from collections.abc import Sequence
from functools import cache

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.figure import Figure
from torch import nn

from labkit.alternatives.cost import Cost, cost
from labkit.alternatives.ia3 import add_ia3
from labkit.alternatives.methods import remove
from labkit.alternatives.sized import SIZED_METHODS
from labkit.alternatives.sublayers import decoder
from labkit.lab.explore.panel import panel
from labkit.lab.figures.alternatives import METHOD_COLOURS
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.models.shapes import config_of, decoder_shape, meta_model
from labkit.quant.layer_kinds import is_linear, widths

SIZES = {
    "LoRA": (1, 2, 4, 8, 16, 32, 64),
    "bottleneck": (1, 8, 64, 256),
    "prefix": (1, 20, 200),
    "prompt": (1, 20, 200),
    "(IA)³": (1,),
}


@cache
def shape_of(name: str) -> nn.Module:
    """The model without its weights, in bfloat16; built once."""
    return meta_model(config_of(name), dtype=torch.bfloat16)


def base_flops(model: nn.Module) -> int:
    """Operations per token of all linear layers, the output layer included; attention is not counted."""
    return sum(2 * a * b for a, b in (widths(m) for m in model.modules() if is_linear(m)))


@cache
def cost_on(name: str, method: str, size: int) -> Cost:
    """What `method` of that size costs on the model `name`, by its shapes; LoRA before merging.

    Raises:
        ValueError: the size does not fit the model.
    """
    model = shape_of(name)
    if method == "LoRA":
        linears = [widths(m) for m in decoder(model).modules() if is_linear(m)]
        n = size * sum(a + b for a, b in linears)
        return Cost("LoRA", n, n, 2 * n, 2 * sum(b for _, b in linears), merges=True)
    if method in SIZED_METHODS:
        SIZED_METHODS[method].add_to(model, size)
    else:
        add_ia3(model)
    try:
        return cost(model)
    finally:
        remove(model)


def draw_costs(name: str, method: str, size: int) -> Figure:
    """The figure of the explorer: parameters and operations against size, for all methods, one marked."""
    model = shape_of(name)
    parameters = sum(p.numel() for p in model.parameters())
    flops, chosen = base_flops(model), cost_on(name, method, size)
    figure, (left, right) = canvas(width=8.2, height=2.9, columns=2)
    for other, colour in METHOD_COLOURS.items():
        heavy = other == method
        known = [s for s in SIZES[other] if other != "bottleneck" or s < decoder_shape(model).hidden_size]
        costs = [cost_on(name, other, s) for s in known]
        shares = [100 * c.kept / parameters for c in costs]
        style = {"color": colour, "linewidth": 3 if heavy else 1.2, "markersize": 5}
        style["marker"] = "o" if len(known) == 1 else None
        left.plot(known, shares, **style)
        # LoRA's name goes above its end, because the next line ends there too; that of the single dot, before
        shift, side = {"LoRA": ((0, 7), "right"), "(IA)³": ((-7, 0), "right")}.get(other, ((6, 0), "left"))
        named = {"textcoords": "offset points", "va": "center", "color": colour, "xytext": shift, "ha": side}
        left.annotate(other, (known[-1], shares[-1]), fontweight="bold" if heavy else None, **named)
        operations = [100 * c.flops_per_token / flops for c in costs]
        if any(operations):
            right.plot(known, operations, **style)
            if other != "prompt":  # it has the same line as the prefix
                label = "prefix, prompt" if other == "prefix" else other
                right.annotate(label, (known[-1], operations[-1]), **named)
    added = 100 * chosen.flops_per_token / flops
    for axes, value in ((left, 100 * chosen.kept / parameters), (right, added)):
        if value:
            axes.plot(size, value, "D", color=COLOURS["full"], fillstyle="none", markersize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlim(0.8, 4000)
    left.set_xlim(0.12, 4000)
    left.set_ylim(top=3 * left.get_ylim()[1])
    label = "size (rank, width or length)"
    what = method if method == "(IA)³" else f"{method} {size}"
    finish(left, f"{what}: {chosen.kept:,} parameters", label, f"% of {name}")
    finish(right, "Extra operations per token", label, "% of the base's products")
    cached = chosen.cache_bytes_per_layer * decoder_shape(model).num_hidden_layers
    text = f"{added:.3g} %, {'until it is merged' if chosen.merges else 'does not merge'}\n"
    text += f"cache {cached / 1e6:.2f} MB per sequence\n{chosen.lost_positions} positions lost"
    right.text(0.03, 0.98, text, transform=right.transAxes, va="top", fontsize=9.5)
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.6)  # room for the text
    return figure


def cost_explorer(models: Sequence[str] = ("llama-2-7b", "llama-3-8b", "smollm2-135m", "tiny-llama")) -> None:
    """Choose a model, a method and a size. Left: its parameters. Right: the operations that it adds per
    token, its cache, and the positions that it takes. All counted on the model's real modules, without
    weights.

    Args:
        models: names of `labkit.models.shapes.known_models()`.

    Raises:
        ValueError: no models, or an unknown one.
    """
    if not models:
        raise ValueError("give at least one model, such as 'llama-2-7b'")
    for name in models:
        config_of(name)

    def draw(model: str, method: str, size: int) -> None:
        size = min(size, decoder_shape(shape_of(model)).hidden_size - 1) if method != "(IA)³" else 1
        figure = draw_costs(model, method, size)
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        wide = {"style": {"description_width": "5em"}, "layout": {"width": "26em"}}
        tried = {"options": (1, 2, 4, 8, 16, 20, 32, 64, 100, 128, 200), "value": 20, "description": "size"}
        controls = {
            "model": Dropdown(options=list(models), description="model", **wide),
            "method": Dropdown(options=list(METHOD_COLOURS), value="prefix", description="method", **wide),
            "size": SelectionSlider(continuous_update=False, **tried, **wide),
        }
    chosen = (("prefix", 20), ("bottleneck", 64))
    panel(draw, controls, [{"model": models[0], "method": method, "size": size} for method, size in chosen])

"""Where the methods beside LoRA take hold of a block, drawn from a real model; and the explorer of what they cost on models of real size."""

from collections.abc import Sequence
from functools import cache

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.axes import Axes
from torch import nn

from labkit.alternatives.bottleneck import Bottleneck
from labkit.alternatives.cost import Cost, cost
from labkit.alternatives.ia3 import IA3Linear, add_ia3
from labkit.alternatives.methods import SIZED, remove
from labkit.alternatives.prompts import SoftPrompt
from labkit.alternatives.sublayers import decoder, sizes
from labkit.lab.explore.panel import panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.layer import LoRALinear
from labkit.models.shapes import config_of, meta_model
from labkit.quant.linears import is_linear, widths

# colours of the methods; they differ in brightness too
METHOD_COLOURS = {
    "LoRA": COLOURS["lora"],
    "bottleneck": COLOURS["qlora"],
    "prefix": COLOURS["nf4"],
    "prompt": COLOURS["constants"],
    "(IA)³": COLOURS["optimizer"],
}
SIZES = {
    "LoRA": (1, 2, 4, 8, 16, 32, 64),
    "bottleneck": (1, 8, 64, 256),
    "prefix": (1, 20, 200),
    "prompt": (1, 20, 200),
    "(IA)³": (1,),
}

# a block of a Llama, left to right: (label, x, y)
BOXES = {
    "embed": ("text", 0.3, 0.0),
    "norm": ("norm", 1.75, 0.0),
    "q_proj": ("q", 2.75, 0.85),
    "k_proj": ("k", 2.75, 0.0),
    "v_proj": ("v", 2.75, -0.85),
    "attend": ("attend", 4.35, 0.0),
    "o_proj": ("o", 5.15, 0.0),
    "norm 2": ("norm", 7.75, 0.0),
    "gate_proj": ("gate", 8.8, 0.5),
    "up_proj": ("up", 8.8, -0.5),
    "product": ("×", 9.7, 0.0),
    "down_proj": ("down", 10.95, 0.0),
}
SUMS = (7.0, 13.0)
SLOTS = {
    "self_attn": (6.05, 4.1),
    "mlp": (12.1, 9.9),
}  # x of the adapter after, and of the one beside the sub-layer


def places(model: nn.Module) -> dict[tuple[str, str], int]:
    """Where trained numbers sit in the first block of `model`, and how many: {(place, how): count}.

    `how` is "before" (soft prompt at "embed", prefix at "k_proj" and "v_proj": its part for one block), "output" or "input" ((IA)^3),
    "serial" or "parallel" (bottleneck), "sum" (LoRA).
    """
    found: dict[tuple[str, str], int] = {}
    tokens = getattr(model, "virtual_tokens", None)
    if isinstance(tokens, SoftPrompt):
        found["embed", "before"] = tokens.embedding.numel()
    elif tokens is not None:
        each = tokens.length * sizes(model).kv_width
        found |= {("k_proj", "before"): each, ("v_proj", "before"): each}
    for name, module in model.named_modules():
        if ".0." not in name:
            continue
        last, counted = (
            name.rpartition(".")[2],
            sum(p.numel() for p in module.parameters() if p.requires_grad),
        )
        if isinstance(module, IA3Linear):
            found[last, "input" if module.on_input else "output"] = counted
        elif isinstance(module, Bottleneck):
            found[last, module.config.form] = counted
        elif isinstance(module, LoRALinear):
            found[last, "sum"] = counted
    return found


def block_picture(
    model: nn.Module, axes: Axes, title: str, colour: str = COLOURS["lora"]
) -> dict[tuple[str, str], int]:
    """Draw a block of a Llama-type model; what trains is filled with `colour` and has its number of parameters. Returns `places(model)`."""
    grey, box = (
        COLOURS["base"],
        {"boxstyle": "round,pad=0.28", "facecolor": "white", "edgecolor": COLOURS["base"]},
    )
    arrow = {"arrowstyle": "-", "color": grey, "linewidth": 1}

    def line(*points, **style):
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            **{"color": grey, "linewidth": 1, "zorder": 1} | style,
        )

    axes.set_xlim(-0.5, 13.7)
    axes.set_ylim(-2.35, 2.25)
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    line((0.3, 0), (2.0, 0))
    for name in ("q_proj", "k_proj", "v_proj"):
        line((2.0, 0), (2.35, BOXES[name][2]), (3.4, BOXES[name][2]), (4.25, 0))
    line((4.25, 0), (8.1, 0))
    for name in ("gate_proj", "up_proj"):
        line((8.1, 0), (8.3, BOXES[name][2]), (9.2, BOXES[name][2]), (9.7, 0))
    line((9.7, 0), (13.6, 0))
    for start, end in ((1.15, SUMS[0]), (7.2, SUMS[1])):  # the residual stream passes below
        line((start, 0), (start, -2.1), (end, -2.1), (end, 0))
    axes.text(2.0, -2.07, "h", color=grey, va="bottom", style="italic")
    for x in SUMS:
        axes.text(
            x, 0, "+", ha="center", va="center", bbox={**box, "boxstyle": "circle,pad=0.12"}, fontsize=10
        )
    for label, x, y in BOXES.values():
        axes.text(x, y, label, ha="center", va="center", fontsize=10, bbox=box, zorder=3)

    ink = (
        "white" if sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) < 480 else "black"
    )  # to be read on `colour`

    def trained(x, y, text, to=None):
        filled = {"boxstyle": "round,pad=0.28", "facecolor": colour, "edgecolor": COLOURS["full"]}
        if to is not None:
            axes.annotate("", to, (x, y), arrowprops=arrow | {"color": colour, "linewidth": 2}, zorder=2)
        axes.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=9.5,
            color=ink,
            fontweight="bold",
            bbox=filled,
            zorder=4,
        )

    found = places(model)
    for (place, how), count in found.items():
        n = f"{count:,}"
        if (place, how) == ("embed", "before"):
            trained(0.3, 1.0, f"P\n{n}", to=(0.3, 0.2))
        elif how == "before":
            above = place == "k_proj"
            trained(
                4.35,
                1.3 if above else -1.3,
                f"{'K' if above else 'V'}: {n}",
                to=(4.35, 0.2 if above else -0.2),
            )
        elif how == "serial":
            trained(SLOTS[place][0], 0, f"{n}")
        elif how == "parallel":
            start, end = (1.75, SUMS[0]) if place == "self_attn" else (7.75, SUMS[1])
            line((start, 0.2), (start, 1.75), (end, 1.75), (end, 0.2), color=colour, linewidth=2)
            trained(SLOTS[place][1], 1.75, f"{n}")
        elif how == "output":
            trained(3.35, BOXES[place][2] - (0.0 if place == "k_proj" else 0.1), f"×{n}")
        elif how == "input":
            trained(10.25, -0.9, f"×{n}", to=(10.25, 0))
        else:
            _, x, y = BOXES[place]
            above = 1 if y >= 0 else -1
            reach = 0.95 if y == 0 and place == "k_proj" else 0.8
            if place == "k_proj":  # between q and v: to the side
                trained(3.4, 0, n, to=(2.9, 0))
            else:
                trained(x, y + above * reach, n, to=(x, y + above * 0.2))
    return found


@cache
def shape_of(name: str) -> nn.Module:
    """The model without its weights, in bfloat16; built once."""
    return meta_model(config_of(name), dtype=torch.bfloat16)


def base_flops(model: nn.Module) -> int:
    """Operations of all linear layers for one token, the output layer included; attention to the text is not counted."""
    return sum(2 * a * b for a, b in (widths(m) for m in model.modules() if is_linear(m)))


@cache
def cost_on(name: str, method: str, size: int) -> Cost:
    """What `method` of that size costs on the model `name`, by its shapes. LoRA (on all linear layers) is counted before merging.

    Raises:
        ValueError: the size does not fit the model.
    """
    model = shape_of(name)
    if method == "LoRA":
        linears = [widths(m) for m in decoder(model).modules() if is_linear(m)]
        n = size * sum(a + b for a, b in linears)
        return Cost("LoRA", n, n, 2 * n, 2 * sum(b for _, b in linears), merges=True)
    if method in SIZED:
        add, config = SIZED[method]
        add(model, config(size))
    else:
        add_ia3(model)
    try:
        return cost(model)
    finally:
        remove(model)


def draw_costs(name: str, method: str, size: int):
    """The figure of the explorer: parameters and operations over the size, for all methods, one of them marked."""
    model = shape_of(name)
    parameters, flops, chosen = (
        sum(p.numel() for p in model.parameters()),
        base_flops(model),
        cost_on(name, method, size),
    )
    figure, (left, right) = canvas(width=8.2, height=2.9, columns=2)
    for other, colour in METHOD_COLOURS.items():
        heavy = other == method
        known = [s for s in SIZES[other] if other != "bottleneck" or s < sizes(model).width]
        costs = [cost_on(name, other, s) for s in known]
        shares = [100 * c.kept / parameters for c in costs]
        style = {
            "color": colour,
            "linewidth": 3 if heavy else 1.2,
            "marker": "o" if len(known) == 1 else None,
            "markersize": 5,
        }
        left.plot(known, shares, **style)
        # LoRA's above its end, since the next line ends there too; the single dot's before it
        shift, side = {"LoRA": ((0, 7), "right"), "(IA)³": ((-7, 0), "right")}.get(other, ((6, 0), "left"))
        named = {"textcoords": "offset points", "va": "center", "color": colour}
        left.annotate(
            other,
            (known[-1], shares[-1]),
            xytext=shift,
            ha=side,
            fontweight="bold" if heavy else None,
            **named,
        )
        operations = [100 * c.flops_per_token / flops for c in costs]
        if any(operations):
            right.plot(known, operations, **style)
            if other != "prompt":  # the same line as the prefix
                label = "prefix, prompt" if other == "prefix" else other
                right.annotate(label, (known[-1], operations[-1]), xytext=shift, ha=side, **named)
    for axes, value in (
        (left, 100 * chosen.kept / parameters),
        (right, 100 * chosen.flops_per_token / flops),
    ):
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
    finish(
        left,
        f"{method} {size if method != '(IA)³' else ''}: {chosen.kept:,} parameters".replace(" :", ":"),
        label,
        f"% of {name}",
    )
    finish(right, "Extra operations per token", label, "% of the base's products")
    cached = chosen.cache_bytes_per_layer * sizes(model).layers
    right.text(
        0.03, 0.98,
        f"{100 * chosen.flops_per_token / flops:.3g} %, {'until it is merged' if chosen.merges else 'does not merge'}\n"
        f"cache {cached / 1e6:.2f} MB a sequence\n{chosen.lost_positions} positions lost",
        transform=right.transAxes, va="top", fontsize=9.5,
    )  # fmt: skip
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.6)  # room for the text
    return figure


def cost_explorer(models: Sequence[str] = ("llama-2-7b", "llama-3-8b", "smollm2-135m", "tiny-llama")) -> None:
    """Choose a model, a method and a size. Left: its parameters; right: what it adds for each token that is written, its cache, and the
    positions that it takes. Counted on the model's real modules, without weights.

    Args:
        models: names of `labkit.models.shapes.known_models()`.

    Raises:
        ValueError: no model, or an unknown one.
    """
    if not models:
        raise ValueError("give at least one model, such as 'llama-2-7b'")
    for name in models:
        config_of(name)

    def draw(model: str, method: str, size: int) -> None:
        size = min(size, sizes(shape_of(model)).width - 1) if method != "(IA)³" else 1
        figure = draw_costs(model, method, size)
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        wide = {"style": {"description_width": "5em"}, "layout": {"width": "26em"}}
        controls = {
            "model": Dropdown(options=list(models), description="model", **wide),
            "method": Dropdown(options=list(METHOD_COLOURS), value="prefix", description="method", **wide),
            "size": SelectionSlider(
                options=(1, 2, 4, 8, 16, 20, 32, 64, 100, 128, 200), value=20, description="size",
                continuous_update=False, **wide,
            ),
        }  # fmt: skip
    panel(
        draw,
        controls,
        [
            {"model": models[0], "method": method, "size": size}
            for method, size in (("prefix", 20), ("bottleneck", 64))
        ],
    )

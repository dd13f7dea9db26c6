"""A block of a Llama, and where each method acts on it: LoRA, bottleneck, prefix, prompt, (IA)^3.

Drawn from a real model: every filled box is a module or parameter that trains, with the number of its
parameters.
"""

from matplotlib.axes import Axes
from torch import nn

from labkit.alternatives.bottleneck import Bottleneck
from labkit.alternatives.ia3 import IA3Linear
from labkit.alternatives.methods import method_of
from labkit.alternatives.prompts import SoftPrompt
from labkit.lab.plots import COLOURS
from labkit.lora.layer import LoRALinear
from labkit.models.shapes import decoder_shape

# they differ in brightness too
METHOD_COLOURS = {
    "LoRA": COLOURS["lora"],
    "bottleneck": COLOURS["qlora"],
    "prefix": COLOURS["nf4"],
    "prompt": COLOURS["constants"],
    "(IA)³": COLOURS["optimizer"],
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


SUMS = (7.0, 13.0)  # x of the two sums with the residual stream
# x of the adapter after the sub-layer, and of the one beside it
SLOTS = {"self_attn": (6.05, 4.1), "mlp": (12.1, 9.9)}


def places(model: nn.Module) -> dict[tuple[str, str], int]:
    """Where parameters train in the first block of `model`, and how many: {(place, how): count}.

    `how` is "before" (a soft prompt at "embed"; a prefix at "k_proj" and "v_proj", counted for one block),
    "output" or "input" ((IA)^3), "serial" or "parallel" (bottleneck), or "sum" (LoRA).
    """
    found: dict[tuple[str, str], int] = {}
    added = method_of(model)
    tokens = None if added is None else added.tokens
    if isinstance(tokens, SoftPrompt):
        found["embed", "before"] = tokens.embedding.numel()
    elif tokens is not None:
        each = tokens.length * decoder_shape(model).kv_width
        found |= {("k_proj", "before"): each, ("v_proj", "before"): each}
    for name, module in model.named_modules():
        if ".0." not in name:
            continue
        last = name.rpartition(".")[2]
        counted = sum(p.numel() for p in module.parameters() if p.requires_grad)
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
    """Draw a block of a Llama-type model; what trains is filled with `colour` and shows its size.

    Returns:
        `places(model)`.
    """
    grey = COLOURS["base"]
    box = {"boxstyle": "round,pad=0.28", "facecolor": "white", "edgecolor": grey}

    def line(*points, **style):
        axes.plot(*zip(*points), **{"color": grey, "linewidth": 1, "zorder": 1} | style)

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
        circle = {**box, "boxstyle": "circle,pad=0.12"}
        axes.text(x, 0, "+", ha="center", va="center", bbox=circle, fontsize=10)
    for label, x, y in BOXES.values():
        axes.text(x, y, label, ha="center", va="center", fontsize=10, bbox=box, zorder=3)

    dark = sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) < 480
    filled = {"boxstyle": "round,pad=0.28", "facecolor": colour, "edgecolor": COLOURS["full"]}
    style = {"ha": "center", "va": "center", "fontsize": 9.5, "fontweight": "bold", "zorder": 4}
    style |= {"color": "white" if dark else "black", "bbox": filled}

    def trained(x, y, text, to=None):
        if to is not None:
            arrow = {"arrowstyle": "-", "color": colour, "linewidth": 2}
            axes.annotate("", to, (x, y), arrowprops=arrow, zorder=2)
        axes.text(x, y, text, **style)

    found = places(model)
    for (place, how), count in found.items():
        n = f"{count:,}"
        if (place, how) == ("embed", "before"):
            trained(0.3, 1.0, f"P\n{n}", to=(0.3, 0.2))
        elif how == "before":
            letter, side = ("K", 1) if place == "k_proj" else ("V", -1)
            trained(4.35, 1.3 * side, f"{letter}: {n}", to=(4.35, 0.2 * side))
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
            side = 1 if y >= 0 else -1
            if place == "k_proj":  # between q and v: beside its box, not above it
                trained(3.4, 0, n, to=(2.9, 0))
            else:
                trained(x, y + 0.8 * side, n, to=(x, y + 0.2 * side))
    return found

"""What of an update survives in which format; and two adapters weighed against each other, with both losses live."""

from collections.abc import Mapping, Sequence

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor, nn

from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.figures.merging import crossings
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.adapters import active_adapter, adapter_configs, base_only, remove_adapter, use_adapter
from labkit.lora.combining import combine
from labkit.lora.survival import Survival, survival
from labkit.quant.tensor import quantize
from labkit.training.evaluate import text_loss

FOUR_BITS = ("nf4", "fp4", "int4")
SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = (*FOUR_BITS, *SIXTEEN_BITS)
BLOCKSIZES = (32, 64, 128, 256, 512)
RATIOS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)
NAMED_AT = {"nf4": (4, (-20, 4)), "fp4": (0, (0, 5)), "int4": (5, (6, -8)), "bf16": (4, (-8, 5))}  # ρ, offset
NAMES = {"bf16": "bf16, fp16"}  # two lines in one place
METHODS = ("cat", "svd", "linear", "ties", "ties_svd", "dare_linear_svd")
MIXED = "mixed by the explorer"


def stored(weight: Tensor, kind: str, blocksize: int = 64) -> Tensor:
    """`weight` as it is after it was stored in `kind`, one of `FORMATS`, in fp32."""
    if kind in SIXTEEN_BITS:
        return weight.to(SIXTEEN_BITS[kind]).float()
    return quantize(weight, kind, blocksize, False).dequantize(torch.float32)


def merged_as(weight: Tensor, delta: Tensor, rho: float, kind: str, blocksize: int = 64) -> Survival:
    """What survives of `delta`, made rho times as large as the weight, when it is merged and stored.

    Args:
        weight: in full precision, (out, in); it is stored first, and the update is added to that.
        delta: the direction of the update, (out, in); its size does not matter.
        rho: rms of the update over rms of the weight.
        kind: one of `FORMATS`.
        blocksize: of the 4-bit formats.
    """
    before = stored(weight.float(), kind, blocksize)
    update = delta.float() * (rho * before.norm() / delta.float().norm())
    return survival(before, stored(before + update, kind, blocksize), update)


def survival_explorer(weight: Tensor, delta: Tensor) -> None:
    """Choose ρ, a format and a block size. Left: the share of a real layer's update that survives a merge, over ρ.
    Right: the same merge weight by weight, for the 4-bit formats.

    Args:
        weight: of a layer, (out, in), in full precision.
        delta: its trained update, of the same shape; its size is changed to fit ρ.

    Raises:
        ValueError: the shapes differ, or the update is zero.
    """
    if weight.shape != delta.shape or not delta.any():
        raise ValueError(
            f"give a weight and an update of one shape that is not zero, not {tuple(weight.shape)} and {tuple(delta.shape)}"
        )
    weight, delta = weight.detach().float(), delta.detach().float()

    def draw(rho: float, kind: str, blocksize: int) -> None:
        figure, (left, right) = canvas(width=9, height=3.3, columns=2)
        for other in FORMATS:
            shares = [merged_as(weight, delta, r, other, blocksize).share for r in RATIOS]
            chosen = other == kind
            colour = COLOURS["nf4" if chosen else "control"]
            left.plot(RATIOS, shares, color=colour, linewidth=2.5 if chosen else 1, zorder=2 + chosen)
            if not chosen and other in NAMED_AT:
                at, side = NAMED_AT[other]
                words = {"textcoords": "offset points", "fontsize": 9.5, "color": COLOURS["base"]}
                left.annotate(NAMES.get(other, other), (RATIOS[at], shares[at]), xytext=side, **words)
        now = merged_as(weight, delta, rho, kind, blocksize)
        left.plot(rho, now.share, "o", color=COLOURS["full"], markersize=8, zorder=4)
        left.set_xscale("log")
        left.set_ylim(-0.05, 1.15)
        blocks = f", blocks of {blocksize}" if kind in FOUR_BITS else ""
        finish(left, f"{kind}{blocks}: {now.share:.0%} survives", "ρ = rms ΔW / rms W", "share of ΔW")
        update = delta * (rho * weight.norm() / delta.norm())
        if kind in FOUR_BITS:
            moved = crossings(weight, update, right, "", kind)
            right.set_title(f"{int(moved.sum())} of {len(moved)} codes change", loc="left", fontweight="bold")
        else:
            noise = (stored(weight + update, kind) - weight - update).flatten()[:4000]
            right.plot(weight.flatten()[:4000].abs(), noise.abs(), ".", color=COLOURS["nf4"], markersize=2)
            right.set_xscale("log")
            right.set_yscale("log")
            finish(right, f"rounding: {now.error:.1%} of ΔW", "|W|", "error of the sum")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        controls = {
            "rho": SelectionSlider(options=RATIOS, value=0.05, description="ρ", **SLOW),
            "kind": Dropdown(options=FORMATS, description="stored as", **WIDE),
            "blocksize": SelectionSlider(options=BLOCKSIZES, value=64, description="block size", **SLOW),
        }
    panel(draw, controls, [{"rho": rho, "kind": "nf4", "blocksize": 64} for rho in (0.03, 0.12)])


def mixing_explorer(model: nn.Module, tokenizer, records: Mapping[str, Sequence[dict]]) -> None:
    """Weigh two adapters and choose how they are combined: a point for the loss on the task of each, computed live.

    Args:
        model: with two adapters, none merged; it is left as it was.
        tokenizer: its tokenizer.
        records: {adapter: held-out records of its task}; a dozen each respond in about a second.

    Raises:
        ValueError: there are not exactly two adapters, or one has no records.
    """
    names = list(records)
    if len(names) != 2 or set(names) != set(adapter_configs(model)) or not all(records.values()):
        raise ValueError(
            f"give records for two adapters of the model, which has {', '.join(adapter_configs(model)) or 'none'}"
        )
    losses: dict[tuple, list[float]] = {}

    def both(first: float, second: float, how: str) -> list[float]:
        """The losses on the two tasks; measured once for each setting."""
        key = first, second, how
        if key not in losses:
            active = active_adapter(model)
            weights = {name: w for name, w in zip(names, (first, second)) if w}
            if not weights:
                with base_only(model):
                    losses[key] = [text_loss(model, tokenizer, records[n], 32)[0] for n in names]
                return losses[key]
            density = None if how in ("cat", "svd", "linear") else 0.5
            combine(model, weights, MIXED, how, density=density)
            try:
                losses[key] = [text_loss(model, tokenizer, records[n], 32)[0] for n in names]
            finally:
                use_adapter(model, active)
                remove_adapter(model, MIXED)
        return losses[key]

    def draw(first: float, second: float, how: str) -> None:
        figure, axes = canvas(width=6.5, height=3.6)
        for label, at in (("base", (0, 0)), (names[0], (1, 0)), (names[1], (0, 1))):
            x, y = both(*at, "cat")
            axes.plot(x, y, "o", color=COLOURS["base"], markersize=7)
            axes.annotate(label, (x, y), xytext=(7, 5), textcoords="offset points", color=COLOURS["base"])
        for (_, _, method), (x, y) in list(losses.items()):
            if method == how:
                axes.plot(x, y, ".", color=COLOURS["lora"], alpha=0.5)
        x, y = both(first, second, how)
        axes.plot(x, y, "D", color=COLOURS["lora"], markersize=9)
        axes.margins(0.15)
        title = f"{how}: {first:g} × {names[0]} + {second:g} × {names[1]} → {x:.2f}, {y:.2f}"
        finish(axes, title, f"loss on {names[0]} (nats)", f"loss on {names[1]} (nats)")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, FloatSlider

        look = SLOW | {"min": 0, "max": 1.5, "step": 0.25}
        controls = {
            "first": FloatSlider(1.0, description=names[0], **look),
            "second": FloatSlider(1.0, description=names[1], **look),
            "how": Dropdown(options=METHODS, description="combined by", **WIDE),
        }
    panel(draw, controls, [{"first": weight, "second": weight, "how": "cat"} for weight in (1.0, 0.5)])

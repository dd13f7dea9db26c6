"""An update and its spectrum beside noise, and what a truncation of it is worth in held-out loss."""

from collections.abc import Callable, Mapping

import torch
from IPython.display import display
from matplotlib import pyplot as plt

from labkit.analysis.spectra import (
    Matrix,
    effective_rank,
    energy_rank,
    gaussian_like,
    singular_values,
    svd,
    truncate,
)
from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish

RANKS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def update_explorer(
    updates: Mapping[str, Mapping[str, Matrix]],
    share_kept: Callable[[str, int], float],
    known: Mapping[str, Mapping[int, float]] | None = None,
    intruders: Callable[[str, str, float], int] | None = None,
) -> None:
    """Pick a method, a layer and k: see the spectrum of the layer's update beside noise of the same norm, and
    the share of the loss improvement that is kept when *every* layer's update is cut to its k largest
    directions, measured live.

    Args:
        updates: {method: {layer: update as a tensor, `Factored` or `SVD`}}, with the same layers for every
            method.
        share_kept: measures that share for a method and a k.
        known: {method: {k: share}} measured before, drawn as curves; one that is no method of `updates` is a
            control, and dashed.
        intruders: counts the intruder dimensions of a method's layer at an ε; None leaves the ε out.

    Raises:
        ValueError: no updates.
    """
    if not updates or not all(updates.values()):
        raise ValueError("updates is empty; give at least one, {method: {layer: matrix}}")
    known = known or {}

    def draw(method: str, layer: str, k: int, epsilon: float = 0.6) -> None:
        update = updates[method][layer]
        s = singular_values(update)
        noise = singular_values(gaussian_like(truncate(svd(update), len(s)), seed=0))
        colour = COLOURS["full" if method.startswith("full") else "lora"]
        figure, (left, right) = canvas(width=9, height=3.4, columns=2)
        x = torch.arange(1, len(s) + 1)
        left.plot(torch.arange(1, len(noise) + 1), noise, "--", color=COLOURS["base"])
        left.plot(x, s, color=colour, linewidth=2)
        if k:
            left.fill_between(x[:k], 0, s[:k], color=colour, alpha=0.25)
        left.set_ylim(0, 1.1 * max(s.max(), noise.max()))
        kept = (s[:k] ** 2).sum() / (s**2).sum()
        corner = {"ha": "right", "va": "top", "transform": left.transAxes}
        left.text(0.98, 0.95, method, color=colour, **corner)
        left.text(0.98, 0.86, "- - noise of this norm", color=COLOURS["base"], **corner)
        ranks = f"effective rank {effective_rank(s):.0f}, 90 % of energy in {energy_rank(s)}"
        left.text(0.98, 0.77, ranks, fontsize=9, **corner)
        name = short_name(layer)
        name += f"; intruders at ε = {epsilon}: {intruders(method, layer, epsilon)}" if intruders else ""
        finish(left, name, "number of the singular value", "singular value")
        for other, points in known.items():
            ks, shares = zip(*((max(a, 0.6), 100 * b) for a, b in sorted(points.items())))
            shade = colour if other == method else COLOURS["base"]
            style = "-o" if other == method else "-" if other in updates else "--"
            right.plot(ks, shares, style, color=shade, markersize=3, linewidth=2 if other == method else 1)
            if other != method:
                place = {"xytext": (0, -11), "textcoords": "offset points", "ha": "center", "fontsize": 8.5}
                middle = len(ks) // 2
                place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                right.annotate(other, (ks[middle], shares[middle]), color=shade, **place)
        share = share_kept(method, k)
        diamond = {"color": COLOURS["gold"], "markersize": 9, "markeredgecolor": "black"}
        right.plot(max(k, 0.6), 100 * share, "D", **diamond)
        right.axhline(100, color=COLOURS["base"], linewidth=0.8)
        right.set_xscale("log", base=2)
        right.set_xticks(RANKS[1:], RANKS[1:])
        right.set_ylim(min(-3, 100 * share - 5), max(108, 100 * share + 5))
        title = f"k = {k}: {kept:.0%} of this layer's energy,\n{share:.0%} of the improvement (all layers)"
        finish(right, title, "directions kept in each layer (log scale)", "% of loss improvement")
        display(figure)
        plt.close(figure)

    methods, layers = list(updates), list(next(iter(updates.values())))
    static = [{"method": methods[0], "layer": layers[0], "k": 8}]
    if len(methods) > 1:
        static.append({"method": methods[-1], "layer": layers[-1], "k": 2})
    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, FloatSlider, SelectionSlider

        named = [(short_name(name), name) for name in layers]
        controls["method"] = Dropdown(options=methods, description="method", **WIDE)
        controls["layer"] = Dropdown(options=named, description="layer", **WIDE)
        controls["k"] = SelectionSlider(
            options=RANKS, value=8, description="k kept", continuous_update=False, **WIDE
        )
        if intruders:
            epsilons = {"value": 0.6, "min": 0.3, "max": 0.95, "step": 0.05, "description": "ε of intruders"}
            controls["epsilon"] = FloatSlider(continuous_update=False, **epsilons, **WIDE)
    panel(draw, controls, static)


def short_name(layer: str) -> str:
    """ "model.layers.2.mlp.down_proj" as "layer 2, down"."""
    parts = layer.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    last = parts[-1].removesuffix("_proj")
    return f"layer {number}, {last}" if number is not None else last

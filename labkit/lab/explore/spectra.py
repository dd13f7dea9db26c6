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
) -> None:
    """Pick a method, a layer and k: see the spectrum of the layer's update beside noise of the same norm, and
    the share of the loss improvement that is kept when *every* layer's update is cut to its k largest
    directions, measured live.

    Args:
        updates: {method: {layer: update as a tensor, `Factored` or `SVD`}}, with the same layers for every
            method.
        share_kept: measures that share for a method and a k.
        known: {method: {k: share}} measured before, drawn as a curve.

    Raises:
        ValueError: no updates.
    """
    if not updates or not all(updates.values()):
        raise ValueError("updates is empty; give at least one, {method: {layer: matrix}}")
    known = known or {}

    def draw(method: str, layer: str, k: int) -> None:
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
        finish(left, short_name(layer), "number of the singular value", "singular value")
        curve = sorted(known.get(method, {}).items())
        if curve:
            ks, shares = [max(a, 0.6) for a, _ in curve], [100 * b for _, b in curve]
            right.plot(ks, shares, "-o", color=colour, markersize=3)
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
        from ipywidgets import Dropdown, SelectionSlider

        named = [(short_name(name), name) for name in layers]
        controls["method"] = Dropdown(options=methods, description="method", **WIDE)
        controls["layer"] = Dropdown(options=named, description="layer", **WIDE)
        controls["k"] = SelectionSlider(
            options=RANKS, value=8, description="k kept", continuous_update=False, **WIDE
        )
    panel(draw, controls, static)


def short_name(layer: str) -> str:
    """ "model.layers.2.mlp.down_proj" as "layer 2, down"."""
    parts = layer.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    last = parts[-1].removesuffix("_proj")
    return f"layer {number}, {last}" if number is not None else last

"""Turn a trained adapter, or one layer of it, up and down, and see the loss and the spectrum."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import nn

from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.inject import lora_layers
from labkit.training.evaluate import text_loss

ALL = "all layers"
STRENGTHS = tuple(i / 4 for i in range(9))  # 0 to 2


@contextmanager
def one_strength(model: nn.Module, layer: str, factor: float):
    """Within the block, multiply the correction of `layer` (or of `ALL`) by `factor`, and no other."""
    layers = lora_layers(model)
    chosen = list(layers.values()) if layer == ALL else [layers[layer]]
    before = [module.scaling for module in chosen]
    try:
        for module in chosen:
            module.scaling *= factor
        yield
    finally:
        for module, scaling in zip(chosen, before):
            module.scaling = scaling


def shuffled_adapter(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose corrections have the same singular values but other directions: A and B are permuted."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(other).values():
            order_in = torch.randperm(layer.in_features, generator=generator).to(layer.lora_A.device)
            order_out = torch.randperm(layer.out_features, generator=generator).to(layer.lora_B.device)
            layer.lora_A.copy_(layer.lora_A[:, order_in])
            layer.lora_B.copy_(layer.lora_B[order_out])
    return other


def short_name(name: str) -> str:
    """ "model.layers.2.mlp.down_proj" to "2 · down_proj"."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return " · ".join([*numbers, name.rpartition(".")[2]])


def strength_explorer(model: nn.Module, tokenizer, records: Sequence[dict]) -> None:
    """Turn an adapter, or one layer of it, from 0 (the base) to 2 (twice what was trained). Left: the loss on
    `records`, computed live, and that with a random correction of the same singular values. Right: the
    singular values of the correction at this strength, beside those of the weight.

    Args:
        model: with adapters of `labkit.lora.layer`, not merged.
        tokenizer: its tokenizer.
        records: passages to measure the loss on; with a dozen, the controls respond in about a second.

    Raises:
        ValueError: no adapter, or a merged one; no records.
    """
    layers = lora_layers(model)
    if not layers or any(layer.is_merged for layer in layers.values()):
        raise ValueError(
            "strength_explorer needs an adapter that is not merged; add one, or unmerge it first"
        )
    if not records:
        raise ValueError("records is empty; give at least one passage to measure the loss on")
    names = {ALL: ALL} | {short_name(name): name for name in layers}
    models = {"lora": model, "control": shuffled_adapter(model)}
    losses: dict[tuple[str, str, float], float] = {}
    first = next(iter(layers))

    def loss(kind: str, layer: str, strength: float) -> float:
        """Measured once per setting."""
        key = kind, layer, strength
        if key not in losses:
            with one_strength(models[kind], layer, strength):
                losses[key] = text_loss(models[kind], tokenizer, records)[0]
        return losses[key]

    def draw(layer: str, strength: float) -> None:
        name = names[layer]
        figure, (left, right) = canvas(width=9, height=3.3, columns=2)
        for kind, marker in (("control", "s"), ("lora", "o")):
            curve = [loss(kind, name, s) for s in STRENGTHS]
            left.plot(STRENGTHS, curve, marker=marker, markersize=4, color=COLOURS[kind])
        now = loss("lora", name, strength)
        left.plot(strength, now, "o", markersize=10, fillstyle="none", color=COLOURS["full"])
        above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 10}
        left.annotate(f"{now:.2f}", (strength, now), **above)
        # a random correction can be far worse than any that was trained: let it leave the figure
        trained = [loss("lora", name, s) for s in STRENGTHS]
        span = max(trained) - min(trained)
        left.set_ylim(min(trained) - 0.15 * span, max(trained) + 0.4 * span)
        corner = {"transform": left.transAxes, "ha": "right", "va": "top", "fontsize": 9.5}
        left.text(0.97, 0.97, "blue: trained\ngrey: random, same size", **corner)
        finish(left, f"Loss, {layer} × {strength:g}", "strength (1: as trained)", "nats per token")

        shown = first if name == ALL else name
        module = layers[shown]
        with torch.no_grad():
            weight = torch.linalg.svdvals(module.base.weight.float()).cpu()
            delta = strength * torch.linalg.svdvals(module.delta().float())[: module.r].cpu()
        right.plot(range(1, len(weight) + 1), weight, color=COLOURS["base"], linewidth=2)
        if strength:  # at 0 there is nothing to draw on a logarithmic axis
            right.plot(range(1, len(delta) + 1), delta, "o-", color=COLOURS["lora"], markersize=4)
            beside = {"color": COLOURS["lora"], "va": "center", "fontsize": 10}
            right.text(len(delta) + 1, delta[-1], "  correction", **beside)
        right.text(len(weight) / 3, weight[len(weight) // 3], " W", color=COLOURS["base"], va="bottom")
        right.set_xscale("log")
        right.set_yscale("log")
        share = (delta.norm() / weight.norm()).item()
        finish(right, f"Layer {short_name(shown)}: |ΔW| = {share:.0%} of |W|", "number", "singular value")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, FloatSlider

        controls["layer"] = Dropdown(options=list(names), value=ALL, description="layer", **WIDE)
        controls["strength"] = FloatSlider(1.0, min=0, max=2, step=0.05, description="adapter ×", **SLOW)
    panel(draw, controls, [{"layer": ALL, "strength": 1.0}])

"""The variants of LoRA: what each starts from, and what its first step does to a real weight."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor, nn

from labkit.lab.explore.lora import short_name
from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import make_layer
from labkit.training.optimizer import parameter_groups

VARIANTS: dict[str, dict] = {  # arguments of `first_step`
    "LoRA": {},
    "rsLoRA": {"variant": "rslora"},
    "LoRA+": {"ratio": 16},
    "DoRA": {"variant": "dora"},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
ALPHAS = (1, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class FirstStep:
    """A layer before and after the first step of AdamW. All matrices are (out, in).

    Attributes:
        start: what the adapter adds at the start; zero for the random starts.
        base: the frozen weight, which is the given one minus `start`.
        change: how the step changes the weight that the layer computes with.
        promised: how far the loss falls to first order, -<gradient, change>.
    """

    start: Tensor
    base: Tensor
    change: Tensor
    promised: float

    def rows(self) -> tuple[Tensor, Tensor]:
        """For each row of the weight, (out,): relative change of its length, and 1 - cos(before, after)."""
        before = self.base + self.start
        after = before + self.change
        lengths = after.norm(dim=1) / before.norm(dim=1) - 1
        return lengths, 1 - nn.functional.cosine_similarity(before, after, dim=1)


def first_step(
    weight: Tensor,
    gradient: Tensor,
    r: int,
    alpha: float,
    lr: float,
    variant: str = "lora",
    init: str = "default",
    ratio: float = 1.0,
    seed: int = 0,
) -> FirstStep:
    """Put an adapter on a weight and take one step of AdamW, at the full rate, along a loss's gradient.

    The adapter is a layer of `labkit.lora`; its gradients are those of <gradient, W>, where W is the weight
    that the layer computes with.

    Args:
        weight: (out, in).
        gradient: of the loss with respect to this weight, (out, in).
        r, alpha, variant, init: see `labkit.LoRAConfig`.
        lr: learning rate.
        ratio: B's learning rate over A's (LoRA+).
        seed: of a random start.

    Raises:
        ValueError: weight and gradient have different shapes, or see `labkit.LoRAConfig`.
    """
    if weight.shape != gradient.shape:
        raise ValueError(
            f"the gradient is {tuple(gradient.shape)}, but the weight is {tuple(weight.shape)}; give the same shape"
        )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = make_layer(linear, LoRAConfig(r=r, alpha=alpha, variant=variant, init=init))
    base = layer.base.weight.detach()
    before = layer.merged_weight(base)
    optimizer = torch.optim.AdamW(parameter_groups(layer, lr, ratio), weight_decay=0)
    for group in optimizer.param_groups:
        group["eps"] = 0.0  # the first step is then the rate itself, even for a gradient of 1e-8
    (gradient * before).sum().backward()
    for parameter in layer.parameters():
        if parameter.grad is not None and not parameter.grad.any():
            parameter.grad = None  # would be 0 / 0: A's gradient is zero as long as B is
    optimizer.step()
    change = (layer.merged_weight(base) - before).detach()
    return FirstStep(before.detach() - base, base, change, -(gradient * change).sum().item())


def variant_explorer(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: float = 6e-3
) -> None:
    """Choose a variant, a layer, rank and alpha. Left: the singular values of the weight, of its frozen part,
    of the adapter's start and of the first step. Right: what that step does to the length and the direction
    of each row.

    Args:
        weights: {layer: real weight, (out, in)}.
        gradients: {layer: gradient of a real loss, (out, in)}.
        lr: learning rate of the step.

    Raises:
        ValueError: no weights, or a weight without a gradient.
    """
    if not weights or set(weights) - set(gradients):
        raise ValueError("give at least one weight, and a gradient for each, under the same names")
    names = {short_name(name): name for name in weights}

    def draw(layer: str, variant: str, r: int, alpha: float) -> None:
        weight, gradient = weights[names[layer]], gradients[names[layer]]
        rank = min(r, *weight.shape)
        step = first_step(weight, gradient, rank, alpha, lr, **VARIANTS[variant])
        figure, (left, right) = canvas(width=9, height=3.2, columns=2)
        curves = {
            "W": (weight, "base", "-", 4),
            "frozen": (step.base, "full", "--", 1.5),
            "adapter": (step.start, "lora", "-", 2),
            "first step": (step.change, "qlora", "-", 2),
        }
        for label, (matrix, colour, style, width) in curves.items():
            s = torch.linalg.svdvals(matrix)
            s = s[s > 1e-4 * s[0].clamp(min=1e-12)]
            if not len(s):
                continue  # B = 0: the adapter adds nothing yet
            left.plot(range(1, len(s) + 1), s, style, color=COLOURS[colour], linewidth=width)
            at = min(len(s) // 4, 40) if label == "W" else 0  # W's largest are the adapter's in PiSSA
            if label != "frozen":
                above = {"xytext": (2, 5), "textcoords": "offset points", "color": COLOURS[colour]}
                left.annotate(label, (at + 1, s[at]), **above)
        left.set_xscale("log")
        left.set_yscale("log")
        left.margins(y=0.15)
        title = f"{variant}, r={rank}, α={alpha:g}: spectra"
        finish(left, title, "number (dashed: the frozen part)", "singular value")
        lengths, turned = step.rows()
        right.axhline(0, color=COLOURS["control"], linewidth=1)
        right.plot(turned, 100 * lengths, "o", color=COLOURS["qlora"], markersize=3)
        share = (step.change.norm() / weight.norm()).item()
        title = f"Rows: |ΔW| {share:.1%} of |W|; loss {-step.promised:+.3f}"
        finish(right, title, "turned by (1 − cos)", "longer by (%)")
        right.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3))
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        controls = {
            "layer": Dropdown(options=list(names), description="layer", **WIDE),
            "variant": Dropdown(options=list(VARIANTS), description="variant", **WIDE),
            "r": SelectionSlider(options=RANKS, value=8, description="rank", **SLOW),
            "alpha": SelectionSlider(options=ALPHAS, value=16, description="alpha", **SLOW),
        }
    first = next(iter(names))
    panel(draw, controls, [{"layer": first, "variant": v, "r": 8, "alpha": 16} for v in ("DoRA", "PiSSA")])

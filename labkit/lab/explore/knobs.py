"""Rank, α, learning rate and start of LoRA, on a problem so small that a grid of runs trains as you move a control.

    y = (W + ΔW) x,    ΔW of rank 6, each singular value half of the one before

It is a linear regression and no language model: what it shows is how the knobs pull at each other, which is the same
algebra, and not which values to choose. All runs of a map train side by side, as one batch of matrices, with AdamW's update
written out (each run has a rate of its own).
"""

import math
from functools import cache

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from torch import Tensor

from labkit.lab.explore.panel import SLOW, WIDE, panel
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish

WIDTH_IN, WIDTH_OUT, EXAMPLES, TRUE_RANK = 32, 24, 96, 6
STEPS, WARMUP = 60, 3
RANKS = (1, 2, 4, 8, 16)
ALPHAS = tuple(2.0**k for k in range(0, 9))  # 1 to 256
RATES = tuple(2.0**k for k in range(-13, -1))  # 1.2e-4 to 0.25
A_RANDOM, B_RANDOM, BOTH, NEITHER = "A random, B = 0", "B random, A = 0", "both random", "both zero"
STARTS = (A_RANDOM, B_RANDOM, BOTH, NEITHER)


@cache
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """W (out, in), inputs (examples, in), and the targets (examples, out) of the changed weight."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(WIDTH_OUT, WIDTH_IN, generator=generator) / math.sqrt(WIDTH_IN)
    left = torch.linalg.qr(torch.randn(WIDTH_OUT, TRUE_RANK, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(WIDTH_IN, TRUE_RANK, generator=generator))[0]
    change = left @ torch.diag(2.0 ** -torch.arange(TRUE_RANK)) @ right.T
    x = torch.randn(EXAMPLES, WIDTH_IN, generator=generator)
    return W, x, x @ (W + change).T


def starting_point(start: str, r: int, runs: int) -> tuple[Tensor, Tensor]:
    """A (runs, r, in) and B (runs, out, r), the same for all runs; what is random is as small as LoRA's A."""
    generator = torch.Generator().manual_seed(1)
    A, B = (2 * torch.rand(shape, generator=generator) - 1 for shape in ((r, WIDTH_IN), (WIDTH_OUT, r)))
    A = A * (start in (A_RANDOM, BOTH)) / math.sqrt(WIDTH_IN)
    B = B * (start in (B_RANDOM, BOTH)) / math.sqrt(WIDTH_IN)
    return A.repeat(runs, 1, 1), B.repeat(runs, 1, 1)


def train_side_by_side(r: int, alphas: Tensor, rates: Tensor, start: str) -> Tensor:
    """The loss before each step and after the last, (STEPS + 1, runs), of one run for each α and rate.

    The loss is the mean squared error over that of the frozen W alone: 1 is nothing learned.
    """
    W, x, y = problem()
    scaling = alphas / r
    A, B = starting_point(start, r, len(rates))
    parts = [A.requires_grad_(), B.requires_grad_()]
    first, second = ([torch.zeros_like(p) for p in parts] for _ in range(2))
    untrained = (y - x @ W.T).square().mean()
    losses: list[Tensor] = []
    for step in range(1, STEPS + 2):
        merged = W + scaling[:, None, None] * (B @ A)  # (runs, out, in)
        loss = (y - x @ merged.mT).square().mean((1, 2)) / untrained  # (runs,)
        losses.append(loss.detach())
        if step > STEPS:
            break
        gradients = torch.autograd.grad(loss.sum(), parts)  # runs do not meet, so each gets its own
        lr = rates * min(step / WARMUP, (STEPS + 1 - step) / (STEPS + 1 - WARMUP))
        with torch.no_grad():
            for p, g, m, v in zip(parts, gradients, first, second):
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                p -= lr[:, None, None] * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.stack(losses)


@cache
def knob_map(r: int, start: str) -> Tensor:
    """The loss after training, (alphas, rates)."""
    alphas, rates = torch.tensor(ALPHAS), torch.tensor(RATES)
    grid = torch.cartesian_prod(alphas, rates)
    return train_side_by_side(r, grid[:, 0], grid[:, 1], start)[-1].reshape(len(alphas), len(rates))


def knobs_explorer() -> None:
    """Move r, α, the learning rate and the start. Left: the loss while this run trains. Right: the loss after training
    at every α and rate for this r and start, with the best rate of each α marked; the cross is the run on the left.
    """

    def draw(r: int, alpha: float, lr: float, start: str) -> None:
        losses = train_side_by_side(r, torch.tensor([alpha]), torch.tensor([lr]), start)[:, 0]
        table = knob_map(r, start).clamp(max=2.0)
        figure, (left, right) = canvas(width=10, height=3.4, columns=2)
        left.plot(losses.clamp(max=2.0), color=COLOURS["lora"])
        left.axhline(1, color=COLOURS["base"], linewidth=1)
        left.set_yscale("log")
        end = f"{losses[-1]:.2g}" if losses[-1] < 2 else "diverged"
        finish(left, f"r = {r}, α = {alpha:g}, lr {lr:.2g}: {end}", "step", "loss / loss of W alone")
        right.pcolormesh(range(len(RATES) + 1), range(len(ALPHAS) + 1), table.log10(), cmap="viridis_r")
        best = table.argmin(1)
        if start != NEITHER:
            right.plot(
                best + 0.5,
                torch.arange(len(ALPHAS)) + 0.5,
                "o",
                color="white",
                markeredgecolor="black",
                markersize=6,
            )
        at = math.log2(lr / RATES[0]) + 0.5, math.log2(alpha / ALPHAS[0]) + 0.5
        right.plot(*at, "x", color=COLOURS["full"], markersize=10, markeredgewidth=2.5)
        right.set_xticks(
            [i + 0.5 for i in range(0, len(RATES), 3)], [f"{RATES[i]:.1g}" for i in range(0, len(RATES), 3)]
        )
        right.set_yticks(
            [i + 0.5 for i in range(0, len(ALPHAS), 2)], [f"{ALPHAS[i]:g}" for i in range(0, len(ALPHAS), 2)]
        )
        right.grid(False)
        finish(right, "Bright is better; dots: the best rate at each α", "learning rate", "α")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, SelectionSlider

        controls["r"] = SelectionSlider(options=RANKS, value=8, description="r", **SLOW)
        controls["alpha"] = SelectionSlider(
            options=[(f"{a:g}", a) for a in ALPHAS], value=16.0, description="α", **SLOW
        )
        rates = [(f"{rate:.2g}", rate) for rate in RATES]
        controls["lr"] = SelectionSlider(options=rates, value=RATES[7], description="lr", **SLOW)
        controls["start"] = Dropdown(options=STARTS, description="start", **WIDE)
    panel(draw, controls, [{"r": 8, "alpha": 16.0, "lr": RATES[7], "start": A_RANDOM}])

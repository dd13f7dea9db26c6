"""Learning against forgetting: methods compared where they learn the same amount.

A model that changes less forgets less, so two methods are compared at equal learning. The *front* of a method
is those of its runs that no other of its runs beats in both; on it one reads off what a gain costs. The base
is on every front: it has learned nothing and forgotten nothing.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib import pyplot as plt

from labkit.lab.explore.panel import WIDE, panel
from labkit.lab.figures.forgetting import OLD, look, plane
from labkit.lab.interactive import is_interactive
from labkit.lab.plots import COLOURS, canvas, finish, seed_dots

ALL = "all"


def front(gains: Sequence[float], rises: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The runs that no other run beats by learning as much and forgetting less; the base, (0, 0), is one.

    Returns:
        Their gains, rising, and their rises; both (n,).

    Raises:
        ValueError: lists of different lengths, or a value that is not finite.
    """
    x, y = (np.array([0, *values], dtype=float) for values in (gains, rises))
    if x.shape != y.shape or not np.isfinite([x, y]).all():
        raise ValueError(
            f"{len(gains)} gains and {len(rises)} rises; give one finite number of each for every run"
        )
    order = np.lexsort((-y, x))  # by gain; at equal gain, the run that forgets more comes first
    x, y = x[order], y[order]
    least_from_here = np.minimum.accumulate(y[::-1])[::-1]
    last_of_its_value = np.append(least_from_here[1:] > y[:-1], True)
    kept = (y <= least_from_here) & last_of_its_value
    return x[kept], y[kept]


def forgetting_at(gain: float, gains: Sequence[float], rises: Sequence[float]) -> float:
    """What a gain costs on the front of these runs, by straight lines; nan if none learns that much."""
    x, y = front(gains, rises)
    return float(np.interp(gain, x, y)) if gain <= x[-1] else math.nan


def costs_at(gain: float, runs: pd.DataFrame, old: str = "rise") -> dict[str, list[float]]:
    """{family: `forgetting_at` for each seed}, without families that do not always learn that much."""
    costs = {
        family: [forgetting_at(gain, one["gain"], one[old]) for _, one in group.groupby("seed")]
        for family, group in runs.groupby("family", sort=False)
    }
    return {family: values for family, values in costs.items() if np.isfinite(values).all()}


def plane_explorer(runs: pd.DataFrame, gain: float = 0.7) -> None:
    """Choose methods, steps, old domain and gain. Left: the plane. Right: what that gain costs each method.

    Args:
        runs: see `labkit.lab.figures.forgetting.plane`.
        gain: on the new domain, to start with; nats per token.

    Raises:
        ValueError: no runs, or a column is missing.
    """
    if not len(runs):
        raise ValueError("runs is empty; give one row per run")
    families, lengths = tuple(dict.fromkeys(runs["family"])), sorted({int(n) for n in runs["steps"]})

    def draw(families: Sequence[str], steps: int | str, old: str, gain: float) -> None:
        chosen = runs[runs["family"].isin(families) & ((runs["steps"] == steps) | (steps == ALL))]
        figure, (left, right) = canvas(width=9.5, height=3.8, columns=2)
        if len(chosen):
            plane(chosen, left, OLD[old])
            left.axvline(gain, color=COLOURS["control"], linewidth=1, zorder=0)
        finish(left, f"{steps} steps", "learned (nats per token)", "forgotten (nats per token)")
        costs = costs_at(gain, chosen, OLD[old])
        colours = {name: look(name, list(dict.fromkeys(chosen["family"])))[0] for name in costs}
        if costs:
            seed_dots(costs, f"The price of learning {gain:.2f}", f"forgotten: {old}", colours, axes=right)
        else:
            right.text(0.5, 0.5, "none of them learns that much", ha="center", transform=right.transAxes)
            right.set_axis_off()
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import Dropdown, FloatSlider, SelectMultiple

        methods = {"options": families, "value": families, "description": "methods"}
        gains = {"min": 0.3, "max": 1.2, "step": 0.05, "value": gain, "description": "equal gain"}
        controls = {
            "families": SelectMultiple(rows=min(10, len(families)), **methods, **WIDE),
            "steps": Dropdown(options=[*lengths, ALL], description="steps", **WIDE),
            "old": Dropdown(options=list(OLD), description="old domain", **WIDE),
            "gain": FloatSlider(continuous_update=False, **gains, **WIDE),
        }
    static = [
        {"families": families, "steps": lengths[0], "old": name, "gain": gain}
        for name in ("King James Bible", "Python documentation")
    ]
    panel(draw, controls, static)


def turned_down_explorer(measure: Callable[[float], tuple[float, float]]) -> None:
    """Turn a trained adapter up and down: what is left of the learning, and of the forgetting, live.

    Args:
        measure: the strength of the adapter, 1 as it was trained, to (learned, forgotten) in nats per token.
    """
    known = {0.0: (0.0, 0.0)}

    def draw(strength: float) -> None:
        if strength not in known:
            known[strength] = measure(strength)
        path = sorted(known)
        figure, (left, right) = canvas(width=9.5, height=3.3, columns=2)
        for n, (name, colour, style) in enumerate((("learned", "lora", "o-"), ("forgotten", "qlora", "s--"))):
            values = [known[s][n] for s in path]
            left.plot(path, values, style, color=COLOURS[colour], markersize=5)
            left.annotate(
                name, (path[-1], values[-1]), xytext=(6, 0), textcoords="offset points", color=COLOURS[colour]
            )
        left.axvline(strength, color=COLOURS["control"], linewidth=1, zorder=0)
        left.set_xlim(-0.05, 1.35 * max(path))
        finish(left, f"strength {strength:g}", "strength of the adapter", "nats per token")
        right.plot(*zip(*(known[s] for s in path)), "o-", color=COLOURS["lora"], markersize=5)
        diamond = {"color": COLOURS["gold"], "markersize": 10, "markeredgecolor": "black"}
        right.plot(*known[strength], "D", **diamond)
        learned, forgotten = known[strength]
        finish(right, f"learned {learned:.2f}, forgotten {forgotten:.2f}", "learned", "forgotten")
        display(figure)
        plt.close(figure)

    controls = {}
    if is_interactive():
        from ipywidgets import FloatSlider

        strengths = {"value": 0.5, "min": 0, "max": 1.5, "step": 0.125, "description": "adapter ×"}
        controls = {"strength": FloatSlider(continuous_update=False, **strengths, **WIDE)}
    else:
        for strength in (0.25, 0.75, 1.0):
            known[strength] = measure(strength)
    panel(draw, controls, [{"strength": 0.5}])

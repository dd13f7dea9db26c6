"""Five adapters against one for all five tasks, from the records of `recipes.multitask`.

    lines = load_multitask()
    table = summarize_multitask(lines)      # a row for each arm, set and task, and one for all tasks
    multitask_figure(table)                 # its differences with their intervals
    best_rates(lines)                       # {(arm, task): BestRate}; `at_edge` says that a walk did not end
    far_losses(lines)                       # two tasks that nobody trained on

A difference is 100 ln(loss of the arm / loss of the single adapter), in percent: losses of 0.1 and of 4 nats then count
alike in a mean over tasks. It is taken seed by seed, and its 95 % interval is over seeds (Student's t), not over
records: it says what another run would give on these records, not what other records would.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from labkit.files.reading import read_json_lines
from labkit.lab.plots import COLOURS, STYLE, finish
from labkit.paths import data_folder
from labkit.sweeps.records import mean_interval

SINGLE, BASE, ALL, MEAN = "single", "base", "all", "all tasks"
SETS = ("held", "near")
WITHOUT_ANSWER = ("prose",)  # its records end in the middle of a sentence
ARMS = {
    "multi": ("one adapter, same rank", COLOURS["lora"], "o"),
    "wide": ("one adapter, all the parameters", COLOURS["qlora"], "s"),
    "thrown": ("one adapter, rows thrown together", COLOURS["nf4"], "^"),
    "full": ("full fine-tuning", COLOURS["full"], "D"),
}
COLUMNS = (
    "arm",
    "set",
    "task",
    "single",
    "loss",
    "percent",
    "half",
    "seeds",
    "right_single",
    "right",
    "points",
    "points_half",
)


@dataclass(frozen=True)
class BestRate:
    """The learning rate at which an arm does best on the records kept for choosing it.

    Attributes:
        lr: that rate.
        at_edge: it is the lowest or the highest that was tried, so the best may lie beyond.
        scores: {rate: share of the base's loss that is left, averaged over tasks and over the seeds of all rates}.
    """

    lr: float
    at_edge: bool
    scores: dict[float, float]


def load_multitask() -> list[dict]:
    """The recorded lines, data/results/multitask.jsonl; `python -m recipes.multitask` makes them."""
    return read_json_lines(data_folder() / "results" / "multitask.jsonl")


def tasks_of(lines: Sequence[dict]) -> list[str]:
    """The trained tasks, in the order of the records."""
    return list(dict.fromkeys(line["task"] for line in lines if line["arm"] == SINGLE))


def base_of(lines: Sequence[dict]) -> dict:
    """What the untrained model gets: {task: {set: {"loss", "exact"}}}."""
    return next(line["measured"] for line in lines if line["arm"] == BASE)


def best_rates(lines: Sequence[dict]) -> dict[tuple[str, str], BestRate]:
    """{(arm, task): BestRate}; the task of an arm that trains on all is "all". Judged on "dev" alone."""
    base = base_of(lines)
    runs: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for line in lines:
        if line["arm"] == BASE:
            continue
        names = tasks_of(lines) if line["task"] == ALL else [line["task"]]
        losses = [(line["measured"][name]["dev"]["loss"], base[name]["dev"]["loss"]) for name in names]
        score = fmean(math.inf if loss is None else loss / before for loss, before in losses)
        runs.setdefault((line["arm"], line["task"]), {}).setdefault(line["lr"], {})[line["seed"]] = score
    found = {}
    for key, by_rate in runs.items():
        seeds = set.intersection(*(set(by_seed) for by_seed in by_rate.values()))
        scores = {lr: fmean(by_rate[lr][seed] for seed in seeds) for lr in sorted(by_rate)}
        lr = min(scores, key=scores.__getitem__)
        found[key] = BestRate(lr, lr in (min(scores), max(scores)), scores)
    return found


def at_best(lines: Sequence[dict], arm: str, task: str) -> dict[int, dict]:
    """What an arm gets on a task at its best rate: {seed: {set: {"loss", "exact"}}}.

    Raises:
        ValueError: no run of the arm is recorded.
    """
    rates = best_rates(lines)
    key = (arm, task if (arm, task) in rates else ALL)
    if key not in rates:
        raise ValueError(f"no run of {arm!r} on {task!r} is recorded; there are {sorted(rates)}")
    return {
        line["seed"]: line["measured"][task]
        for line in lines
        if (line["arm"], line["task"]) == key and line["lr"] == rates[key].lr
    }


def summarize_multitask(lines: Sequence[dict]) -> pd.DataFrame:
    """Each arm against the single adapters: `COLUMNS`.

    `single` and `loss` are means over seeds, in nats per token; `percent` is the difference (above 0: the arm is worse
    than the five), and `half` the half-width of its 95 % interval. `right_single` and `right` are the shares of exact
    answers, `points` their difference in percentage points (above 0: the arm is better). The task "all tasks" is the
    mean of the differences, seed by seed; prose has no exact answers, and is left out of those.
    """
    rows = []
    for arm in [arm for arm in ARMS if any(line["arm"] == arm for line in lines)]:
        for which in SETS:
            rows += compared(lines, arm, which)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def compared(lines: Sequence[dict], arm: str, which: str) -> list[dict]:
    """The rows of an arm on one set: a task each, and their mean."""
    rows: list[dict] = []
    every: dict[str, list[dict[int, float]]] = {"percent": [], "points": []}
    for task in tasks_of(lines):
        mine, single = at_best(lines, arm, task), at_best(lines, SINGLE, task)
        seeds = sorted(mine.keys() & single.keys())
        pairs = {seed: (mine[seed][which], single[seed][which]) for seed in seeds}
        percent = {seed: 100 * math.log(one["loss"] / other["loss"]) for seed, (one, other) in pairs.items()}
        row = {"arm": arm, "set": which, "task": task, "seeds": len(seeds)}
        row |= {"loss": fmean(one["loss"] for one, _ in pairs.values())}
        row |= {"single": fmean(other["loss"] for _, other in pairs.values())}
        row |= interval("percent", "half", percent)
        every["percent"].append(percent)
        if task not in WITHOUT_ANSWER:
            points = {seed: 100 * (one["exact"] - other["exact"]) for seed, (one, other) in pairs.items()}
            row |= {"right": fmean(one["exact"] for one, _ in pairs.values())}
            row |= {"right_single": fmean(other["exact"] for _, other in pairs.values())}
            row |= interval("points", "points_half", points)
            every["points"].append(points)
        rows.append(row)
    common = sorted(set.intersection(*(set(some) for some in every["percent"])))
    row = {"arm": arm, "set": which, "task": MEAN, "seeds": len(common)}
    for name, half in (("percent", "half"), ("points", "points_half")):
        row |= interval(name, half, {seed: fmean(some[seed] for some in every[name]) for seed in common})
    return [*rows, row]


def interval(name: str, half: str, by_seed: dict[int, float]) -> dict[str, float]:
    """{name: mean, half: half-width of its 95 % interval} over seeds."""
    return dict(zip((name, half), mean_interval(list(by_seed.values()))))


def far_losses(lines: Sequence[dict]) -> pd.DataFrame:
    """The loss on tasks that nobody trained on, in nats per token, at each arm's best rate: columns `arm` (a single
    adapter is "single: TASK"), `task`, `loss` and `half`, the half-width of its interval over seeds. The base, whose
    row comes first, has no seeds.
    """
    base, tasks = base_of(lines), tasks_of(lines)
    rows = []
    for task in [name for name in base if name not in tasks]:
        rows.append({"arm": BASE, "task": task, "loss": base[task]["near"]["loss"], "half": 0.0})
        for (arm, trained), rate in best_rates(lines).items():
            losses = [
                line["measured"][task]["near"]["loss"]
                for line in lines
                if (line["arm"], line["task"], line["lr"]) == (arm, trained, rate.lr)
            ]
            name = f"{arm}: {trained}" if arm == SINGLE else arm
            mean, half = mean_interval(losses)
            rows.append({"arm": name, "task": task, "loss": mean, "half": half})
    return pd.DataFrame(rows)


def multitask_figure(table: pd.DataFrame, arms: Sequence[str] = ("multi", "wide", "full")) -> Figure:
    """How much worse than a single adapter, in percent of the loss: a row for each task, a panel for each set.

    Args:
        table: of `summarize_multitask`.
        arms: which are drawn; keys of `ARMS`.

    Raises:
        ValueError: an arm is not in the table.
    """
    missing = sorted(set(arms) - set(table["arm"]))
    if missing:
        raise ValueError(
            f"no runs of {', '.join(missing)} are in the table; it has {', '.join(table['arm'].unique())}"
        )
    plt.rcParams.update(STYLE)
    tasks = list(dict.fromkeys(table["task"]))
    figure, panels = plt.subplots(
        1, 2, figsize=(8.4, 0.62 * len(tasks) + 1.3), layout="constrained", sharey=True
    )
    titles = {"held": "like the training records", "near": "an edge case that none has seen"}
    for axes, which in zip(panels, SETS):
        axes.axvline(0, color=COLOURS["base"], linewidth=1)
        for place, arm in enumerate(arms):
            label, colour, marker = ARMS[arm]
            some = table[(table["arm"] == arm) & (table["set"] == which)].set_index("task").loc[tasks]
            heights = [row + (place - (len(arms) - 1) / 2) * 0.22 for row in range(len(tasks))]
            look = {"color": colour, "marker": marker, "linestyle": "", "markersize": 5, "capsize": 2}
            axes.errorbar(some["percent"], heights, xerr=some["half"].fillna(0), label=label, **look)
        finish(axes, titles[which], "loss beyond the single adapter's, percent", "")
        axes.axhline(len(tasks) - 1.5, color=COLOURS["control"], linewidth=0.8, linestyle=":")
    panels[0].set_yticks(range(len(tasks)), tasks)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), frameon=False
    )
    return figure

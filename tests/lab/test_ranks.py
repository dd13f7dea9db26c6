"""The furniture of `04_rank_alpha_targets`: checks that name mistakes, and the explorer of recorded
sweeps.
"""

import math
import statistics
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from scipy import stats

import labkit
from labkit.lab.check import NotYet
from labkit.lab.check import ranks as check
from labkit.lab.explore import ranks as explore
from labkit.lab.plots import COLOURS
from labkit.sweeps.records import mean_interval
from tests.lab import exercise_checks, explorers


def counted(shapes, targets, layers, r):
    """Counted, not derived: what `add_lora` trains in a block, once per layer."""
    with torch.device("meta"):
        linears = {name: torch.nn.Linear(i, o, bias=False) for name, (o, i) in shapes.items()}
        block = labkit.add_lora(torch.nn.ModuleDict(linears), labkit.LoRAConfig(r=r, targets=targets))
    return layers * labkit.trainable(block).trainable


def by_trying(shapes, targets, layers, budget):
    one = counted(shapes, targets, layers, 1)
    return max(r for r in range(1, 400) if r * one <= budget)


def sides(shapes, names):
    return sum(sum(shapes[n]) for n in names)


def by_scipy(values):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return (low + high) / 2, (high - low) / 2


@cache
def student(freedom, quantile=0.975):
    return stats.t.ppf(quantile, freedom)


def by_polyfit(rates, losses):
    a, b, _ = np.polyfit(np.log(rates), losses, 2)
    return math.exp(-b / (2 * a))


def unbeaten(points):
    return sorted(p for p in points if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points))


def bottom(x, y):
    a, b, c = np.polyfit(x, y, 2)
    return -b / (2 * a), c - b * b / (4 * a)


def right_and_wrong():
    """Each check with the right function, and wrong ones with what the message must say."""
    z, half = stats.norm.ppf(0.975), lambda v: student(len(v) - 1) * stats.sem(v)
    yield (
        check.target_parameters,
        counted,
        [
            (lambda s, t, n, r: n * r * sides(s, s), "every matrix of the block"),
            (lambda s, t, n, r: r * sides(s, t), "that is one block"),
            (lambda s, t, n, r: n * sides(s, t), "rank is missing"),
            (lambda s, t, n, r: 2 * n * r * sides(s, t), "twice the number"),
            (lambda s, t, n, r: n * sum(s[x][0] * s[x][1] for x in t), "which LoRA freezes"),
            (lambda s, t, n, r: n * r * sum(s[x][0] * s[x][1] for x in t), "multiplies the two sides"),
            (lambda s, t, n, r: n * r * sum(s[x][1] for x in t), "A alone"),
            (lambda s, t, n, r: n * r * sum(s[x][0] for x in t), "B alone"),
        ],
    )
    yield (
        check.rank_for_budget,
        by_trying,
        [
            (lambda s, t, n, b: round(b / (n * sides(s, t))), "exceeds the budget"),
            (lambda s, t, n, b: math.ceil(b / (n * sides(s, t))), "exceeds the budget"),
            (lambda s, t, n, b: b / (n * sides(s, t)), "a whole number"),
            (lambda s, t, n, b: b // sides(s, t), "on one block"),
            (lambda s, t, n, b: b // (n * sides(s, s)), "every matrix of the block"),
            (lambda s, t, n, b: b // (2 * n * sides(s, t)), "without another factor of 2"),
            (lambda s, t, n, b: b // (n * sum(s[x][0] * s[x][1] for x in t)), "not in \\* out"),
        ],
    )
    yield (
        check.interval95,
        by_scipy,
        [
            (lambda v: (np.mean(v), z * stats.sem(v)), "1.96 is for many values"),
            (lambda v: (np.mean(v), half(v) * math.sqrt(len(v))), "√n is missing"),
            (
                lambda v: (np.mean(v), half(v) * math.sqrt((len(v) - 1) / len(v))),
                "divide the sum of squares by n - 1",
            ),
            (
                lambda v: (np.mean(v), z * stats.sem(v, ddof=0)),
                "use Student's t instead of 1.96, and divide",
            ),
            (lambda v: (np.mean(v), student(len(v) - 1, 0.95) * stats.sem(v)), "0.975, not 0.95"),
            (
                lambda v: (np.mean(v), student(len(v)) * stats.sem(v)),
                "n - 1 degrees of freedom, not n",
            ),
            (lambda v: (np.mean(v), 2 * half(v)), "whole width"),
            (lambda v: (np.mean(v), statistics.stdev(v)), "that is the standard deviation"),
            (lambda v: (np.mean(v), stats.sem(v)), "that is the standard error"),
            (lambda v: (np.mean(v) - half(v), np.mean(v) + half(v)), "the ends of the interval"),
        ],
    )
    yield (
        check.best_rate,
        by_polyfit,
        [
            (lambda r, y: min(zip(y, r))[1], "best of the three that were tried"),
            (lambda r, y: bottom(r, y)[0], "in the rate itself"),
            (lambda r, y: bottom(np.log(r), y)[0], "take exp of it"),
            (lambda r, y: bottom(np.log10(r), y)[0], "10 to that power"),
            (lambda r, y: math.exp(bottom(np.log10(r), y)[0]), r"use 10 \*\* x"),
            (lambda r, y: math.exp(-bottom(np.log(r), y)[0]), r"yours is at \+b"),
            (lambda r, y: math.exp(2 * bottom(np.log(r), y)[0]), "yours is at -b / a"),
            (lambda r, y: bottom(np.log(r), y)[1], "loss at the bottom"),
        ],
    )
    yield (
        check.pareto_front,
        unbeaten,
        [
            (
                lambda p: sorted(x for x in p if not any(o[0] < x[0] and o[1] < x[1] for o in p)),
                "equal in one and worse in the other",
            ),
            (
                lambda p: [x for x in sorted(p) if all(x[1] <= o[1] for o in p if o < x)],
                "same loss at a higher cost",
            ),
            (
                lambda p: [x for x in p if not any(o[0] <= x[0] and o[1] <= x[1] for o in p)],
                "nothing is left",
            ),
            (lambda p: sorted(set(p) - set(unbeaten(p))), "those are the points that are beaten"),
            (lambda p: unbeaten(p)[::-1], "yours falls"),
            (lambda p: [min(p, key=lambda x: (x[1], x[0]))], "only the point of lowest loss"),
            (
                lambda p: sorted(
                    x for x in p if not any(o != x and o[0] <= x[0] and o[1] >= x[1] for o in p)
                ),
                "higher loss is worse",
            ),
        ],
    )


(
    test_a_check_accepts_the_solution_and_names_each_mistake,
    test_a_check_survives_stubs_exceptions_and_nonsense,
) = exercise_checks.tests_of(list(right_and_wrong()))


def test_the_interval_of_the_exercise_is_that_of_the_sweeps(capsys):
    check.interval95(mean_interval)
    assert "correct" in capsys.readouterr().out


def test_a_front_that_is_right_but_unsorted_is_told_so():
    for _ in range(20):
        with pytest.raises(NotYet, match="sort them|yours falls"):
            check.pareto_front(lambda points: [p for p in points if p in unbeaten(points)])


# The explorer


def runs(**changes):
    """Three seeds of one configuration; the validation and the test loss prefer different learning rates."""
    base = {"r": 8, "alpha": 16, "targets": "all-linear", "variant": "lora", "lr": 0.01, "parameters": 1000}
    row = base | changes
    lowest = 0.01 if row["r"] < 32 else 0.02
    validation = 3 + abs(math.log(row["lr"] / lowest)) - 0.1 * math.log(row["r"])
    return [
        row | {"seed": seed, "validation_loss": validation, "test_loss": validation + [0.1, 0.2, 0.6][seed]}
        for seed in range(3)
    ]


FRAME = pd.DataFrame(
    [row for r in (1, 8, 32) for lr in (0.005, 0.01, 0.02) for row in runs(r=r, lr=lr, parameters=125 * r)]
    + [row for alpha in (4, 64) for lr in (0.005, 0.01) for row in runs(alpha=alpha, lr=lr)]
    + [row for lr in (0.01, 0.02) for row in runs(targets=".*(q_proj|v_proj)", r=40, lr=lr, parameters=990)]
    + runs(targets="mlp", r=8, lr=0.01, parameters=500)
    + runs(variant="rslora", r=16)
)
REFERENCE = {"r": 8, "alpha": 16, "targets": "all-linear", "variant": "lora"}
LOSSES = {"test_loss": "nats per token", "validation_loss": "nats per token"}
SWEEP = explore.RecordedSweep(FRAME, REFERENCE, LOSSES)


def explorer_of(sweep=SWEEP, lines=None):
    return explorers.Explorer(explore, lambda: explore.sweep_explorer({"prose": sweep}, lines))


@pytest.fixture(scope="module")
def explorer():
    return explorer_of()


def mean_line(axes):
    """{x: y} of the line through the means."""
    (line,) = [line for line in axes.lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    return dict(zip(line.get_xdata(), line.get_ydata()))


def test_an_axis_varies_one_setting_and_holds_the_others_at_the_reference():
    # not rsLoRA's 16, nor the 40 of other targets
    assert set(explore.along(SWEEP, "rank")["r"]) == {1, 8, 32}
    assert set(explore.along(SWEEP, "alpha")["alpha"]) == {4, 16, 64}
    rates = explore.along(SWEEP, "learning rate")
    assert set(rates["lr"]) == {0.005, 0.01, 0.02} and len(rates) == 9


def test_targets_are_compared_at_equal_parameters_only():
    kept = explore.along(SWEEP, "targets")
    assert set(kept["targets"]) == {"all-linear", ".*(q_proj|v_proj)"}  # the MLP has half as many
    assert set(kept["parameters"]) == {1000, 990}


def test_the_best_rate_is_chosen_on_validation_and_for_each_value():
    best = explore.at_rate(explore.along(SWEEP, "rank"), "r", explore.BEST, "validation_loss")
    assert best.groupby("r")["lr"].unique().map(list).to_dict() == {1: [0.01], 8: [0.01], 32: [0.02]}
    assert len(best) == 9
    misled = FRAME.assign(validation_loss=-FRAME["validation_loss"])
    other = explore.at_rate(misled[misled["r"] == 1], "r", explore.BEST, "validation_loss")
    assert set(other["lr"]) == {0.005}  # another validation loss, another choice, whatever the test loss says


def test_the_curve_is_the_mean_over_the_seeds_that_are_asked_for(explorer):
    for seeds, above in ((3, 0.3), (2, 0.15), (1, 0.1)):
        figure = explorer.figure(seeds=seeds)
        expected = {r: 3 - 0.1 * math.log(r) + above for r in (1, 8, 32)}
        assert mean_line(figure.axes[0]) == pytest.approx(expected)
        assert f"{seeds} seed" in explorers.title(figure)
    fixed = explorer.figure(rate=0.005)
    assert mean_line(fixed.axes[0])[1] == pytest.approx(3 + math.log(2) + 0.3)


def test_every_point_says_its_learning_rate(explorer):
    texts = [text.get_text() for text in explorer.figure().axes[0].texts]
    assert texts.count("lr 0.01") == 2 and texts.count("lr 0.02") == 1


def test_targets_are_rows_from_low_to_high(explorer):
    labels = [label.get_text() for label in explorer.figure(axis="targets").axes[0].get_yticklabels()]
    assert labels == ["q, v, r 40, lr 0.02", "all-linear, r 8, lr 0.01"]


def test_what_no_run_varies_is_said_instead_of_drawn(explorer):
    one = explore.RecordedSweep(FRAME[FRAME["alpha"] == 16], REFERENCE, LOSSES)
    figure = explorer_of(one).figure(axis="alpha")
    assert "vary alpha" in figure.axes[0].texts[0].get_text() and not figure.axes[0].lines
    assert "vary rank" in explorer.figure(rate=0.3).axes[0].texts[0].get_text()


def test_lines_stand_where_they_belong_and_a_foreign_metric_falls_back():
    with_lines = explorer_of(lines={"prose": {"test_loss": {"base": (5.0, "base")}}})
    figure = with_lines.figure(metric="execution")
    (line,) = [x for x in figure.axes[0].lines if to_hex(x.get_color()) == COLOURS["base"]]
    assert set(line.get_ydata()) == {5.0} and "test loss" in explorers.title(figure)
    figure = with_lines.figure(metric="validation_loss")
    assert not [x for x in figure.axes[0].lines if to_hex(x.get_color()) == COLOURS["base"]]


def test_runs_that_diverged_are_left_out_of_the_curve():
    frame = FRAME.copy()
    frame.loc[(frame["r"] == 1) & (frame["seed"] == 2), ["test_loss", "validation_loss"]] = math.nan
    figure = explorer_of(explore.RecordedSweep(frame, REFERENCE, LOSSES)).figure()
    assert mean_line(figure.axes[0])[1] == pytest.approx(3 + 0.15)


@pytest.mark.parametrize("axis", explore.AXES)
@pytest.mark.parametrize("rate", [explore.BEST, 0.01])
def test_the_explorer_draws_every_axis_rate_and_number_of_seeds(explorer, axis, rate):
    for seeds in (1, 2, 3):
        figure = explorer.figure(axis=axis, rate=rate, seeds=seeds)
        said = [text.get_text() for text in figure.axes[0].texts]
        assert f"{seeds} seed" in explorers.title(figure) or any(f"vary {axis}" in text for text in said)


def test_headless_every_task_is_drawn_and_each_argument_has_a_control():
    two = {"prose": SWEEP, "SQL": explore.RecordedSweep(FRAME, REFERENCE, {"validation_loss": "nats"})}
    figures = explorers.shown(explore, lambda: explore.sweep_explorer(two))
    assert [explorers.title(figure).partition(":")[0] for figure in figures] == ["prose", "SQL"]
    explorer = explorers.Explorer(explore, lambda: explore.sweep_explorer(two), interactive=True)
    assert set(explorer.controls) == {"task", "axis", "metric", "rate", "seeds"}


def test_the_explorer_needs_runs():
    with pytest.raises(ValueError, match="sweeps is empty"):
        explore.sweep_explorer({})

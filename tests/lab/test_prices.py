"""What a trainer's defaults cost: prices paired by seed, their intervals, the table and the picture."""

import numpy as np
import pytest
from scipy import stats

from labkit.lab.figures import prices as figures
from labkit.sweeps.records import paired_interval

SEEDS = (0, 1, 2)


def line(setting, seed, loss, right, **more):
    return {
        "setting": setting,
        "seed": seed,
        "held_out_loss": loss,
        "fields_right": right,
        "exact_match": float(np.mean([n == 6 for n in right])),
        "steps": 20,
        "parameters": 100,
        "cpu_seconds": 10.0 + seed,
        "peak_bytes": 2_000_000_000,
    } | more


@pytest.fixture
def lines():
    draw = np.random.default_rng(1)
    made = []
    for setting, gap in (("lr 2e-5", 1.5), ("reference", 0.0), ("dropout", 0.0)):
        for seed in SEEDS:
            right = draw.integers(0, 4 if gap else 7, size=30).tolist()
            made.append(
                line(
                    setting,
                    seed,
                    0.4 + gap + draw.normal(0, 0.01),
                    right,
                    cpu_seconds=(1 + gap) * (10 + seed),
                )
            )
    return made


def test_a_price_is_the_mean_difference_over_seeds_with_the_paired_t_interval(lines):
    reference, slow, dropout = figures.price_all(lines)
    assert (reference.setting, reference.loss_change) == ("reference", (0, 0, 0))
    ours, theirs = (
        [one["held_out_loss"] for one in lines if one["setting"] == s] for s in ("lr 2e-5", "reference")
    )
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert slow.loss_change == pytest.approx((np.subtract(ours, theirs).mean(), wanted.low, wanted.high))
    assert slow.shows and not dropout.shows
    assert slow.cpu == pytest.approx(2.5)


def test_the_interval_of_whole_answers_is_that_of_runs_that_keep_what_was_wrong():
    """With one field a ticket, the fields right and the items right are the same numbers."""
    draw = np.random.default_rng(0)
    right = {name: draw.random((3, 50)) < share for name, share in (("reference", 0.5), ("new", 0.7))}
    made = [
        line(name, seed, 1.0, (6 * row).tolist())
        for name, rows in right.items()
        for seed, row in enumerate(rows)
    ]
    runs = {
        name: [{"config": {"seed": s}, "wrong": np.flatnonzero(~row).tolist()} for s, row in enumerate(rows)]
        for name, rows in right.items()
    }
    assert figures.price_all(made)[1].fields_change == pytest.approx(
        paired_interval(runs["new"], runs["reference"], 50)
    )


def test_only_seeds_that_both_have_are_compared_and_a_single_one_has_no_interval(lines):
    kept = [one for one in lines if one["setting"] == "reference" or one["seed"] == 1]
    _, slow, _ = figures.price_all(kept)
    assert slow.seeds == (1,)
    assert np.isnan(slow.loss_change[1:]).all() and np.isnan(slow.fields_change[1:]).all() and not slow.shows
    table = figures.price_table(kept)
    assert table.loc["lr 2e-5", "against the reference"] == f"{slow.loss_change[0]:+.3f}"
    others = [one | {"seed": 10 + one["seed"]} if one["setting"] == "dropout" else one for one in lines]
    assert [one.setting for one in figures.price_all(others)] == ["reference", "lr 2e-5"]


def test_the_table_gives_each_setting_its_difference_and_its_ends(lines):
    table = figures.price_table(lines)
    assert list(table.index) == ["reference", "lr 2e-5", "dropout"]
    assert table.loc["reference", "against the reference"] == ""
    assert table.loc["lr 2e-5", "against the reference"].startswith("+1.")
    assert " to " in table.loc["lr 2e-5", "points"]


def test_a_run_that_diverged_leaves_no_number_and_no_false_one(lines):
    lines[0]["held_out_loss"] = None
    slow = figures.price_all(lines)[1]
    assert np.isnan(slow.loss) and not slow.shows
    figures.price_figure(lines)


def test_the_figure_has_a_row_for_each_setting_and_a_dot_for_each_seed(lines):
    left, right = figures.price_figure(lines).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["reference", "lr 2e-5", "dropout"]
    assert left.get_xscale() == "log"
    for axes in (left, right):
        assert [len(drawn.get_xdata()) for drawn in axes.lines if drawn.get_marker() == "o"] == [3, 3, 3]
    filled = [drawn.get_fillstyle() for drawn in left.lines if drawn.get_marker() == "o"]
    assert filled == ["full", "full", "none"]


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            lambda lines: [one for one in lines if one["setting"] != "reference"],
            "no line has the setting 'reference'",
        ),
        (lambda lines: [*lines, lines[0]], "'lr 2e-5' is recorded twice with seed 0"),
    ],
)
def test_a_record_that_cannot_be_priced_says_why(lines, broken, message):
    with pytest.raises(ValueError, match=message):
        figures.price_all(broken(lines))

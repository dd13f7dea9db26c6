"""Five adapters against one: rates are chosen on their own records, and differences are taken seed by seed."""

import math

import pytest
from scipy import stats

from labkit.lab.figures import multitask

BEFORE = 4.0


def line(arm: str, task: str, lr: float, seed: int, dev: float, held: float, exact: float = 0.5) -> dict:
    names = ("orders", "prose") if task == "all" else (task,)
    of = {"dev": dev, "held": held, "near": 2 * held}
    measured = {name: {s: {"loss": loss, "exact": exact} for s, loss in of.items()} for name in names}
    measured["trails"] = {"near": {"loss": 5 + held}}
    return {"arm": arm, "task": task, "lr": lr, "seed": seed, "measured": measured}


@pytest.fixture
def lines():
    """The higher rate is better on held, the lower one on dev; the one adapter loses 1, 2 and 3 percent."""
    made = [line("base", "all", 0.0, 0, BEFORE, BEFORE, 0.0)]
    for seed in range(3):
        for task in ("orders", "prose"):
            made += [
                line("single", task, lr, seed, dev, 1.0) for lr, dev in ((1e-3, 3), (2e-3, 1), (4e-3, 2))
            ]
        worse = math.exp((seed + 1) / 100)
        made += [
            line("multi", "all", 1e-3, seed, 1.0, worse, 0.25),
            line("multi", "all", 2e-3, seed, 2.0, 0.1),
        ]
    return made


def test_the_rate_is_chosen_on_dev_and_an_optimum_at_the_edge_is_said(lines):
    rates = multitask.best_rates(lines)
    assert rates["single", "orders"].lr == 2e-3 and not rates["single", "orders"].at_edge
    assert rates["multi", "all"].lr == 1e-3 and rates["multi", "all"].at_edge
    assert rates["multi", "all"].scores == pytest.approx({1e-3: 1 / BEFORE, 2e-3: 2 / BEFORE})


def test_seeds_that_only_the_best_rate_has_do_not_choose_it(lines):
    lucky = [line("single", "orders", 4e-3, seed, 1e-6, 1.0) for seed in (3, 4)]
    assert multitask.best_rates(lines + lucky)["single", "orders"].lr == 2e-3
    assert len(multitask.at_best([*lines, line("single", "orders", 2e-3, 3, 1, 1)], "single", "orders")) == 4


def test_a_rate_at_which_the_loss_was_not_finite_is_never_the_best(lines):
    for one in lines:
        if one["arm"] == "multi" and one["lr"] == 1e-3 and one["seed"] == 0:
            one["measured"]["prose"]["dev"]["loss"] = None
    assert multitask.best_rates(lines)["multi", "all"].lr == 2e-3


def test_differences_are_paired_by_seed_with_the_interval_of_scipy(lines):
    table = multitask.summarize_multitask(lines).set_index(["set", "task"])
    row = table.loc[("held", "all tasks")]
    interval = stats.ttest_1samp([1.0, 2.0, 3.0], 0).confidence_interval()
    assert row["percent"] == pytest.approx(2) and row["half"] == pytest.approx(
        (interval.high - interval.low) / 2
    )
    assert table.loc[("near", "orders"), "loss"] == pytest.approx(2 * table.loc[("held", "orders"), "loss"])
    assert row["points"] == pytest.approx(-25) and math.isnan(table.loc[("held", "prose"), "points"])


def test_seeds_without_a_partner_are_left_out(lines):
    table = multitask.summarize_multitask([*lines, line("multi", "all", 1e-3, 3, 1.0, 9.0)])
    assert set(table["seeds"]) == {3} and table["percent"].max() == pytest.approx(2)


def test_far_tasks_have_a_row_for_the_base_and_for_each_adapter(lines):
    table = multitask.far_losses(lines).set_index("arm")
    assert list(table.index) == ["base", "single: orders", "single: prose", "multi"]
    assert table.loc["single: orders", "loss"] == 6 and table.loc["base", "loss"] == 5 + BEFORE


def test_an_arm_without_runs_is_named(lines):
    table = multitask.summarize_multitask(lines)
    with pytest.raises(ValueError, match="no runs of full are in the table; it has multi"):
        multitask.multitask_figure(table, ("multi", "full"))
    with pytest.raises(ValueError, match="no run of 'wide'"):
        multitask.at_best(lines, "wide", "orders")


def test_the_figure_shows_every_difference(lines):
    table = multitask.summarize_multitask(lines)
    panels = multitask.multitask_figure(table, ("multi",)).axes
    for axes, which in zip(panels, multitask.SETS):
        drawn = axes.containers[0].lines[0].get_xdata()
        assert list(drawn) == pytest.approx(list(table[table["set"] == which]["percent"]))

"""A valley of learning rates is bracketed by worse ones, or it is none."""

import math
from dataclasses import asdict, replace

import pytest

from labkit.sweeps.config import RunConfig
from labkit.sweeps.records import Results, load_recorded
from labkit.sweeps.valleys import SWEEPS, recorded_valley, valley_between, valley_of

RUN = RunConfig(alpha=16, r=8)


def swept(losses: dict[float, float | None], **settings) -> Results:
    """Two seeds of each rate; None is a run that diverged."""
    runs = [
        (replace(RUN, lr=lr, seed=seed, **settings), loss) for lr, loss in losses.items() for seed in (0, 1)
    ]
    return Results(
        [
            {"config": asdict(config)}
            | ({"status": "diverged"} if loss is None else {"metrics": {"validation_loss": loss}})
            for config, loss in runs
        ]
    )


def test_it_reaches_halfway_to_the_worse_rates_on_either_side():
    found = valley_of(swept({1e-3: 2.0, 2e-3: 1.005, 4e-3: 1.0, 8e-3: None}))
    assert (found.best, found.seeds) == (4e-3, 2)
    assert found.low == pytest.approx(math.sqrt(2e-6)) and found.high == pytest.approx(math.sqrt(32e-6))
    assert found.losses[8e-3] == math.inf


@pytest.mark.parametrize(
    "losses", [{1e-3: 1.0, 2e-3: 2.0}, {1e-3: 2.0, 2e-3: 1.0}, {1e-3: 1.005, 2e-3: 1.0, 4e-3: 2.0}]
)
def test_at_the_edge_of_what_was_tried_there_is_none(losses):
    assert valley_of(swept(losses)) is None


def test_rates_are_given_for_alpha_twice_r():
    losses = {1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}
    plain, double = valley_of(swept(losses)), valley_of(swept(losses, alpha=32))
    assert double.best == 2 * plain.best and double.low == pytest.approx(2 * plain.low)


def test_runs_that_differ_in_more_must_be_chosen_from():
    with pytest.raises(ValueError, match="differ in r too"):
        valley_of(load_recorded("rank"))
    with pytest.raises(ValueError, match="no recorded run has"):
        valley_of(load_recorded("rank"), r=3)


@pytest.mark.parametrize(("model", "method", "task"), SWEEPS, ids="-".join)
def test_every_sweep_that_is_named_has_a_valley_with_three_seeds(model, method, task):
    found = recorded_valley(task, model, method)
    assert found.low < found.best < found.high and found.seeds >= 3


def test_where_nothing_was_swept_there_is_none():
    assert recorded_valley("facts", "tiny-llama", "lora") is None


def test_where_seeds_differ_much_a_rate_is_good_until_it_is_measurably_worse():
    found = {1e-3: [3.0, 2.0], 2e-3: [1.3, 0.9], 4e-3: [1.0, 1.0], 8e-3: [2.0, math.inf]}
    strict, wide = valley_between(found), valley_between(found, errors=2.0)
    assert strict.best == wide.best == 4e-3 and strict.high == wide.high
    assert strict.low == pytest.approx(math.sqrt(8e-6)) and wide.low == pytest.approx(math.sqrt(2e-6))

"""What a run leaves behind: records that are plain dicts, and a table of them."""

import json

import pytest

from labkit.training.history import EvaluationRecord, History, StepRecord


def make_history() -> History:
    same = {"lr": 1e-3, "grad_norm": 1.0, "tokens": 50, "supervised": 20, "seconds": 0.5}
    steps = [StepRecord(step=i, loss=4.0 / i, **same) for i in (1, 2, 4)]
    return History(steps, [EvaluationRecord(step=2, loss=3.0, tokens=99)], left_out=[7])


def test_sums_and_speed_are_over_the_steps():
    history = make_history()
    assert history.losses == [4.0, 2.0, 1.0]
    assert history.seconds == 1.5 and history.tokens_per_second == pytest.approx(100)
    assert History().tokens_per_second == 0 and History().losses == []


def test_records_are_dicts_that_json_keeps():
    history = make_history()
    assert json.loads(json.dumps(history.steps)) == history.steps
    assert json.loads(json.dumps(history.evals)) == history.evals
    assert list(history.steps[0]) == ["step", "loss", "lr", "grad_norm", "tokens", "supervised", "seconds"]


def test_the_table_has_the_held_out_loss_where_it_was_measured():
    frame = make_history().to_frame()
    assert frame["loss"].tolist() == [4.0, 2.0, 1.0]
    assert frame["held_out"].isna().tolist() == [True, False, True] and frame["held_out"][1] == 3.0

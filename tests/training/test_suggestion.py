"""Settings for unknown data: within the minutes, with a reason for each, and honest about what is too little."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.training import suggestion
from labkit.training.config import TrainConfig
from labkit.training.suggestion import (
    BATCHES,
    EVALUATIONS,
    KEPT_BACK,
    MOST_PASSES,
    measure_speed,
    share_to_hold_out,
    suggest_settings,
)
from tests.training.small_runs import SHORT, tiny_adapted, weights


def steps_of(n, passes, batch):
    return passes * math.ceil(n / batch)


def test_few_records_are_seen_more_often_than_many():
    passes = [suggest_settings([50] * n).passes for n in (20, 100, 400, 5000)]
    assert passes == sorted(passes, reverse=True) and passes[0] == MOST_PASSES and passes[-1] == 1


def test_batches_grow_with_the_data():
    assert [suggest_settings([50] * n).training.batch_size for n in (16, 80, 5000)] == [2, 4, 8]


def test_a_suggestion_is_what_train_takes_and_every_setting_has_a_reason():
    found = suggest_settings([30, 40] * 100, held_out=[50] * 20)
    assert isinstance(found.training, TrainConfig) and found.training.eval_every
    assert set(found.reasons) == {"steps", "batch_size", "lr", "max_length", "r"} and all(
        found.reasons.values()
    )
    assert found.training.max_length == 50 and found.notes == []
    assert suggest_settings([30, 40] * 100).training.eval_every is None


@given(
    n=st.integers(1, 3000),
    length=st.integers(4, 400),
    held_out=st.integers(0, 100),
    minutes=st.floats(0.05, 60),
    speed=st.floats(5, 5000),
)
def test_a_run_fits_its_minutes_or_says_that_nothing_does(n, length, held_out, minutes, speed):
    found = suggest_settings([length] * n, minutes, speed, [length] * held_out)
    config = found.training
    per_pass = math.ceil(n / config.batch_size)
    tokens = config.steps / per_pass * n * length + EVALUATIONS * held_out * length / 2
    fits = tokens <= (1 - KEPT_BACK) * minutes * 60 * speed * (1 + 1e-9)
    assert fits or config.steps == 1
    assert found.passes == pytest.approx(config.steps / per_pass) and 0 < found.passes <= MOST_PASSES
    assert found.training.batch_size in BATCHES


def test_a_budget_that_holds_no_whole_pass_says_how_many_minutes_would():
    records, speed = [60] * 1000, 100
    found = suggest_settings(records, minutes=2, tokens_per_second=speed)
    assert found.passes == pytest.approx(0.9 * 2 * 60 * 100 / 60_000, abs=0.01)
    (note,) = found.notes
    assert "82% of the records are never seen" in note and "11.2 min hold one" in note
    enough = suggest_settings(records, minutes=11.2, tokens_per_second=speed)
    assert enough.passes == 1 and enough.notes == []


def test_a_budget_that_holds_some_passes_says_how_many_minutes_hold_all():
    found = suggest_settings([60] * 250, minutes=4, tokens_per_second=100)
    (note,) = found.notes
    assert "hold 1.4 passes" in note and "8.4 min hold all of 3 passes" in note
    assert suggest_settings([60] * 250, minutes=8.4, tokens_per_second=100).passes == 3


def test_twenty_lines_get_more_passes_fewer_held_out_and_a_warning():
    assert share_to_hold_out(20) * 20 == 4 and share_to_hold_out(5000) * 5000 == 100
    found = suggest_settings([40] * 16, minutes=3, tokens_per_second=200, held_out=[40] * 4)
    assert found.passes == MOST_PASSES and found.training.batch_size == 2 and found.training.steps == 80
    assert "interval of any result is wide" in found.notes[0] and "4 held out" in found.notes[0]


def test_few_steps_are_said_to_teach_little():
    found = suggest_settings([40] * 400, minutes=0.1, tokens_per_second=100)
    assert any("teach little" in note for note in found.notes)


def test_records_beyond_the_context_are_counted_and_not_cut():
    found = suggest_settings([100] * 90 + [5000] * 10, context=2048)
    assert found.training.max_length == 2048
    assert found.notes == ["10 of 100 training records do not fit into 2048 tokens"]
    with pytest.raises(ValueError, match="all 3 training records are longer"):
        suggest_settings([5000] * 3, context=2048)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lengths": []}, "no records"),
        ({"lengths": [0]}, "length=0"),
        ({"lengths": [5], "minutes": 0}, "minutes=0"),
        ({"lengths": [5], "tokens_per_second": math.nan}, "tokens_per_second=nan"),
        ({"lengths": [5], "held_out": [2.5]}, "length=2.5"),
    ],
    ids=["none", "zero", "minutes", "speed", "fraction"],
)
def test_what_no_run_can_be_made_of_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        suggest_settings(**arguments)


def test_measuring_the_speed_leaves_the_model_and_the_random_numbers_as_they_were(tiny):
    model = tiny_adapted(dropout=0.1)
    before = weights(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    speed = measure_speed(model, tiny[1], SHORT, TrainConfig(lr=1e-2, batch_size=2, eval_every=1, epochs=3))
    assert speed > 0 and torch.equal(weights(model), before) and torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())


def test_the_warm_up_step_does_not_count(tiny, monkeypatch):
    history = type(
        "History", (), {"steps": [{"tokens": 10, "seconds": 90.0}, {"tokens": 30, "seconds": 0.5}]}
    )
    monkeypatch.setattr(suggestion, "train", lambda *arguments: history)
    assert measure_speed(tiny_adapted(), tiny[1], SHORT, TrainConfig(), steps=1) == 60


def test_an_error_while_measuring_leaves_the_model_as_it_was(tiny, monkeypatch):
    model = tiny_adapted()
    before = weights(model)

    def spoil(model, *arguments):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(suggestion, "train", spoil)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_speed(model, tiny[1], SHORT, TrainConfig())
    assert torch.equal(weights(model), before)

"""Steering a run: it stands and ends between two steps, and a hand that does nothing changes no bit."""

import threading

import pytest
import torch

from labkit.training.config import TrainConfig, learning_rate
from labkit.training.control import TrainControl
from labkit.training.history import TrainingDiverged
from labkit.training.loop import train
from tests.training.small_runs import QUIET, SHORT, tiny_adapted, weights

LONGEST = 30  # seconds that a test waits for another thread before it fails
CONFIG = TrainConfig(**QUIET)


class Background:
    """`train` in a thread of its own; its control stops it at certain steps, so that nothing depends on time."""

    def __init__(self, model, tokenizer, config=CONFIG, pause_after=(), **more):
        self.model, self.stands = model, threading.Event()

        def see(history):
            if self.control.state == "paused":
                self.stands.set()
            elif len(history.steps) in pause_after and not self.stands.is_set():
                self.control.pause()

        self.control = TrainControl(see)
        arguments = (model, tokenizer, SHORT, config)
        self.thread = threading.Thread(
            target=train, args=arguments, kwargs={"control": self.control, **more}, daemon=True
        )
        self.thread.start()

    def wait_until_it_stands(self):
        assert self.stands.wait(LONGEST)

    def wait_for_the_end(self):
        self.thread.join(LONGEST)
        assert not self.thread.is_alive()
        return self.control.history


def test_a_control_that_nobody_touches_changes_no_bit(tiny):
    """In this thread and in another, with dropout and evaluations."""
    config = TrainConfig(**QUIET, eval_every=2)
    results = []
    for control in (None, TrainControl(), TrainControl(lambda history: None)):
        model = tiny_adapted(dropout=0.1)
        results.append(
            (train(model, tiny[1], SHORT, config, SHORT[:2], control=control).losses, weights(model))
        )
    model = tiny_adapted(dropout=0.1)
    history = Background(model, tiny[1], config, held_out=SHORT[:2]).wait_for_the_end()
    results.append((history.losses, weights(model)))
    for losses, after in results[1:]:
        assert losses == results[0][0] and torch.equal(after, results[0][1])


def test_the_callback_sees_each_step_and_each_evaluation_as_it_comes(tiny):
    seen = []
    control = TrainControl(lambda history: seen.append((len(history.steps), len(history.evals))))
    history = train(
        tiny_adapted(), tiny[1], SHORT, TrainConfig(**QUIET, eval_every=3), SHORT[:2], control=control
    )
    assert seen == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 1), (6, 1), (6, 2)]
    assert control.history is history and control.state == "ended"


def test_a_pause_takes_no_step_and_no_time_and_changes_no_bit(tiny):
    plain = tiny_adapted()
    losses = train(plain, tiny[1], SHORT, CONFIG).losses
    run = Background(tiny_adapted(), tiny[1], pause_after=[2])
    run.wait_until_it_stands()
    before, done = weights(run.model), len(run.control.history.steps)
    assert not run.thread.join(0.3) and run.thread.is_alive() and run.control.state == "paused"
    assert len(run.control.history.steps) == done == 2 and torch.equal(weights(run.model), before)
    run.control.resume()
    history = run.wait_for_the_end()
    assert history.losses == losses and torch.equal(weights(run.model), weights(plain))
    assert history.stopped == "finished" and history.seconds == sum(row["seconds"] for row in history.steps)


@pytest.mark.parametrize("paused", [False, True])
def test_a_stop_keeps_what_there_is_and_the_next_call_goes_on_from_it(tiny, tmp_path, paused):
    config = TrainConfig(**QUIET, checkpoint_folder=tmp_path, checkpoint_every=100)
    whole = tiny_adapted()
    losses = train(whole, tiny[1], SHORT, CONFIG).losses
    model = tiny_adapted()
    if paused:
        run = Background(model, tiny[1], config, pause_after=[3])
        run.wait_until_it_stands()
        run.control.stop()
        history = run.wait_for_the_end()
    else:
        control = TrainControl(lambda history: control.stop() if len(history.steps) == 3 else None)
        history = train(model, tiny[1], SHORT, config, control=control)
    assert history.stopped == "interrupted" and history.losses == losses[:3]
    again = tiny_adapted()
    history = train(again, tiny[1], SHORT, config, control=TrainControl())
    assert history.stopped == "finished" and history.losses == losses
    assert torch.equal(weights(again), weights(whole))


def test_a_stop_before_the_first_step_and_one_after_the_last(tiny):
    control, model = TrainControl(), tiny_adapted()
    before = weights(model)
    control.stop()
    history = train(model, tiny[1], SHORT, CONFIG, control=control)
    assert history.steps == [] and history.stopped == "interrupted" and torch.equal(weights(model), before)
    control = TrainControl(lambda history: control.stop() if len(history.steps) == 6 else None)
    assert train(model, tiny[1], SHORT, CONFIG, control=control).stopped == "finished"


def test_the_multiplier_scales_the_scheduled_rate_from_the_next_step_on(tiny):
    def turn(history):
        control.lr_multiplier = {2: 0.5, 4: 0}.get(len(history.steps), control.lr_multiplier)
        seen.append(weights(model))

    seen, control, model = [], TrainControl(turn), tiny_adapted()
    history = train(model, tiny[1], SHORT, CONFIG, control=control)
    factors = [1, 1, 0.5, 0.5, 0, 0]
    assert [row["lr"] for row in history.steps] == [
        learning_rate(i, 6, CONFIG) * f for i, f in enumerate(factors)
    ]
    assert (
        not torch.equal(seen[2], seen[3]) and torch.equal(seen[3], seen[4]) and torch.equal(seen[4], seen[5])
    )


def test_a_constant_multiplier_is_another_learning_rate(tiny):
    models = tiny_adapted(), tiny_adapted()
    train(models[0], tiny[1], SHORT, CONFIG, control=TrainControl(lr_multiplier=0.5))
    train(models[1], tiny[1], SHORT, TrainConfig(**QUIET | {"lr": 0.5 * QUIET["lr"]}))
    assert torch.equal(*map(weights, models))


@pytest.mark.parametrize("value", [-0.1, 1000, float("nan"), float("inf"), True, "2", None])
def test_a_multiplier_out_of_bounds_is_refused_and_the_one_before_stays(value):
    control = TrainControl(lr_multiplier=2)
    with pytest.raises(
        ValueError, match=r"lr_multiplier=.* at least 0 and below 1000.*; 1 is the schedule's own"
    ):
        control.lr_multiplier = value
    with pytest.raises(ValueError, match="lr_multiplier"):
        TrainControl(lr_multiplier=value)
    assert control.lr_multiplier == 2


def test_an_error_in_the_callback_ends_the_run_after_a_whole_step_and_is_raised(tiny, tmp_path):
    def fail(history):
        if len(history.steps) == 2:
            raise KeyError("a typing error")

    control, model = TrainControl(fail), tiny_adapted()
    config = TrainConfig(**QUIET, checkpoint_folder=tmp_path)
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError, match="a typing error"):
        train(model, tiny[1], SHORT, config, control=control)
    assert len(control.history.steps) == 2 and control.history.stopped == "interrupted"
    assert control.state == "ended" and [module.training for module in model.modules()] == modes
    again = tiny_adapted()
    assert train(again, tiny[1], SHORT, config).losses == train(tiny_adapted(), tiny[1], SHORT, CONFIG).losses


def test_between_steps_the_run_stands_and_what_uses_the_model_changes_nothing(tiny):
    """Asked again and again while it runs; each look finds whole steps, and the run ends as without them."""
    plain = tiny_adapted()
    losses = train(plain, tiny[1], SHORT, TrainConfig(**QUIET | {"steps": 40})).losses
    model = tiny_adapted()
    run = Background(model, tiny[1], TrainConfig(**QUIET | {"steps": 40}))
    looks = 0
    while run.control.state != "ended":
        with run.control.between_steps():
            first, done = weights(model), len(run.control.history.steps) if run.control.history else 0
            with torch.no_grad():
                model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
            model.train()
            if run.control.state == "paused":
                assert torch.equal(weights(model), first) and len(run.control.history.steps) == done
                looks += 1
    assert looks and run.wait_for_the_end().losses == losses and torch.equal(weights(model), weights(plain))


def test_nobody_waits_between_steps_of_a_run_that_is_not_there(tiny):
    control = TrainControl()
    with control.between_steps():
        assert control.state == "new"
    with control.between_steps(), control.between_steps():
        pass
    inner = TrainControl(lambda history: look(inner))

    def look(control):
        with control.between_steps():  # in the thread that trains: waiting would never end
            assert control.state == "running"

    assert len(train(tiny_adapted(), tiny[1], SHORT, CONFIG, control=inner).steps) == 6
    with inner.between_steps():
        assert inner.state == "ended"


def test_a_run_that_fails_ends_its_control_and_the_error_of_the_run_is_raised(tiny):
    model, control = tiny_adapted(), TrainControl()
    model.model.norm.register_forward_hook(lambda m, _, output: output * (float("nan") if m.training else 1))
    with pytest.raises(TrainingDiverged):
        train(model, tiny[1], SHORT, CONFIG, control=control)
    assert control.state == "ended"


def test_a_control_steers_one_run(tiny):
    control, model = TrainControl(), tiny_adapted()
    train(model, tiny[1], SHORT, CONFIG, control=control)
    before = weights(model)
    with pytest.raises(ValueError, match="has steered a run already; make a new TrainControl"):
        train(model, tiny[1], SHORT, CONFIG, control=control)
    with pytest.raises(ValueError, match="control is a function, and must be a TrainControl, or None"):
        train(model, tiny[1], SHORT, CONFIG, control=lambda history: None)
    assert torch.equal(weights(model), before)

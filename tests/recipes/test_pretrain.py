"""Pretraining: a run that was killed or stopped goes on bit for bit; each step has its own windows."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.tiny_llama import pretrain, settings

MICRO = {
    **settings.ARCHITECTURE,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
STREAM = np.random.default_rng(0).integers(64, size=700).astype(np.uint16)
PLAN = settings.Plan(tokens=8 * 2 * 16, batch=2, context=16, warmup=2, lr=1e-2)  # 8 steps, decay from 6


def weights(result):
    return {name: p.detach().clone() for name, p in result[0].named_parameters()}


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole = pretrain.pretrain(STREAM, PLAN, tmp_path / "whole", MICRO, every=3)
    pretrain.pretrain(STREAM, PLAN, tmp_path / "cut", MICRO, every=3, stop_at=5)
    (tmp_path / "cut" / "part").mkdir()  # what a kill in the middle of writing leaves
    (tmp_path / "cut" / "part" / "state.safetensors").write_bytes(b"half")
    resumed = pretrain.pretrain(STREAM, PLAN, tmp_path / "cut", MICRO, every=3)
    assert resumed[1]["sessions"] == 2
    for name, one in weights(whole).items():
        assert torch.equal(one, weights(resumed)[name]), name
    rows = [
        [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in result[1]["log"]]
        for result in (whole, resumed)
    ]
    assert rows[0] == rows[1]


def test_sigterm_saves_and_stops(tmp_path, monkeypatch):
    rate = settings.Plan.rate

    def rate_and_signal(plan, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return rate(plan, step)

    monkeypatch.setattr(settings.Plan, "rate", rate_and_signal)
    _, state = pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO)
    assert state["step"] == 4 and [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_checkpoints_are_not_pickles(tmp_path):
    pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO, stop_at=1)
    assert {p.name for p in (tmp_path / "step-000001").iterdir()} == {"state.safetensors", "state.json"}


def test_the_budget_may_change_before_the_decay_and_gives_the_run_of_that_budget(tmp_path):
    longer = replace(PLAN, tokens=2 * PLAN.tokens)
    whole = pretrain.pretrain(STREAM, PLAN, tmp_path / "whole", MICRO)
    pretrain.pretrain(STREAM, longer, tmp_path / "changed", MICRO, stop_at=6)
    changed = pretrain.pretrain(STREAM, PLAN, tmp_path / "changed", MICRO)
    assert all(torch.equal(one, weights(changed)[name]) for name, one in weights(whole).items())
    with pytest.raises(ValueError, match=r"the budget cannot change .* Go on with --tokens 256"):
        pretrain.pretrain(STREAM, longer, tmp_path / "changed", MICRO)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    pretrain.pretrain(STREAM, PLAN, tmp_path, MICRO, stop_at=1)
    with pytest.raises(ValueError, match=r"another run \(lr 0.01 -> 0.02\)"):
        pretrain.pretrain(STREAM, replace(PLAN, lr=2e-2), tmp_path, MICRO)
    with pytest.raises(ValueError, match="the training text"):
        pretrain.pretrain(STREAM[::-1].copy(), PLAN, tmp_path, MICRO)


def test_an_epoch_shows_every_window_once_and_the_next_another_cut():
    stream = np.arange(700, dtype=np.uint16)
    steps = (700 - 17) // 16 // 2
    first = [settings.windows(stream, PLAN, step) for step in range(steps)]
    starts = sorted(int(row[0]) for batch in first for row in batch)
    assert np.diff(starts).tolist() == [16] * (2 * steps - 1)
    later = sorted(
        int(row[0]) for step in range(steps, 2 * steps) for row in settings.windows(stream, PLAN, step)
    )
    assert later != starts


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    plan = settings.Plan(tokens=1000 * 2048, warmup=100, decay=0.25, lr=1.0)
    rates = [plan.rate(step) for step in range(plan.steps)]
    assert rates[0] == 0.01 and rates[99:750] == [1.0] * 651
    assert np.diff(rates[750:]) == pytest.approx(-1 / 250) and rates[-1] == pytest.approx(1 / 250)

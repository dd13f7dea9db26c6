"""The closed form of what a forward pass keeps, against sums by hand and the tensors of a real step."""

from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.memory import subjects
from labkit.memory.activations import Part, saved_tensors
from labkit.memory.counting import tensors_of
from labkit.memory.formulas import decoder_of, plan
from labkit.memory.measurement import measure
from labkit.memory.setup import Setup
from labkit.models.shapes import config_of
from tests.memory.conftest import SMALL, close


def saved(method="lora", **choices):
    setup = Setup(method=method, **(dict(dtype="fp32", batch_size=2, max_length=32) | choices))
    config = config_of(SMALL)
    return list(saved_tensors(decoder_of(config, tensors_of(config, setup), setup), setup))


def test_a_block_keeps_what_the_module_docstring_says():
    T, d, f, H, G, h, r = 64, 64, 176, 4, 2, 16, 16
    got = sum(tensor.bytes for tensor in saved(r=r) if tensor.layer == 1)
    numbers = 2 * T * (d + 1) + T * (2 * H * h + 2 * G * h + H) + 3 * T * f + 2 * T * d + 7 * T * r
    assert got == 4 * numbers


def test_frozen_layers_keep_no_input_and_adapters_do():
    def bytes_of(kind, **choices):
        return sum(s.bytes for s in saved(**choices) if s.kind == kind and s.layer == 1)

    narrow, wide = dict(targets=["q_proj"]), dict(targets="all-linear")
    # down_proj's input is kept for its adapter only, and the norms' outputs
    assert bytes_of("mlp", **wide) - bytes_of("mlp", **narrow) == 4 * 64 * (176 + 3 * 16)
    assert bytes_of("norms", **wide) - bytes_of("norms", **narrow) == 4 * 64 * 64  # of the second norm


@given(max_length=st.integers(2, 200), batch_size=st.integers(1, 8), factor=st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_activations_grow_in_proportion_to_the_batch(max_length, batch_size, factor):
    def blocks(batch_size):
        kept = saved(max_length=max_length, batch_size=batch_size)
        return sum(s.bytes for s in kept if s.layer is not None)

    assert blocks(factor * batch_size) == factor * blocks(batch_size)


def test_scores_kept_by_eager_attention_grow_with_the_square_of_the_sequence():
    def scores(max_length):
        kept = saved(attention="eager", max_length=max_length)
        return sum(s.bytes for s in kept if s.part is Part.SCORES)

    assert scores(64) == 4 * scores(32) == 2 * 4 * 2 * 4 * 64**2


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_plan_knows_a_step_that_keeps_what_this_course_recomputes(monkeypatch, method):
    how = dict(dtype="fp32", r=8, batch_size=2, max_length=100, supervised=0.5)
    ours = plan("tiny-llama", method, device="cpu", **how)
    usual = plan("tiny-llama", method, device="cpu", recompute_act=False, **how)
    for module in ("loss", "chunked_loss"):
        name = f"labkit.training.{module}.recompute_activations"
        monkeypatch.setattr(name, lambda model: nullcontext())
    model = subjects.real_model("tiny-llama", Setup(method=method, **how))
    measured = measure(model, subjects.make_batch(model.config.vocab_size, 2, 100, 0.5))
    assert abs(usual["activations/mlp"] - measured["activations/mlp"]) <= 16
    assert close(usual.peak, measured.peak, 0.01)
    config = model.config
    act = 4 * 2 * 100 * config.intermediate_size * config.num_hidden_layers
    assert usual["activations/mlp"] - ours["activations/mlp"] == act

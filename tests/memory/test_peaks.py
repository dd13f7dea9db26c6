"""The closed form of the peak, held against the simulated step."""

from dataclasses import replace

import pytest

from labkit.memory import activations, peaks
from labkit.memory.activations import Part
from labkit.memory.counting import tensors_of
from labkit.memory.formulas import decoder_of, plan
from labkit.memory.setup import Setup
from labkit.memory.simulation import simulate
from labkit.models.shapes import config_of
from tests.memory.conftest import EXACT, SMALL, close

VARIATIONS = {
    "bf16, adapters in fp32": {},
    "bf16, adapters too": dict(adapter_dtype="bf16"),
    "bf16, attention only": dict(targets="attention"),
    "bf16, mlp only": dict(targets="mlp"),
    "two targets, all logits": dict(targets=["q_proj", "v_proj"], logits="all"),
    "eager attention": dict(attention="eager", dtype="fp32"),
    "embeddings train": dict(train_embeddings=True, dtype="fp32"),
    "products in bf16": dict(dtype="fp32", compute_dtype="bf16"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", VARIATIONS)
def test_plan_agrees_with_the_simulated_step_of_other_choices(name, checkpointing):
    how = (
        dict(batch_size=2, max_length=100, r=8, supervised=0.5, checkpointing=checkpointing)
        | VARIATIONS[name]
    )
    planned, simulated = plan(SMALL, "qlora", **how), simulate(SMALL, "qlora", **how)
    assert all(planned[part] == simulated[part] for part in EXACT)
    assert close(planned["activations"], simulated["activations"], 0.02)
    assert close(planned.peak, simulated.peak, 0.10)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_plan_agrees_with_the_simulated_step_of_other_families(model_type):
    config = SMALL | dict(model_type=model_type, head_dim=16, tie_word_embeddings=False)
    for method in ("full", "qlora"):
        planned, simulated = (f(config, method, batch_size=2, max_length=100, r=8) for f in (plan, simulate))
        assert all(planned[part] == simulated[part] for part in EXACT)
        assert close(planned["activations"], simulated["activations"], 0.02)
        assert close(planned.peak, simulated.peak, 0.10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_peak_does_not_depend_on_what_a_tensor_is_called(monkeypatch, attention, checkpointing):
    how = dict(batch_size=2, max_length=100, r=8, attention=attention, checkpointing=checkpointing)
    expected = plan(SMALL, "lora", **how)

    def nameless(*arguments, **settings):
        return (replace(tensor, what="") for tensor in of_block(*arguments, **settings))

    of_block = activations.of_block
    monkeypatch.setattr(activations, "of_block", nameless)
    monkeypatch.setattr(peaks, "of_block", nameless)
    found = plan(SMALL, "lora", **how)
    assert found.components(at_peak=True) == expected.components(at_peak=True)
    assert (found.peak, found.moment) == (expected.peak, expected.moment)


def test_the_parts_that_peaks_ask_for_are_there():
    setup = Setup(method="lora", dtype="fp32", attention="eager")
    config = config_of(SMALL)
    kept = list(activations.saved_tensors(decoder_of(config, tensors_of(config, setup), setup), setup))
    for layer in range(2):
        found = {tensor.part for tensor in kept if tensor.layer == layer}
        missing = {Part.BLOCK_INPUT} if layer == 0 else set()  # the first needs no gradient
        assert found == {None, *Part} - missing
    assert all(tensor.part is None for tensor in kept if tensor.layer is None)

"""Predicted, simulated and measured: the same rows."""

import pytest
import torch

from labkit.lora.count import trainable
from labkit.memory import subjects
from labkit.memory.formulas import plan
from labkit.memory.measurement import measure
from labkit.memory.setup import Setup
from labkit.memory.simulation import simulate
from tests.memory.conftest import EXACT, close


@pytest.mark.parametrize("shape", [(2, 100), (1, 256)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_plan_and_simulation_agree_with_the_measured_step(tiny, method, checkpointing, shape):
    measured = tiny(method, checkpointing, *shape)
    how = dict(checkpointing=checkpointing, batch_size=shape[0], max_length=shape[1], supervised=0.5)
    how |= dict(r=8, dtype="fp32", device="cpu")
    planned, simulated = plan("tiny-llama", method, **how), simulate("tiny-llama", method, **how)
    for name in EXACT:
        assert planned[name] == simulated[name] == measured[name], name
    for kind, n in measured.kinds("activations").items():
        assert abs(planned[f"activations/{kind}"] - n) <= 16, kind  # two scalars: the loss and its weight
        assert simulated[f"activations/{kind}"] == n, kind
    assert close(planned.peak, measured.peak, 0.01)
    assert close(simulated.peak, measured.peak, 0.001)
    assert planned.moment.split()[0].strip(",") in (measured.moment, "loss", "backward")


def test_plan_agrees_with_a_measured_step_of_smollm2(method="qlora"):
    how = dict(dtype="fp32", r=8, batch_size=1, max_length=64, supervised=0.5)
    model = subjects.real_model("smollm2-135m", Setup(method=method, **how))
    measured = measure(model, subjects.make_batch(model.config.vocab_size, 1, 64, 0.5))
    planned = plan("smollm2-135m", method, device="cpu", **how)
    assert all(planned[name] == measured[name] for name in EXACT)
    assert close(planned["activations"], measured["activations"], 0.001)
    assert close(planned.peak, measured.peak, 0.01)


def test_measuring_leaves_the_model_as_it_was():
    setup = Setup(method="qlora", dtype="fp32", r=4)
    model = subjects.real_model("tiny-llama", setup).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    ledger = measure(model, subjects.make_batch(model.config.vocab_size, 1, 16), checkpointing=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training and not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).requires_grad
    assert torch.equal(generator, torch.get_rng_state())
    assert ledger.counts["trainable"] == trainable(model).trainable


def test_the_time_line_reaches_the_peak_and_comes_back_to_what_is_static(tiny):
    ledger = tiny("lora", False, 2, 100)
    total = ledger.timeline.total
    assert max(total) == ledger.peak
    assert [name for name, _ in ledger.timeline.phases] == ["forward", "backward", "optimizer"]
    simulated = simulate("tiny-llama", "lora", r=8, dtype="fp32", device="cpu", batch_size=2, max_length=100)
    assert max(simulated.timeline.total) == simulated.peak
    live = simulated.timeline.live
    forward_ends = dict(simulated.timeline.phases)["backward"]
    assert live["activations"][forward_ends] == max(live["activations"]) == simulated["activations"]
    assert live["gradients"][forward_ends] == 0 < live["gradients"][-1]


def test_measure_refuses_what_it_cannot_measure():
    model = subjects.real_model("tiny-llama", Setup(method="lora", dtype="fp32", r=2))
    batch = subjects.make_batch(model.config.vocab_size, 1, 8)
    with pytest.raises(ValueError, match="optimizer='lion' is not known"):
        measure(model, batch, optimizer="lion")
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        measure(model.requires_grad_(False), batch)

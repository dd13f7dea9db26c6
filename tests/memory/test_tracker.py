"""The bookkeeping of tensors: when each was there, and what it is."""

import gc

import pytest
import torch
from torch import nn

from labkit.memory.tracker import TensorRecord, TrackedTensor, Tracker, kind_of


def tracked(n, born, died=None, label="temporary/tensors", module="", is_input=False):
    return TrackedTensor(n, module, "forward", label, born, died, is_input)


def test_a_record_adds_up_what_is_alive_at_every_event():
    tensors = [
        tracked(100, 1, label="weights/fp32"),
        tracked(10, 2, 4),
        tracked(7, 3, label="activations/mlp"),
    ]
    record = TensorRecord(tensors, events=4, starts=[("forward", 1), ("backward", 3)])
    assert record.peak() == (117, 3)
    assert record.at(3) == {"weights/fp32": 100, "temporary/tensors": 10, "activations/mlp": 7}
    assert record.at(4) == {"weights/fp32": 100, "activations/mlp": 7}
    assert record.largest() == {"weights/fp32": 100, "temporary/tensors": 10, "activations/mlp": 7}
    assert record.timeline().total[1:5] == [100, 110, 117, 107]
    assert [record.phase_at(event) for event in (1, 2, 4)] == ["before the step", "forward", "backward"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.lora", "attention"),
        ("model.layers.3.mlp.act_fn", "mlp"),
        ("model.layers.3.post_attention_layernorm", "norms"),
        ("model.rotary_emb", "inputs"),
        ("model.layers.3", "residual"),
        ("lm_head", "logits"),
        ("", "logits"),
    ],
)
def test_the_kind_of_an_activation_follows_from_the_module_that_made_it(module, kind):
    assert kind_of(tracked(1, 1, module=module)) == kind
    assert kind_of(tracked(1, 1, module=module, is_input=True)) == "inputs", "a mask, wherever it is made"


def test_a_step_of_one_layer_has_the_tensors_that_it_should():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    x = torch.ones(2, 8)
    tracker = Tracker(model, {"weights/fp32": model.parameters(), "activations/inputs": [x]})
    with tracker.watch():
        tracker.start("forward")
        loss = model(x).square().sum()  # the square keeps its input
        tracker.start("backward")
        loss.backward()
    del loss
    gc.collect()
    largest = tracker.finish().largest()
    assert largest["weights/fp32"] == largest["gradients/of all that trains"] == 4 * 8 * 4
    assert largest["activations/inputs"] == 4 * 2 * 8
    assert largest["activations/residual"] == 4 * 2 * 4, "the input of the square"
    assert largest["activations/logits"] == 4, "the loss, made outside of any module"
    assert model[0]._forward_hooks == {} and model[0].weight._post_accumulate_grad_hooks == {}

"""A block that raises leaves the model as it was."""

import pytest
import torch
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from labkit.models.restoring import unchanged_on_error
from labkit.quant.model import quantize_model
from tests.lora.cases import logits, make_model


def described(model: nn.Module) -> list:
    modules = [
        (name, id(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules + [(name, id(tensor), tensor.requires_grad) for name, tensor in tensors]


CHANGES = {
    "quantized": lambda model: quantize_model(model, progress=False),
    "adapted": lambda model: add_lora(model, LoRAConfig(r=2, modules_to_save=["lm_head"])),
    "both": lambda model: add_qlora(model, LoRAConfig(r=2, init="loftq_iter_1")),
    "in training": lambda model: model.train().requires_grad_(False),
    "given a buffer and a hook": lambda model: (
        model.register_buffer("extra", torch.ones(1)),
        model.register_forward_hook(print),
    ),
    "robbed of a layer": lambda model: delattr(model.model.layers[0].mlp, "up_proj"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_model_as_it_was(change, error):
    model = make_model()
    before, expected = described(model), logits(model)
    with pytest.raises(error), unchanged_on_error(model):
        change(model)
        assert described(model) != before
        raise error
    assert described(model) == before and torch.equal(logits(model), expected)


def test_a_block_that_does_not_raise_changes_the_model():
    with unchanged_on_error(make_model()) as model:
        quantize_model(model, progress=False)
    assert not any(type(m) is nn.Linear for n, m in model.named_modules() if n != "lm_head")

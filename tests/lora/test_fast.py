"""The sum in place: the reference's values and gradients, and its operations counted whole."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from labkit.hardware import set_fast
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.quant.model import quantize_model


def randomize_B(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_sum_in_place_changes_no_value_and_no_gradient_of_the_base_or_the_input(variant, shape):
    """Also where the base trains, has a bias, and something else reads the same x."""
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(6, 4)), LoRAConfig(r=2, variant=variant)).double()
    randomize_B(model)
    layer = model[0].requires_grad_(True)
    x = torch.randn(shape, dtype=torch.double, requires_grad=True)
    inputs, before = (x, *layer.parameters()), x.detach().clone()
    y = layer(x)
    W, b = layer.base.weight, layer.base.bias
    V = W + layer.scaling * layer.lora_B @ layer.lora_A
    stretch = (layer.lora_magnitude / V.norm(dim=1).detach())[:, None] if variant == "dora" else 1
    expected = x @ (stretch * V).T + b
    assert y.shape == (*shape[:-1], 4) and torch.equal(x, before)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad((out.sin() + x.sum()).sum(), inputs) for out in (y, expected))
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other)


def test_operations_of_a_layer_are_counted_whole():
    layer = add_lora(nn.Sequential(nn.Linear(64, 48, bias=False)), LoRAConfig(r=4))[0]
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 64))
    assert counter.get_total_flops() == 2 * 10 * (64 * 48 + 4 * 64 + 4 * 48)


@pytest.fixture
def reference():
    """The fast paths are off."""
    set_fast(False)
    yield
    set_fast(True)


def values_and_gradients(layer, x):
    torch.manual_seed(3)  # of the dropout
    x = x.clone().requires_grad_(True)
    y = layer(x)
    wanted = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y.float().sin().sum(), list(wanted.values()))
    return {"y": y.detach()} | dict(zip(wanted, gradients))


@pytest.mark.parametrize(
    "config", [{}, {"dropout": 0.5}, {"variant": "dora"}, {"variant": "rslora", "r": 3}], ids=str
)
@pytest.mark.parametrize("kind", ["double", "fp32", "bf16", "4 bits", "Conv1D"])
def test_the_sum_in_place_is_the_reference_to_within_the_last_bit(reference, kind, config):
    torch.manual_seed(0)
    base = Conv1D(80, 96) if kind == "Conv1D" else nn.Linear(96, 80)
    model = nn.Sequential(base.to({"double": torch.double, "bf16": torch.bfloat16}.get(kind)))
    if kind == "4 bits":
        quantize_model(model, progress=False)
    add_lora(model, LoRAConfig(**{"r": 4, "alpha": 6} | config))
    randomize_B(model)
    layer = model.train()[0]
    x = torch.randn(2, 7, 96, dtype=torch.float32 if kind == "4 bits" else layer.base.weight.dtype)
    with mock.patch(
        "labkit.lora.layer.sum_in_place", side_effect=AssertionError("the reference takes no fast path")
    ):
        slow = values_and_gradients(layer, x)
    set_fast(True)
    fast = values_and_gradients(layer, x)
    assert fast.keys() == slow.keys() and slow["lora_B"].abs().max() > 0
    tolerance = {"double": 1e-14, "bf16": 0}.get(kind, 2e-6)  # bf16: its sum is the reference's own
    for name, expected in slow.items():
        assert (fast[name] - expected).abs().max() <= tolerance * expected.abs().max(), name

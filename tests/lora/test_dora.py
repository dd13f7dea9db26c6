"""DoRA: its known answers, its norms, and the one hook in which it differs from LoRA."""

import inspect

import pytest
import torch
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.dora import DoRALinear
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRALinear
from labkit.quant.layer_kinds import dense_weight
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from tests.lora.cases import randomize


def test_dora_gives_the_known_answer_of_torchtune():
    """torchtune's test of its DoRALinear: every parameter is arange(n) / n, and the mean output is 0.05201."""
    torch.manual_seed(16)
    x = torch.randn(2, 32, 64)
    ramp = lambda p: (torch.arange(p.numel(), dtype=torch.float32) / p.numel()).view(p.shape)  # noqa: E731
    base = nn.Linear(64, 128, bias=False)
    base.weight.data = ramp(base.weight)
    layer = DoRALinear(base, LoRAConfig(r=4, alpha=1.0, variant="dora"))
    for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude):
        p.data = ramp(p)
    assert layer(x).mean().item() == pytest.approx(0.05201, abs=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_starts_as_the_base_bit_for_bit(bias, quantized):
    torch.manual_seed(0)
    base = nn.Linear(96, 80, bias)
    base.weight.data[7] = 0  # a dead row has no direction, and must not become NaN
    if quantized:
        base = QuantLinear.from_linear(base)
    layer = DoRALinear(base, LoRAConfig(r=8, variant="dora"))
    x = torch.randn(5, 96)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", ["dense", "quantized", "bfloat16"])
def test_doras_norms_are_those_of_the_whole_weight(kind):
    torch.manual_seed(0)
    base = nn.Linear(96, 80)
    if kind == "quantized":
        base = QuantLinear.from_linear(base)
    layer = DoRALinear(
        base.bfloat16() if kind == "bfloat16" else base, LoRAConfig(r=8, alpha=24, variant="dora")
    )
    nn.init.normal_(layer.lora_B, std=0.1)
    whole = dense_weight(base).double() + 3 * (layer.lora_B.double() @ layer.lora_A.double())
    tolerance = 2e-3 if kind == "bfloat16" else 1e-6
    torch.testing.assert_close(layer.row_norms().double(), whole.norm(dim=1), rtol=tolerance, atol=0)
    torch.testing.assert_close(
        layer.delta() + dense_weight(base),
        (layer.lora_magnitude[:, None].double() * whole / whole.norm(dim=1, keepdim=True)).to(
            base.weight.dtype
        ),
        rtol=1e-2 if kind == "bfloat16" else 1e-5,
        atol=1e-2 if kind == "bfloat16" else 1e-6,
    )


def test_doras_norms_follow_a_base_that_is_quantized_under_it():
    model = randomize(add_lora(nn.Sequential(nn.Linear(96, 80)), LoRAConfig(r=4, variant="dora")))
    quantize_model(model, progress=False)
    layer = lora_layers(model)["0"]
    whole = dense_weight(layer.base) + layer.scaling * (layer.lora_B @ layer.lora_A)
    assert isinstance(layer.base, QuantLinear)
    torch.testing.assert_close(layer.row_norms(), whole.norm(dim=1), rtol=1e-5, atol=0)


def test_doras_dropout_falls_on_the_correction_only():
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 64), LoRAConfig(r=4, dropout=0.5, variant="dora")).train()
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x)), "B = 0: nothing to drop"
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_the_forward_of_dora_is_loras_and_a_hook_is_the_difference():
    assert DoRALinear.forward is LoRALinear.forward
    lora, dora = (inspect.getsource(c.stretch).splitlines() for c in (LoRALinear, DoRALinear))
    assert len(inspect.getsource(LoRALinear.forward).splitlines()) <= 12
    assert lora[-1].strip() == "return y" and len(dora) <= len(lora) + 2

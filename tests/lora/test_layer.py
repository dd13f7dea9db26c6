"""The layer: it starts as nothing, computes what torchtune and PEFT compute, and never merges on its own."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRALinear
from labkit.quant.model import quantize_model
from tests.conftest import make_small_llama

IDS = torch.arange(40).view(2, 20)


def randomize_B(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("quantized", [False, True])
def test_output_before_training_equals_the_base_bit_for_bit(small_llama, quantized):
    if quantized:
        quantize_model(small_llama, progress=False)
    with torch.no_grad():
        before = small_llama(IDS).logits
        assert torch.equal(add_lora(small_llama, LoRAConfig(r=8)).eval()(IDS).logits, before)


def test_gradient_of_A_is_zero_at_the_start_and_that_of_B_is_not(small_llama):
    add_lora(small_llama, LoRAConfig(r=4))
    small_llama(IDS).logits.square().mean().backward()
    layer = next(iter(lora_layers(small_llama).values()))
    assert torch.all(layer.lora_A.grad == 0) and torch.any(layer.lora_B.grad != 0)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_logits_and_gradients_equal_peft(variant):
    """In double precision, where the order of a processor's additions does not hide anything."""
    ours = add_lora(make_small_llama().double(), LoRAConfig(r=4, alpha=12, variant=variant))
    randomize_B(ours)
    config = PeftConfig(
        r=4, lora_alpha=12, target_modules="all-linear", use_rslora=variant == "rslora", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(make_small_llama(), config).double()
    modules = dict(theirs.get_base_model().named_modules())
    for name, layer in lora_layers(ours).items():
        modules[name].lora_A["default"].weight.data.copy_(layer.lora_A.data)
        modules[name].lora_B["default"].weight.data.copy_(layer.lora_B.data)
    out, reference = ours(IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=1e-6)
    out.square().mean().backward()
    reference.square().mean().backward()
    for name, layer in lora_layers(ours).items():
        torch.testing.assert_close(
            layer.lora_A.grad, modules[name].lora_A["default"].weight.grad, rtol=1e-6, atol=1e-12
        )
        torch.testing.assert_close(
            layer.lora_B.grad, modules[name].lora_B["default"].weight.grad, rtol=1e-6, atol=1e-12
        )


def test_known_answer_of_torchtune():
    """torchtune's test of its LoRALinear: every parameter is arange(n) / n, and the mean output is 1.1252."""
    torch.manual_seed(16)
    x = torch.randn(2, 32, 64)
    layer = LoRALinear(nn.Linear(64, 128), LoRAConfig(r=4, alpha=1.0))
    for p in layer.parameters():
        p.data = (torch.arange(p.numel(), dtype=torch.float32) / p.numel()).view(p.shape)
    assert layer(x).mean().item() == pytest.approx(1.1252, abs=1e-4)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_train_and_eval_never_merge(small_llama, variant):
    add_lora(small_llama, LoRAConfig(r=4, variant=variant))
    randomize_B(small_llama)
    before = {name: layer.base.weight.clone() for name, layer in lora_layers(small_llama).items()}
    with torch.no_grad():
        results = [small_llama.train(mode)(IDS).logits for mode in (True, False, True)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    layers = lora_layers(small_llama)
    assert all(torch.equal(layers[name].base.weight, before[name]) for name in before)
    assert all(not layer.is_merged for layer in layers.values())


@pytest.mark.parametrize("init, fan_in", [("b_random", 4), ("b_random_small", 64)])
def test_with_b_random_the_output_is_the_bases_and_the_first_gradient_goes_to_a(init, fan_in):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 256), LoRAConfig(r=4, init=init))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert layer.lora_A.grad.any() and not layer.lora_B.grad.any()
    assert layer.lora_B.std().item() == pytest.approx(1 / (3 * fan_in) ** 0.5, rel=0.1), (
        "uniform, by its fan-in"
    )


@pytest.mark.parametrize("alpha", [8, 2, 1, 6, 0.7])  # s = 2, 1/2, 1/4, 1.5, .175
def test_the_correction_and_its_gradients_have_the_bits_of_s_times_BA(alpha, small_llama):
    layer = next(iter(lora_layers(add_lora(small_llama, LoRAConfig(r=4, alpha=alpha))).values()))
    randomize_B(small_llama)
    A, B, s = layer.lora_A, layer.lora_B, layer.scaling
    expected = s * (B @ A)
    assert torch.equal(layer.delta(), expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((layer.delta() * weights).sum(), [A, B])
    assert all(map(torch.equal, found, torch.autograd.grad((expected * weights).sum(), [A, B])))

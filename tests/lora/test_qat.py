"""An adapter trained through the rounding computes, merged and quantized, what it computed in training."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from labkit import models
from labkit.alternatives.ia3 import add_ia3
from labkit.data.passages import load_austen
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.adapters import add_adapter, base_only, use_adapter
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload, unmerge
from labkit.lora.qat import QATLinear, quantization_aware
from labkit.lora.qlora import add_qlora
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from labkit.training.config import TrainConfig
from labkit.training.loop import train
from tests.lora.cases import IDS, logits, make_gpt2, make_model, peft_model, randomize

CONFIG = LoRAConfig(r=4, alpha=12)


def one_layer():
    """x, the layer, and its model; W is (96, 128)."""
    torch.manual_seed(0)
    model = randomize(add_lora(nn.Sequential(nn.Linear(128, 96)), CONFIG))
    return torch.randn(20, 128, requires_grad=True), model[0], model


def test_gradients_pass_the_rounding_as_if_it_were_not_there():
    """dL/dA = s B^T G and dL/dB = s G A^T with G = dL/dy^T x, and dL/dx = dL/dy Q(W + s B A)."""
    x, layer, model = one_layer()
    target = torch.randn(20, 96)
    with quantization_aware(model):
        y = model(x)
        (y - target).square().sum().backward()
    A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling
    rounded = quantize(layer.base.weight + s * (B @ A)).dequantize()
    to_y = 2 * (F.linear(x, rounded, layer.base.bias) - target).detach()
    G = to_y.T @ x.detach()
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ G, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, s * G @ A.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, to_y @ rounded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_gradients_equal_those_of_autograd_with_the_rounding_error_detached(variant):
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=12, variant=variant)))
    ours = copy.deepcopy(model)
    with quantization_aware(ours, double_quant=False):
        ours(IDS, labels=IDS).loss.backward()

    class Detached(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            V = self.layer.weight
            error = (quantize(V, double_quant=False).dequantize() - V).detach()
            return F.linear(x, V + error)

    layers = lora_layers(model)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Detached(layer))
    model(IDS, labels=IDS).loss.backward()
    for name, layer in lora_layers(ours).items():
        for part, parameter in layer.named_parameters(recurse=False):
            expected = getattr(layers[name], part).grad
            assert expected.abs().max() > 1e-5
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings, quantization",
    [
        ({}, {}),
        ({"variant": "rslora"}, {"blocksize": 128}),
        ({"variant": "dora"}, {"codebook": "fp4"}),
        ({"init": "pissa"}, {"double_quant": False}),
        ({"targets": "attention"}, {"compute_dtype": torch.bfloat16}),
    ],
    ids=["lora", "rslora", "dora", "pissa", "attention, bf16"],
)
def test_merged_and_quantized_it_gives_the_very_outputs_of_training(settings, quantization):
    config = QuantConfig(**quantization)
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, alpha=12, **settings)))
    with quantization_aware(model, config):
        served = logits(model)
        trained = model(IDS).logits.detach()
    assert torch.equal(served, trained) and not torch.equal(served, logits(model))
    unload(model)
    report = quantize_model(model, config, progress=False)
    assert len(report) == 14 and torch.equal(logits(model), served)


def test_a_transposed_layer_is_rounded_as_it_is_served():
    model = randomize(add_lora(make_gpt2(), CONFIG))
    with quantization_aware(model):
        served = logits(model)
        weight = model.transformer.h[0].attn.c_attn.weight
        assert weight.shape == (64, 192)
    unload(model)
    quantize_model(model, progress=False)
    assert torch.equal(logits(model), served)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight.dequantize(), weight.T)


def test_layers_of_16_bits_are_summed_in_32_and_rounded_to_16_before_four():
    model = randomize(add_lora(make_model().to(torch.bfloat16), CONFIG))
    with quantization_aware(model):
        served = logits(model)
    unload(model)
    quantize_model(model, progress=False)
    assert served.dtype == torch.bfloat16 and torch.equal(logits(model), served)


def test_what_is_skipped_and_the_output_layer_stay_in_full_precision():
    model = randomize(add_lora(make_model(), LoRAConfig(r=4, modules_to_save=["lm_head"])))
    with quantization_aware(model, skip="down_proj"):
        aware = [name for name, module in model.named_modules() if isinstance(module, QATLinear)]
        served = logits(model)
    assert len(aware) == 12 and not any("down_proj" in name or "lm_head" in name for name in aware)
    unload(model)
    quantize_model(model, skip="down_proj", progress=False)
    torch.testing.assert_close(
        logits(model), served
    )  # to rounding: of down_proj, W x + s B A x is now one product


def test_training_in_the_block_lowers_the_loss_of_the_four_bit_model_and_leaves_plain_lora():
    model, tokenizer = models.load("tiny-llama")
    base = copy.deepcopy(model)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=4))
    before = dict(model.named_modules())
    config = TrainConfig(lr=1e-2, steps=6, batch_size=1, schedule="constant", progress=False)
    with quantization_aware(model):
        losses = train(model, tokenizer, load_austen("train")[:1], config).losses
    assert losses[-1] < losses[0] - 0.2
    assert dict(model.named_modules()) == before
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base.weight, base.get_submodule(name).weight)


def test_merge_and_unmerge_in_the_block_change_nothing_that_it_computes():
    model = randomize(add_lora(make_model(), CONFIG))
    with quantization_aware(model):
        served = logits(model)
        merge(model)
        assert torch.equal(logits(model), served)
        unmerge(model)
        assert torch.equal(logits(model), served)


def test_the_saved_adapter_is_a_plain_one_that_peft_reads(tmp_path):
    model = randomize(add_lora(make_model(), CONFIG))
    with quantization_aware(model):
        served = logits(model)
        save_adapter(model, tmp_path / "adapter")
        assert torch.equal(logits(model), served)
    again = load_adapter(make_model(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with quantization_aware(again):
        assert torch.equal(logits(again), served)
    theirs = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_an_error_in_the_block_puts_the_layers_back():
    model = randomize(add_lora(make_model(), CONFIG))
    before, served = dict(model.named_modules()), logits(model)
    with pytest.raises(KeyError), quantization_aware(model):
        raise KeyError
    assert dict(model.named_modules()) == before and torch.equal(logits(model), served)


def test_adapters_are_switched_and_unloaded_within_the_block_too():
    model = randomize(add_adapter(add_lora(make_model(), CONFIG, "clerk"), "poet", CONFIG))
    use_adapter(model, "clerk")
    with quantization_aware(model):
        clerk = logits(model)
        use_adapter(model, "poet")
        poet = logits(model)
        with base_only(model):
            base = logits(model)
        unload(model)
        assert torch.equal(logits(model), poet) and not torch.equal(clerk, poet)
    assert not any(isinstance(module, QATLinear) for module in model.modules())
    quantize_model(model, progress=False)
    assert torch.equal(logits(model), poet)
    alone = make_model()
    quantize_model(alone, progress=False)
    assert torch.equal(logits(alone), base)


def holding_nan():
    model = add_lora(make_model(), CONFIG)
    next(iter(lora_layers(model).values())).base.weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: add_qlora(make_model(), CONFIG), "in 4 bits already.*in full precision"),
        (lambda: add_lora(make_model(), LoRAConfig(dropout=0.1)), r"dropout=0\.1.*dropout=0\)"),
        (lambda: peft_model(make_model()), "labkit.load_adapter reads adapters of PEFT"),
        (lambda: add_ia3(make_model()), "within a IA3Linear"),
        (holding_nan, "q_proj.*NaN"),
        (lambda: nn.Sequential(nn.ReLU()), "no linear layer to round"),
    ],
    ids=["4 bits", "dropout", "PEFT", "IA3", "NaN", "no linear layer"],
)
def test_what_cannot_be_served_as_trained_is_refused_and_left_as_it_was(make, message):
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message), quantization_aware(model):
        pass
    assert dict(model.named_modules()) == before


def test_unknown_settings_and_a_block_within_a_block_are_refused():
    model = add_lora(make_model(), CONFIG)
    with pytest.raises(TypeError, match="did you mean 'blocksize'"), quantization_aware(model, blocksiz=64):
        pass
    with pytest.raises(ValueError, match="skip='q_porj'.*'q_proj'"), quantization_aware(model, skip="q_porj"):
        pass
    with quantization_aware(model):
        with pytest.raises(ValueError, match="leave that one first"), quantization_aware(model):
            pass
        assert sum(isinstance(module, QATLinear) for module in model.modules()) == 14
    assert not any(isinstance(module, (QATLinear, QuantLinear)) for module in model.modules())

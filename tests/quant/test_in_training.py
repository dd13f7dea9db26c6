"""4-bit models with adapters: compiled, checkpointed, and beside bitsandbytes' layers, step by step."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from labkit.data.batches import Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.surgery import is_output_layer, replace_module
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks
from tests.conftest import make_small_llama
from tests.quant.cases import (
    IDS,
)


@pytest.mark.slow
def test_an_adapted_model_compiles_and_trains(small_llama):
    torch.compiler.reset()
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4))
    compiled = torch.compile(small_llama.model, backend="aot_eager")
    results = []
    for model in (compiled, small_llama.model):
        model(input_ids=IDS, use_cache=False).last_hidden_state.pow(2).sum().backward()
        results.append([p.grad.clone() for p in small_llama.parameters() if p.requires_grad])
        small_llama.zero_grad()
    assert len(results[0]) == 2 * 21
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(small_llama):
    quantize_model(small_llama, progress=False)
    add_lora(small_llama, LoRAConfig(r=4)).train()
    results = []
    for on in (False, True):
        if on:
            checkpoint_blocks(small_llama)
        small_llama(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        results.append([p.grad.clone() for p in small_llama.parameters() if p.requires_grad])
        small_llama.zero_grad()
    assert any(g.abs().sum() > 0 for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def put_in_four_bits(model, make):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not is_output_layer(model, module):
            replace_module(model, name, make(module))
    return model


def with_bitsandbytes(linear):
    theirs = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": linear.weight.data})
    return theirs.to("cpu")


def with_labkit(linear):
    return QuantLinear.from_linear(linear, scale_rounding="lookup")  # bitsandbytes' own rounding on a CPU


def adapted(model, make):
    put_in_four_bits(model, make)
    torch.manual_seed(7)  # now: making a Linear4bit draws random numbers too
    return add_lora(model, LoRAConfig(r=4, alpha=8)).train()


def test_losses_of_twenty_steps_equal_those_on_bitsandbytes_layers():
    batches = [
        Batch(ids, ids.clone())
        for ids in torch.randint(0, 49152, (20, 2, 16), generator=torch.Generator().manual_seed(0))
    ]
    losses = []
    for make in (with_labkit, with_bitsandbytes):
        # widths of whole blocks: bitsandbytes 0.50 dequantizes others wrongly on a CPU (see test_tensor.py)
        model = adapted(make_small_llama(intermediate_size=192), make)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for i in range(20):
            loss = supervised_loss(model, batches[i % 4]) / batches[i % 4].n_supervised
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.05  # something was learned
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-5, atol=0)


@pytest.mark.slow
def test_loss_and_gradients_of_the_real_model_equal_those_on_bitsandbytes_layers(smollm2):
    ids = torch.randint(0, 49152, (1, 24), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for make in (with_labkit, with_bitsandbytes):
        model = adapted(copy.deepcopy(smollm2[0]), make)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(3))
        loss = supervised_loss(model, Batch(ids, ids.clone())) / 23
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()

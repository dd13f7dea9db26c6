"""QuantLinear where it is used: in training beside bitsandbytes, generation, compilation, threads, forks, and on disk."""

import copy
import os
import subprocess
import sys
import threading

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from labkit.data.batches import Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora
from labkit.models.surgery import is_output_layer, replace_module
from labkit.quant import kernels, scratch
from labkit.quant import linear as quant_linear
from labkit.quant.kernels import cpu
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from labkit.training.loss import supervised_loss
from tests.conftest import make_small_llama

IDS = torch.arange(40).view(2, 20)
directly = pytest.mark.skipif(cpu.LANES == 0, reason="no kernel that multiplies for this processor")


def make_layer(out=80, width=96, bias=True, seed=0, **settings):
    torch.manual_seed(seed)
    return QuantLinear.from_linear(nn.Linear(width, out, bias), **settings)


@pytest.fixture
def products(monkeypatch):
    """Shapes of what the kernel that multiplies was given."""
    shapes, original = [], kernels.multiply_4bit

    def spy(x, *arguments):
        shapes.append(tuple(x.shape))
        return original(x, *arguments)

    monkeypatch.setattr(kernels, "multiply_4bit", spy)
    return shapes


# -- a few rows without gradients


@directly
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (3, 5, 96)])
def test_few_rows_without_gradients_equal_a_dense_layer_to_rounding(shape, bias, double_quant, products):
    layer = make_layer(bias=bias, double_quant=double_quant)
    x = torch.randn(shape)
    y = layer(x)
    assert products == [(x.numel() // 96, 96)] and y.shape == (*shape[:-1], 80)
    torch.testing.assert_close(y, layer.to_linear()(x), rtol=1e-5, atol=1e-6)


@directly
def test_the_other_path_is_taken_for_gradients_many_rows_other_dtypes_widths_and_autocast(
    products, monkeypatch
):
    layer = make_layer()
    layer(torch.randn(2, 96, requires_grad=True))
    layer(torch.randn(quant_linear.FEW_ROWS + 1, 96))
    layer(torch.randn(0, 96))
    copy.deepcopy(layer).bfloat16()(torch.randn(2, 96).bfloat16())
    make_layer(width=97)(torch.randn(2, 97))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 96))
    kernels.set_fast(False)
    try:
        layer(torch.randn(2, 96))
    finally:
        kernels.set_fast(True)
    monkeypatch.setattr(quant_linear, "FEW_ROWS", 0)
    layer(torch.randn(2, 96))
    assert products == []
    monkeypatch.undo()


@pytest.mark.parametrize("shape", [(2, 48), (1, 192), (95,)])
def test_wrong_widths_are_refused_like_by_a_dense_layer(shape):
    with pytest.raises(RuntimeError, match="shape"):
        make_layer()(torch.randn(shape))


def test_bias_trains_although_x_needs_no_gradient():
    layer = make_layer()
    layer(torch.randn(3, 96)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((80,), 3.0))


# -- the memory that layers share


def test_results_and_gradients_do_not_live_in_the_shared_memory():
    one, two = make_layer(seed=1), make_layer(seed=2)
    x = torch.randn(20, 96, requires_grad=True)
    y = one(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    y_before, gradient_before = y.clone(), gradient.clone()
    torch.autograd.grad(two(x).sum(), x)
    assert torch.equal(y, y_before) and torch.equal(gradient, gradient_before)


def test_two_layers_in_one_graph_and_backward_in_any_order():
    one, two = make_layer(96, 96, seed=1), make_layer(96, 96, seed=2)
    x = torch.randn(20, 96, requires_grad=True)
    (gradient,) = torch.autograd.grad(two(one(x)).tanh().sum() + one(x).sum(), x)
    a, b = one.to_linear(), two.to_linear()
    (expected,) = torch.autograd.grad(b(a(x)).tanh().sum() + a(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_right_although_other_layers_ran_meanwhile():
    layer, other = make_layer(bias=False), make_layer(bias=False, seed=5)
    x = torch.randn(20, 96, requires_grad=True)

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        other(torch.randn(20, 96, requires_grad=True)).sum().backward()
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    torch.testing.assert_close(second(layer), second(layer.to_linear()), rtol=1e-4, atol=1e-4)


def test_threads_do_not_share_it():
    layers = [make_layer(512, 512, seed=i) for i in range(4)]
    x = torch.randn(32, 512, requires_grad=True)
    expected = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in layers]
    same = []

    def work(i):
        y = x.detach().clone().requires_grad_()
        for _ in range(30):
            same.append(torch.equal(torch.autograd.grad(layers[i](y).sum(), y)[0], expected[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(same) == 120 and all(same)


def test_it_is_as_large_as_the_largest_weight_and_bounded(monkeypatch):
    memory = scratch.Scratch()
    monkeypatch.setattr(scratch, "_scratch", memory)
    x = torch.randn(20, 96, requires_grad=True)
    for out in (40, 80, 60):
        make_layer(out)(x).sum().backward()
    assert memory.memory.numel() == 80 * 96 * 4
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 80 * 96 * 4)
    torch.testing.assert_close(make_layer(200)(x), make_layer(200).to_linear()(x), rtol=1e-5, atol=1e-6)
    assert memory.memory.numel() == 80 * 96 * 4


def test_it_can_be_made_in_inference_mode_and_used_outside(monkeypatch):
    monkeypatch.setattr(scratch, "_scratch", scratch.Scratch())
    layer = make_layer()
    with torch.inference_mode():
        layer(torch.randn(20, 96))
    x = torch.randn(20, 96, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-5, atol=1e-6)


# -- a module like any other


def test_state_goes_through_safetensors(tmp_path):
    layer, other = make_layer(), make_layer(seed=3)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(20, 96)
    assert torch.equal(other(x), layer(x)) and torch.equal(other(x[:1]), layer(x[:1]))


def test_a_quantized_model_goes_through_safetensors(tmp_path, small_llama):
    quantize_model(small_llama, progress=False)
    other = make_small_llama(seed=1)
    quantize_model(other, progress=False)
    save_model(small_llama, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(IDS).logits, small_llama(IDS).logits)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_copy_is_a_layer_of_its_own(double_quant):
    layer = make_layer(double_quant=double_quant)
    x = torch.randn(20, 96)
    before = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    other.packed.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


def test_tensors_put_in_place_of_the_buffers_count():
    layer, source = make_layer(), make_layer(seed=3)
    layer(torch.randn(20, 96))
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(20, 96)
    assert torch.equal(layer(x), source(x))
    layer.absmax_offset = layer.absmax_offset * 2
    assert not torch.equal(layer(x), source(x))


def test_a_layer_on_meta_has_shapes_and_takes_a_state():
    source = make_layer()
    layer = copy.deepcopy(source).to("meta")
    assert layer.weight.packed.device.type == "meta" and layer(torch.empty(3, 96, device="meta")).shape == (
        3,
        80,
    )
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(20, 96)
    assert torch.equal(layer(x), source(x))
    moved = copy.deepcopy(source).to_empty(device="meta").to_empty(device="cpu")
    moved.load_state_dict(source.state_dict())
    assert torch.equal(moved(x), source(x))


def test_autocast_computes_in_its_dtype_like_a_dense_layer():
    layer = make_layer()
    dense = layer.to_linear()
    x, y = (
        torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), dense(y)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    ours.float().pow(2).sum().backward()
    theirs.float().pow(2).sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, y.grad, rtol=2e-2, atol=2e-2)


def test_fake_tensors_get_shapes():
    layer = make_layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(3, 96)).shape == (3, 80)
        x = torch.empty(30, 96, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == (30, 96)
    state, empty = layer.state_dict(), copy.deepcopy(layer).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the codebook is not fake
        empty.load_state_dict({name: mode.from_tensor(tensor) for name, tensor in state.items()}, assign=True)
        assert empty(torch.empty(3, 96)).shape == (3, 80)


@pytest.mark.parametrize("gradients", [True, False])
def test_compiles_in_one_graph(gradients):
    torch.compiler.reset()
    layer = make_layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 96, requires_grad=gradients)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    if gradients:
        results = [torch.autograd.grad(f(x).pow(2).sum(), x)[0] for f in (compiled, layer)]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


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
            small_llama.activation_checkpointing_enable({"use_reentrant": False})
        small_llama(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        results.append([p.grad.clone() for p in small_llama.parameters() if p.requires_grad])
        small_llama.zero_grad()
    assert any(g.abs().sum() > 0 for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results))


class Rows(Dataset):
    """Runs a layer in the worker process, on two threads of its own."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 4

    def __getitem__(self, i):
        torch.set_num_threads(2)
        return self.layer(torch.full((1, 512), float(i)))


@directly
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_worker_uses_a_layer_that_the_parent_used():
    items = Rows(make_layer(512, 512, bias=False))
    expected = [items[i].detach() for i in range(4)]
    loader = DataLoader(items, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


# -- the real model, and bitsandbytes


def test_generated_tokens_are_those_of_the_dense_model(smollm2, monkeypatch):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    quantize_model(model, progress=False)
    inputs = tokenizer(["Low-rank adaptation is", "Paris is"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**inputs, **options)
    monkeypatch.setattr(quant_linear, "FEW_ROWS", 0)
    assert torch.equal(ours, model.generate(**inputs, **options))
    assert torch.equal(ours, dequantize_model(model).generate(**inputs, **options))


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
        # widths of whole blocks: bitsandbytes 0.50 dequantizes others wrongly on a CPU (see test_quant.py)
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


STREAMING = """
import sys, torch
from pathlib import Path
from torch import nn
from labkit.quant.model import quantize_model

def status(key):
    return 1024 * int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False)  # kernels are loaded
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(20)])  # 16 MiB each
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
before = status("VmRSS")
quantize_model(model, progress=False)
print(status("VmHWM") - before, before - status("VmRSS"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's record of the peak")
def test_quantizing_a_model_takes_at_most_one_layer_more_and_gives_the_rest_back():
    done = subprocess.run([sys.executable, "-c", STREAMING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above, freed = map(int, done.stdout.split())
    layer = 2048 * 2048 * 4
    assert above <= layer, f"{above / layer:.2f} layers above the model"
    assert freed >= 0.8 * 20 * layer, f"only {freed / layer:.2f} of 20 layers were given back"


MAPPED = """
import gc
from pathlib import Path
from labkit import models
from labkit.quant.model import quantize_model

model, _ = models.load("smollm2-135m")
quantize_model(model, progress=False)
gc.collect()
print(sum("model.safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads Linux's list of mapped files")
def test_a_quantized_model_does_not_hold_on_to_the_file_that_it_came_from(smollm2):
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "0", done.stderr

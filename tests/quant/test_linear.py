"""The 4-bit linear layer: it computes with the dequantized weight, keeps only the packed one, and lives
like a module.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from labkit.quant.linear import QuantLinear
from tests.quant.cases import (
    make_layer,
)


def layer_and_dense(bias=True, double_quant=True):
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias)
    layer = QuantLinear.from_linear(linear, double_quant=double_quant)
    return layer, layer.to_linear()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_output_and_gradients_equal_a_dense_layer_with_the_dequantized_weight(bias, double_quant):
    layer, dense = layer_and_dense(bias, double_quant)
    x = torch.randn(3, 5, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    if bias:
        dense.bias.requires_grad_()
    out, reference = layer(x), dense(y)
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_a_layer_made_double_computes_in_double():
    layer, dense = layer_and_dense(bias=True, double_quant=True)
    layer, dense, x = layer.double(), dense.double(), torch.randn(20, 96, dtype=torch.float64)
    assert layer.weight.dtype == torch.float64
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-14, atol=1e-14)


def test_output_equals_bitsandbytes_linear4bit():
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    theirs = bnb.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False
    )
    theirs.load_state_dict({"weight": linear.weight.data})
    theirs = theirs.to("cpu")
    x = torch.randn(7, 128)
    ours = QuantLinear.from_linear(linear, double_quant=False)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_another_dtype_equal_bitsandbytes_compute_dtype(bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias)
    theirs = bnb.nn.Linear4bit(128, 64, bias, compute_dtype=dtype, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    ours = QuantLinear.from_linear(linear, compute_dtype=dtype, scale_rounding="lookup")
    x = torch.randn(20, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, reference = ours(x), theirs(y)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    assert out.dtype == x.grad.dtype == torch.float32
    assert torch.equal(out, reference) and torch.equal(x.grad, y.grad)
    assert not torch.equal(out, QuantLinear.from_linear(linear)(x))  # it did round
    assert torch.equal(copy.deepcopy(ours)(x), out) and "compute_dtype" in repr(ours)
    with torch.no_grad():  # few rows too: what was asked for is what is computed
        torch.testing.assert_close(ours(x[:1]), reference[:1], rtol=1e-2, atol=1e-2)
        assert torch.equal(ours(x[:1]), ours(x[:1]).to(dtype).float())


def test_autograd_keeps_no_dense_weight():
    layer, _ = layer_and_dense()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 96, requires_grad=True))
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 96 * 80]


def test_state_dict_deepcopy_and_dtype_changes_keep_the_weight_exactly():
    layer, _ = layer_and_dense()
    other = QuantLinear.from_linear(nn.Linear(96, 80))
    other.load_state_dict(layer.state_dict())
    weight = layer.weight.dequantize()
    assert torch.equal(other.weight.dequantize(), weight)
    assert torch.equal(copy.deepcopy(layer).weight.dequantize(), weight)
    assert torch.equal(layer.bfloat16().float().weight.dequantize(), weight), (
        "the fp32 scales must not be rounded"
    )
    half = layer.to(torch.bfloat16)
    assert half(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 48), (1, 192), (95,)])
def test_wrong_widths_are_refused_like_by_a_dense_layer(shape):
    with pytest.raises(RuntimeError, match="shape"):
        make_layer()(torch.randn(shape))


def test_bias_trains_although_x_needs_no_gradient():
    layer = make_layer()
    layer(torch.randn(3, 96)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((80,), 3.0))


def test_state_goes_through_safetensors(tmp_path):
    layer, other = make_layer(), make_layer(seed=3)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(20, 96)
    assert torch.equal(other(x), layer(x)) and torch.equal(other(x[:1]), layer(x[:1]))


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

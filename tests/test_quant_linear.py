"""The 4-bit linear layer: it computes with the dequantized weight, keeps only the packed one, and lives like a module."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model

IDS = torch.arange(40).view(2, 20)


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


@pytest.mark.parametrize(
    ("spoil", "settings", "error", "message"),
    [
        (
            lambda last: last.weight.data[3, 5].fill_(torch.nan),
            {},
            ValueError,
            "^1: 1 of 2048 weights are NaN",
        ),
        (
            lambda last: last.weight.data[3, 5].fill_(-torch.inf),
            {},
            ValueError,
            "^1: 1 of 2048 weights are NaN",
        ),
        (lambda last: last.double(), {}, TypeError, "^1: a weight must be a float32.* not torch.float64"),
        (lambda last: None, {"codebook": "nf5"}, ValueError, "codebook='nf5' is not known"),
        (lambda last: None, {"blocksize": 64.0}, ValueError, "blocksize=64.0 is not known; choose one of"),
        (lambda last: None, {"scale_rounding": "up"}, ValueError, "scale_rounding='up' is not known"),
        (lambda last: None, {"compute_dtype": torch.int8}, ValueError, "is not a floating dtype"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_left_as_it_was(spoil, settings, error, message):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    spoil(model[1])
    before, random = copy.deepcopy(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        quantize_model(model, progress=False, **settings)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(type(layer) is nn.Linear for layer in model)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad and torch.equal(now.nan_to_num(), then.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_a_model_takes_no_random_numbers(dtype):
    model, random = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.get_rng_state()
    quantize_model(model, progress=False)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("x", [torch.ones(2, 95), torch.ones(2, 96, dtype=torch.long), torch.ones(96)])
def test_few_rows_of_another_width_or_dtype_are_refused(x):
    weight = QuantLinear.from_linear(nn.Linear(96, 64)).weight
    with pytest.raises(ValueError, match=r"this weight needs \(rows, 96\) float32 on a CPU"):
        weight.multiply(x)


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


def test_model_is_quantized_but_for_output_and_embedding(small_llama):
    before = sum(p.nbytes for n, p in small_llama.named_parameters() if "layers" in n and "norm" not in n)
    report = quantize_model(small_llama, progress=False)
    assert len(report) == 21 and isinstance(small_llama.lm_head, nn.Linear)
    assert report.before == before
    assert report.after == sum(m.weight.nbytes for m in small_llama.modules() if isinstance(m, QuantLinear))
    assert small_llama.lm_head.weight is small_llama.model.embed_tokens.weight
    assert not any(p.requires_grad for p in small_llama.parameters())
    assert "total" in str(report)


def test_dequantized_model_computes_the_same(small_llama):
    quantize_model(small_llama, progress=False)
    with torch.no_grad():
        quantized = small_llama(IDS).logits
        torch.testing.assert_close(dequantize_model(small_llama)(IDS).logits, quantized, rtol=1e-5, atol=1e-6)


def test_skip_leaves_layers_alone(small_llama):
    quantize_model(small_llama, skip=("down_proj", "layers.0.self_attn.q_proj"), progress=False)
    left = [n for n, m in small_llama.named_modules() if isinstance(m, nn.Linear)]
    assert left == [
        "model.layers.0.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in range(3)), "lm_head"
    ]  # fmt: skip


def test_skip_takes_one_name_too(small_llama):
    report = quantize_model(small_llama, skip="down_proj", progress=False)
    assert report and not any("down_proj" in name for name in report)


def test_mistakes_are_named(small_llama):
    with pytest.raises(ValueError, match="skip='down_porj' matches no linear layer"):
        quantize_model(small_llama, skip=("down_porj",), progress=False)
    quantize_model(small_llama, progress=False)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(small_llama, progress=False)
    with pytest.raises(TypeError, match="takes an nn.Linear"):
        QuantLinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="compute_dtype=torch.int8 is not a floating dtype"):
        QuantLinear.from_linear(nn.Linear(4, 4), compute_dtype=torch.int8)


def test_generates_inside_transformers(small_llama):
    quantize_model(small_llama, progress=False)
    dense = dequantize_model(copy.deepcopy(small_llama))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small_llama.generate(IDS, **options), dense.generate(IDS, **options))


def test_real_model_takes_4_13_bits_a_weight(smollm2):
    model = copy.deepcopy(smollm2[0])
    report = quantize_model(model, progress=False)
    weights = report.before / 4
    assert weights == 106_168_320
    assert 8 * report.after / weights == pytest.approx(4.127, abs=0.005)

"""The CUDA kernels on a GPU: bits, memory, graphs, compiled layers, two cards, and more weights than 32 bits count."""

import pytest
import torch
from torch import nn

from labkit.hardware import set_fast
from labkit.quant import direct
from labkit.quant.blockwise import dequantize_blocks, multiply_in_order, pack, quantize_blocks, unpack
from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.codebooks import codes_by_rank, nf4
from labkit.quant.config import BLOCKSIZES
from labkit.quant.kernels import operations
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import quantize, quantize_scales

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MANY = (1 << 31) + 3 * 64 + 2  # weights: more than 32 bits count, and no whole blocks


def assert_same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.equal(ours.cpu().view(-1).view(torch.uint8), theirs.cpu().view(-1).view(torch.uint8))


def by_reference(flat, levels, blocksize):
    """Packed codes, absmax and fp32 values, on the CPU."""
    codes, absmax = quantize_blocks(flat.float(), levels, blocksize)
    packed = pack(codes, pad=int(codes_by_rank(levels)[7]))
    return packed, absmax, dequantize_blocks(codes, absmax, levels, blocksize)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "optimal-64"])
def test_quantizing_and_dequantizing_equal_the_reference_on_the_cpu(codebook):
    levels = levels_of(codebook)
    for n in (1, 65, 560, 1_001_000):
        for blocksize in BLOCKSIZES:
            for dtype in DTYPES:
                flat = torch.randn(n).to(dtype)
                packed, absmax, values = by_reference(flat, levels, blocksize)
                q = quantize(flat.cuda(), codebook, blocksize, double_quant=False)
                assert_same_bits(q.packed, packed)
                assert_same_bits(q.scales, absmax)
                assert_same_bits(q.dequantize(), values.to(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e-39])
def test_double_quantization_on_the_device_equals_the_reference(scale):
    for n in (1, 255, 257, 100_000):
        absmax = torch.randn(n).abs() * scale
        set_fast(False)
        try:
            expected = quantize_scales(absmax.cuda())
        finally:
            set_fast(True)
        got = quantize_scales(absmax.cuda())
        for name in ("codes", "absmax", "offset"):
            assert_same_bits(getattr(got, name), getattr(expected, name))
    weight = torch.randn(300, 515, device="cuda")
    q = quantize(weight)
    values = q.to("cpu").dequantize(torch.float32)
    for dtype in DTYPES:
        assert_same_bits(q.dequantize(dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_few_rows_are_multiplied_in_the_stated_order_whatever_the_other_rows_are(dtype, double_quant):
    for height, width in [(3, 8), (64, 576), (100, 1096), (64, 4096)]:
        q = quantize(torch.randn(height, width, device="cuda"), double_quant=double_quant)
        matrix = q.to("cpu").dequantize(torch.float32).to(dtype)
        x = torch.randn(9, width).to(dtype)
        for rows in (1, 2, 3, 8, 9):
            assert_same_bits(q.multiply(x[:rows].cuda()), multiply_in_order(x[:rows], matrix))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_takes_few_rows_directly_and_agrees_with_the_dense_one_to_rounding(dtype, monkeypatch):
    layer = QuantLinear.from_linear(nn.Linear(512, 256).to("cuda", dtype))
    x, products = torch.randn(2, 512, device="cuda", dtype=dtype), []
    original = operations.multiply_4bit
    monkeypatch.setattr(operations, "multiply_4bit", lambda *a: products.append(a) or original(*a))
    with torch.no_grad():
        y = layer(x)
        layer(torch.randn(direct.FEW_ROWS_ON_GPU + 1, 512, device="cuda", dtype=dtype))
    layer(x.clone().requires_grad_()).sum().backward()
    assert len(products) == 1
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y, layer.to_linear()(x), rtol=rounding, atol=rounding)


def test_a_half_is_quantized_without_a_copy_in_fp32():
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.float16)
    quantize(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q = quantize(weight)
    assert torch.cuda.max_memory_allocated() - before < q.nbytes + 16 * weight.numel() / 64


def test_a_compiled_layer_gives_what_the_layer_gives():
    torch.compiler.reset()
    layer = QuantLinear.from_linear(nn.Linear(128, 64, device="cuda"))
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (2, 40):
        x = torch.randn(rows, 128, device="cuda", requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        (ours,), (theirs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(ours, theirs)
    torch.compiler.reset()


def test_calls_are_captured_in_a_graph_and_follow_what_lies_in_the_same_memory_later():
    q, other = (quantize(torch.randn(96, 128, device="cuda")) for _ in range(2))
    x, out = torch.randn(2, 128, device="cuda"), torch.empty(96, 128, device="cuda")
    expected, product = other.dequantize(), other.multiply(x)
    q.dequantize(out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # an error if anything is copied from the host, or waited for
        q.dequantize(out=out)
        y = q.multiply(x)
    q.packed.copy_(other.packed)
    for name, tensor in vars(q.scales).items():
        tensor.copy_(getattr(other.scales, name))
    graph.replay()
    assert_same_bits(out, expected)
    assert_same_bits(y, product)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_the_weight_is_when_another_card_is_the_current_one():
    weight = torch.randn(64, 128)
    expected = quantize(weight)
    with torch.cuda.device(0):
        q = quantize(weight.to("cuda:1"), double_quant=False)
        x = torch.randn(1, 128, device="cuda:1")
        assert q.dequantize().device == q.multiply(x).device == torch.device("cuda", 1)
        assert_same_bits(q.packed, expected.packed)
        assert_same_bits(expected.to("cuda:1").dequantize(), expected.dequantize())


def test_weights_beyond_what_32_bits_count_are_in_their_places():
    if torch.cuda.mem_get_info()[0] < 13 << 30:
        pytest.skip("needs 13 GiB of the device's memory")
    flat = torch.zeros(MANY, dtype=torch.float16, device="cuda")
    tail = MANY // 4096 * 4096 - 4096  # a whole number of blocks from the start
    flat[tail:] = torch.randn(MANY - tail)
    packed, absmax = operations.quantize_4bit(flat, nf4(), 64)
    expected_packed, expected_absmax, values = by_reference(flat[tail:].cpu(), nf4(), 64)
    assert_same_bits(packed[tail // 2 :], expected_packed)
    assert_same_bits(absmax[tail // 64 :], expected_absmax)
    operations.dequantize_4bit(PackedWeight(packed, absmax, nf4(), 64), MANY, torch.float16, flat)
    assert_same_bits(flat[tail:], values.half())
    assert not flat[:4096].any()
    assert unpack(packed[:2], 4).tolist() == [7, 7, 7, 7]

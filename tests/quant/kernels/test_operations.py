"""The kernels as PyTorch operations: registered, traced, compiled, and on fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from labkit.hardware import set_fast
from labkit.quant.codebooks import nf4
from labkit.quant.kernels import operations
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.tensor import quantize, quantize_scales

OPS = ["quantize_4bit", "dequantize_4bit", "dequantize_4bit_out"]


def op_arguments(name, nested):
    flat = torch.randn(200)
    packed, absmax = operations.quantize_4bit(flat, nf4(), 64)
    scales = quantize_scales(absmax)
    end = (scales.absmax, scales.offset) if nested else (None, None)
    first = scales.codes if nested else absmax
    return {
        "quantize_4bit": (flat, nf4().clone(), 64),
        "dequantize_4bit": (packed, first, nf4().clone(), 64, 200, torch.bfloat16, *end),
        "dequantize_4bit_out": (packed, first, nf4().clone(), 64, torch.empty(200), *end),
    }[name]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operations_pass_opcheck(name, nested):
    torch.library.opcheck(getattr(torch.ops.labkit, name).default, op_arguments(name, nested))


@pytest.mark.parametrize("name", OPS[:2])
def test_operations_equal_the_direct_call(name):
    arguments = op_arguments(name, False)
    theirs = getattr(torch.ops.labkit, name)(*arguments)
    if name == "dequantize_4bit":  # the weight is one value, up to the operation
        packed, scales, levels, blocksize, n, dtype, nested, offset = arguments
        arguments = PackedWeight(packed, scales, levels, blocksize, nested, offset), n, dtype
    ours = getattr(operations, name)(*arguments)
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("fast", [True, False])
def test_dequantize_compiles_without_a_graph_break_and_gives_the_same_bits(double_quant, fast):
    torch.compiler.reset()
    set_fast(fast)
    try:
        q = quantize(torch.randn(96, 128), double_quant=double_quant)
        x = torch.randn(4, 128, requires_grad=True)

        def layer(x):
            return x @ q.dequantize().T

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y, expected = compiled(x), layer(x)
        assert torch.equal(y, expected)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
        assert torch.equal(gradient, expected_gradient)
    finally:
        set_fast(True)
        torch.compiler.reset()


@pytest.mark.parametrize("fast", [True, False])
def test_fake_and_meta_tensors_have_the_real_shapes_and_dtypes(fast):
    set_fast(fast)
    try:
        for n, blocksize in [(1, 64), (65, 64), (4096, 32), (1001, 4096)]:
            packed, absmax = operations.quantize_4bit(torch.randn(n), nf4(), blocksize)
            with FakeTensorMode() as mode:
                flat, levels = torch.empty(n), mode.from_tensor(nf4())
                got = operations.quantize_4bit(flat, levels, blocksize)
                back = operations.dequantize_4bit(PackedWeight(*got, levels, blocksize), n, torch.float16)
            assert (got[0].shape, got[0].dtype) == (packed.shape, packed.dtype)
            assert (got[1].shape, got[1].dtype) == (absmax.shape, absmax.dtype)
            assert (back.shape, back.dtype) == ((n,), torch.float16)
        assert quantize(torch.empty(33, 7, device="meta")).packed.shape == (116, 1)
    finally:
        set_fast(True)

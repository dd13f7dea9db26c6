"""The fields of a 4-bit weight are checked when it is made, and what kernels are handed once more."""

from dataclasses import replace

import pytest
import torch

from labkit.quant.codebooks import codebook, nf4
from labkit.quant.kernels import operations
from labkit.quant.kernels.packed import PackedWeight
from labkit.quant.tensor import NestedScales, QuantizedTensor, quantize, quantize_scales
from tests.quant.cases import assert_same_bits, directly

Q = quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
PLAIN = quantize(Q.dequantize(), double_quant=False)


@pytest.mark.parametrize(
    ("weight", "changes", "error", "message"),
    [
        (Q, {"blocksize": -64}, ValueError, "blocksize=-64 is not known; choose one of"),
        (Q, {"blocksize": 0}, ValueError, "blocksize=0 is not known"),
        (Q, {"blocksize": 64.0}, ValueError, "blocksize=64.0 is not known"),
        (
            Q,
            {"blocksize": 32},
            ValueError,
            r"scales.codes is \(96,\) torch.uint8; 6144 weights in blocks of 32 need",
        ),
        (Q, {"codebook": "nf5"}, ValueError, "codebook='nf5' is not known"),
        (Q, {"codebook": "dynamic8"}, ValueError, "has 256 levels; a 4-bit weight needs one with 16"),
        (Q, {"shape": (64, 97)}, ValueError, r"packed is \(3072, 1\) torch.uint8; 6208 weights"),
        (Q, {"shape": (2**40, 2**40)}, ValueError, r"packed is \(3072, 1\)"),
        (Q, {"shape": (-64, -96)}, ValueError, r"shape=\(-64, -96\) must be the sizes of a weight"),
        (Q, {"shape": (64.0, 96)}, ValueError, "whole numbers of at least 1"),
        (Q, {"shape": ()}, ValueError, "whole numbers of at least 1"),
        (Q, {"shape": 6144}, ValueError, "whole numbers of at least 1"),
        (Q, {"dtype": torch.int8}, TypeError, "dtype=torch.int8: weights cannot be dequantized to it"),
        (Q, {"dtype": "float32"}, TypeError, "dtype='float32'"),
        (Q, {"packed": Q.packed[:-1]}, ValueError, r"packed is \(3071, 1\)"),
        (Q, {"packed": Q.packed.view(-1)}, ValueError, r"packed is \(3072,\)"),
        (Q, {"packed": Q.packed.bool()}, ValueError, "torch.bool"),
        (Q, {"packed": torch.zeros(6144, 1, dtype=torch.uint8)[::2]}, ValueError, "need a contiguous, dense"),
        (Q, {"packed": Q.packed.to_sparse()}, ValueError, "need a contiguous, dense"),
        (Q, {"packed": Q.packed.to("meta")}, ValueError, "on cpu, and the packed weight on meta; move both"),
        (Q, {"packed": bytes(3072)}, TypeError, "packed must be a tensor, not bytes"),
        (Q, {"scales": None}, TypeError, "scales must be a tensor, not NoneType"),
        (Q, {"scales": replace(Q.scales, offset=None)}, TypeError, "scales.offset must be a tensor"),
        (Q, {"scales": replace(Q.scales, offset=torch.zeros(1))}, ValueError, r"scales.offset is \(1,\)"),
        (Q, {"scales": replace(Q.scales, absmax=torch.zeros(0))}, ValueError, r"scales.absmax is \(0,\)"),
        (Q, {"scales": replace(Q.scales, codes=Q.scales.codes.float())}, ValueError, "scales.codes is"),
        (PLAIN, {"scales": PLAIN.scales[:-1]}, ValueError, r"scales is \(95,\) torch.float32"),
        (PLAIN, {"scales": PLAIN.scales.double()}, ValueError, "torch.float64"),
        (
            PLAIN,
            {"scales": PLAIN.scales.to("meta")},
            ValueError,
            "scales is on meta, and the packed weight on cpu",
        ),
    ],
)
def test_a_field_that_does_not_fit_is_refused_when_the_weight_is_made(weight, changes, error, message):
    with pytest.raises(error, match=message):
        replace(weight, **changes)


def test_a_shape_may_be_any_sequence_and_is_kept_as_a_size():
    for shape in ([64, 96], (64, 96), torch.Size((64, 96))):
        q = QuantizedTensor(Q.packed, Q.scales, shape, Q.dtype, "nf4", 64)
        assert isinstance(q.shape, torch.Size)
        assert_same_bits(q.dequantize(), Q.dequantize())


@pytest.mark.parametrize(
    "changes",
    [
        {"blocksize": -64},
        {"blocksize": 0},
        {"blocksize": 63},
        {"levels": nf4()[:15]},
        {"levels": nf4().double()},
        {"packed": Q.packed.char()},
        {"packed": Q.packed.to("meta")},
        {"nested": Q.scales.absmax.to("meta")},
        {"offset": torch.zeros(0)},
        {"offset": None},
    ],
)
def test_kernels_refuse_by_themselves_what_they_could_not_read(changes):
    weight = PackedWeight(Q.packed, Q.scales.codes, nf4(), 64, Q.scales.absmax, Q.scales.offset)._replace(
        **changes
    )
    out = torch.full((6144,), 7.0)
    for call in (
        lambda: operations.kernels_on(False).dequantize_4bit(weight, out),
        lambda: operations.kernels_on(False).multiply_4bit(torch.zeros(2, 96), weight, torch.zeros(2, 64)),
    ):
        with pytest.raises(ValueError, match=r"a kernel|contiguous|positive even"):
            call()
    assert (out == 7).all()


def test_registered_operations_refuse_the_same():
    levels = nf4().clone()
    with pytest.raises(ValueError, match="blocksize=-64 must be a positive even number"):
        torch.ops.labkit.dequantize_4bit(PLAIN.packed, PLAIN.scales, levels, -64, 6144, torch.float32)
    with pytest.raises(ValueError, match="need .* contiguous bytes"):
        torch.ops.labkit.dequantize_4bit(PLAIN.packed, PLAIN.scales, levels, 64, 6146, torch.bfloat16)
    for flat, table, blocksize in ((torch.zeros(64).half(), levels, 64), (torch.zeros(64), levels[:3], 64)):
        with pytest.raises(ValueError, match="a kernel needs"):
            torch.ops.labkit.quantize_4bit(flat, table, blocksize)
    with pytest.raises(ValueError, match="blocksize=-2"):
        torch.ops.labkit.quantize_4bit(torch.zeros(64), levels, -2)


@directly
def test_the_kernel_that_multiplies_takes_whole_steps_only():
    weight = PackedWeight(Q.packed, Q.scales.codes, nf4(), 64, Q.scales.absmax, Q.scales.offset)
    with pytest.raises(ValueError, match="no kernel multiplies rows of 48 numbers, .*|multiple of 32"):
        operations.multiply_4bit(torch.zeros(2, 48), weight, 128)


@pytest.mark.parametrize("out", [torch.empty(64, 96, device="meta"), torch.empty(96, 64).T])
def test_a_place_that_cannot_be_written_is_refused(out):
    with pytest.raises(ValueError, match="needs a contiguous tensor of shape"):
        Q.dequantize(out=out)


@pytest.mark.parametrize("rounding", ["nearest", "lookup"])
def test_finite_weights_near_the_largest_number_stay_finite_under_double_quantization(rounding, path):
    torch.manual_seed(0)
    largest = torch.finfo(torch.float32).max
    for weight in (
        torch.full((256, 64), 3e38),
        torch.rand(600, 64) * 0.9 * largest,
        torch.full((256, 64), largest),
    ):
        weight[::3] *= -1
        q = quantize(weight, scale_rounding=rounding)
        assert q.dequantize().isfinite().all()
        error = (q.dequantize().double() - weight.double()).abs().max() / largest
        assert error < 0.16  # half the widest gap between levels
        mean = quantize(weight, double_quant=False).scales.double().mean()
        assert_same_bits(q.scales.offset, mean.float())


def test_scales_that_would_be_rounded_beyond_the_largest_number_are_refused(path):
    weight = torch.full((256, 64), torch.finfo(torch.float32).max)
    weight[5] = 1e30
    with pytest.raises(ValueError, match=r"3.403e\+38, leaves float32 no room .* double_quant=False"):
        quantize(weight)
    assert quantize(weight, double_quant=False).dequantize().isfinite().all()


def test_the_offset_of_ordinary_scales_is_their_mean_as_in_bitsandbytes():
    absmax = torch.rand(1000) + 0.1
    assert_same_bits(quantize_scales(absmax).offset, absmax.mean())


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda w: w.to_sparse(), "sparse_coo"),
        (lambda w: w.to_sparse_csr(), "sparse_csr"),
        (lambda w: w.to_mkldnn(), "mkldnn"),
        (lambda w: torch.nested.as_nested_tensor([w, w]), "nested"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_not_dense_are_refused(make, given):
    with pytest.raises(
        TypeError, match=rf"a weight must be a dense tensor, not a {given} one; give weight.to_dense"
    ):
        quantize(make(torch.eye(64)))


def test_weights_are_not_quantized_in_a_map():
    with pytest.raises(TypeError, match="not within torch.func.vmap; loop over the weights"):
        torch.func.vmap(lambda w: quantize(w).dequantize())(torch.randn(3, 64, 64))


def test_every_codebook_of_sixteen_levels_is_allowed():
    for name in ("nf4", "fp4", "fp4-e3m0", "int4", "optimal-64"):
        assert replace(PLAIN, codebook=name).dequantize().abs().max() <= PLAIN.absmax.max()
        assert len(codebook(name)) == 16
    assert isinstance(Q.scales, NestedScales)

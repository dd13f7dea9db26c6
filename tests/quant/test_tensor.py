"""Quantization against bitsandbytes, byte for byte, with the fast kernels and with the readable reference.

Two facts about bitsandbytes 0.50 on a CPU stand in the way, each verified by a test of its own:

- its AVX-512 `dequantize_4bit` finds a weight's scale per row and not in the flat tensor, and so takes wrong
  scales when a row does not hold whole blocks. Its AVX2 path and its generic code agree with the format; for
  such shapes the generic code is the oracle here.
- `compress_statistics` on a CPU rounds by look-up (`scale_rounding="lookup"`). The rounding of its CUDA
  kernel, "nearest", is in its generic `quantize_blockwise`, reached by its dispatch key.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.hardware import set_fast
from labkit.quant.blockwise import unpack
from labkit.quant.codebooks import codebook as levels_of
from labkit.quant.config import BLOCKSIZES
from labkit.quant.tensor import quantize, quantize_scales
from tests.quant.cases import (
    DTYPES,
    assert_same_bits,
    bnb_dequantize,
    bnb_generic_dequantize,
    bnb_quantize,
    generic_quantize_blockwise,
)

ODD_SHAPES = [(1,), (2,), (5,), (63,), (64,), (65,), (7, 80), (3, 33), (2, 3, 5, 7), (129, 64), (1000, 1001)]
many = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_equals_bitsandbytes(weight, codebook, blocksize, double_quant):
    q = quantize(weight, codebook, blocksize, double_quant, scale_rounding="lookup")
    packed, state = bnb_quantize(weight, codebook, blocksize, double_quant)
    assert_same_bits(q.packed, packed)
    if double_quant:
        assert_same_bits(q.scales.codes, state.absmax)
        assert_same_bits(q.scales.absmax, state.state2.absmax)
        assert_same_bits(q.scales.offset, state.offset)
    else:
        assert_same_bits(q.scales, state.absmax)
    assert_same_bits(q.dequantize(), bnb_generic_dequantize(packed, state))
    return q, packed, state


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_every_block_size_equals_bitsandbytes(path, codebook, dtype, double_quant):
    torch.manual_seed(0)
    for blocksize in BLOCKSIZES:
        weight = torch.randn(9, 4096).to(dtype)
        q, packed, state = assert_equals_bitsandbytes(weight, codebook, blocksize, double_quant)
        assert_same_bits(q.dequantize(), bnb_dequantize(packed, state))


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_odd_shapes_equal_bitsandbytes(path, codebook, shape):
    torch.manual_seed(1)
    for double_quant in (False, True):
        assert_equals_bitsandbytes(torch.randn(shape), codebook, 64, double_quant)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_zeros_in_some_or_all_blocks_equal_bitsandbytes(path, codebook):
    torch.manual_seed(2)
    some = torch.randn(64, 100)
    some[10:20] = 0
    for weight in (some, torch.zeros(64, 64), torch.zeros(3), -torch.zeros(70)):
        for double_quant in (False, True):
            q, *_ = assert_equals_bitsandbytes(weight, codebook, 64, double_quant)
            assert q.dequantize().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_and_huge_weights_equal_bitsandbytes(path, dtype):
    torch.manual_seed(3)
    largest = torch.finfo(dtype).max
    for scale in (1e-45, 1e-40, 1e-38, 3e-38, largest / 8):
        weight = (torch.randn(20, 64).clamp(-4, 4) * scale).to(dtype)
        assert_equals_bitsandbytes(weight, "nf4", 64, double_quant=False)
    mixed = torch.cat([torch.randn(5, 64) * 1e-39, torch.randn(5, 64)]).to(dtype)
    assert_equals_bitsandbytes(mixed, "nf4", 64, double_quant=True)


@st.composite
def weights(draw):
    """A tensor of any small shape and dtype, of values that provoke ties, edges, zeros and denormals."""
    shape = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    flat = torch.randn(torch.Size(shape).numel(), generator=generator)
    kind = draw(st.sampled_from(["normal", "tiny", "grid", "levels", "sparse", "outlier", "constant"]))
    if kind == "tiny":
        flat *= 10.0 ** draw(st.integers(-45, -30))
    elif kind == "grid":
        flat = (flat * 8).round() / 8
    elif kind == "levels":  # exactly on the levels and midpoints
        table = levels_of(draw(st.sampled_from(["nf4", "fp4"]))).sort().values
        table = torch.cat([table, (table[1:] + table[:-1]) / 2])
        flat = table[torch.randint(0, 31, flat.shape, generator=generator)]
    elif kind == "sparse":
        flat[torch.rand(flat.shape, generator=generator) < 0.9] = 0
    elif kind == "outlier":
        flat[torch.randint(0, flat.numel(), (1,), generator=generator)] = 1e4
    elif kind == "constant":
        flat[:] = flat[0]
    return flat.to(draw(st.sampled_from(DTYPES))).view(shape)


@many
@given(weights(), st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCKSIZES), st.booleans())
def test_any_weight_equals_bitsandbytes(path, weight, codebook, blocksize, double_quant):
    assert_equals_bitsandbytes(weight, codebook, blocksize, double_quant)


@settings(max_examples=1000, deadline=None)
@given(
    weights(),
    st.sampled_from(["nf4", "fp4", "fp4-e3m0", "int4", "optimal-64"]),
    st.sampled_from(BLOCKSIZES),
    st.booleans(),
)
def test_fast_and_reference_agree_for_any_codebook(weight, codebook, blocksize, double_quant):
    fast = quantize(weight, codebook, blocksize, double_quant)
    set_fast(False)
    try:
        reference = quantize(weight, codebook, blocksize, double_quant)
        expected = [reference.dequantize(dtype) for dtype in DTYPES]
    finally:
        set_fast(True)
    assert_same_bits(fast.packed, reference.packed)
    assert_same_bits(fast.absmax, reference.absmax)
    for dtype, value in zip(DTYPES, expected):
        assert_same_bits(fast.dequantize(dtype), value)
        assert_same_bits(fast.dequantize(out=torch.full(weight.shape, 9, dtype=dtype)), value)


def test_codes_are_the_nearest_level_by_brute_force():
    torch.manual_seed(4)
    weight = torch.randn(512, 64)
    for codebook in ("nf4", "fp4", "fp4-e3m0", "int4", "optimal-64"):
        q = quantize(weight, codebook, double_quant=False)
        scaled = weight.double() / weight.double().abs().amax(dim=1, keepdim=True)
        distance = (scaled[..., None] - levels_of(codebook).double()).abs()  # (512, 64, 16)
        chosen = distance.gather(-1, unpack(q.packed, weight.numel()).view(512, 64, 1).long())[..., 0]
        assert (chosen - distance.amin(dim=-1)).max() < 1e-7  # a tie in fp32 may go either way in fp64


@pytest.mark.parametrize("n_blocks", [1, 255, 256, 257, 5000])
def test_nearest_rounding_of_scales_equals_bitsandbytes_generic_code(n_blocks):
    torch.manual_seed(5)
    absmax = torch.randn(n_blocks, 64).abs().amax(dim=1)
    nested = quantize_scales(absmax, "nearest")
    codes, scales = generic_quantize_blockwise(absmax - absmax.mean(), levels_of("dynamic8"))
    assert_same_bits(nested.codes, codes)
    assert_same_bits(nested.absmax, scales)


def test_nearest_rounding_of_scales_is_nearest_by_brute_force_and_lookup_is_not():
    torch.manual_seed(6)
    absmax = torch.randn(256 * 64, 64).abs().amax(dim=1)
    centred = (absmax - absmax.mean()).view(-1, 256).double()
    distance = (centred / centred.abs().amax(dim=1, keepdim=True)).view(-1, 1) - levels_of(
        "dynamic8"
    ).double()
    distance = distance.abs()  # (16384, 256)

    def excess(rounding):
        codes = quantize_scales(absmax, rounding).codes.long()
        return (distance.gather(1, codes[:, None])[:, 0] - distance.amin(dim=1)).max()

    assert excess("nearest") < 1e-7
    assert excess("lookup") > 1e-7


@pytest.mark.parametrize("shape", [(7, 80), (5, 48), (64, 96)])
def test_fact_bitsandbytes_avx512_dequantize_takes_scales_by_row(shape):
    torch.manual_seed(7)
    packed, state = bnb_quantize(torch.randn(shape), double_quant=False)
    theirs, generic = bnb.dequantize_4bit(packed, state), bnb_generic_dequantize(packed, state)
    rows, width = shape
    column_block = torch.arange(width) // 64
    index = torch.arange(rows)[:, None] * (width // 64) + column_block  # (rows, width): what it computes
    codes = unpack(packed, rows * width).view(shape).long()
    by_row = state.code[codes] * state.absmax[index]
    assert not torch.equal(by_row, generic)
    assert torch.equal(theirs, by_row if torch.cpu._is_avx512_supported() else generic)


def test_bits_per_weight_are_4_5_and_4_127():
    weight = torch.randn(1024, 1024)
    assert quantize(weight, double_quant=False).bits_per_param == 4.5
    assert quantize(weight).bits_per_param == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


# bitsandbytes' published mean |error| and mean relative error of NF4 on randn(1024, 1024), with their
# deviations
PUBLISHED = {
    32: (0.067746, 0.000069, 0.189726, 0.000304),
    64: (0.072798, 0.000074, 0.203339, 0.000340),
    128: (0.076831, 0.000091, 0.215237, 0.000391),
    256: (0.080337, 0.000102, 0.226105, 0.000398),
    1024: (0.086610, 0.000187, 0.245370, 0.000600),
    4096: (0.092547, 0.000360, 0.262473, 0.000999),
}


@pytest.mark.parametrize("blocksize", PUBLISHED)
def test_nf4_errors_are_those_that_bitsandbytes_publishes(blocksize):
    torch.manual_seed(8)
    weight = torch.randn(1024, 1024)
    error = quantize(weight, blocksize=blocksize, double_quant=False).error(weight)
    mean_abs, sd_abs, mean_rel, sd_rel = PUBLISHED[blocksize]
    relative = (quantize(weight, blocksize=blocksize, double_quant=False).dequantize() - weight).abs()
    relative = (relative / (weight.abs() + 1e-8)).mean().item()  # the definition in bitsandbytes' tests
    assert abs(error["mean_abs"] - mean_abs) < 7 * sd_abs
    assert abs(relative - mean_rel) < 7 * sd_rel


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
# in a whole block, in another, and in the incomplete last one
@pytest.mark.parametrize("where", [0, 70, 129])
def test_nan_and_infinity_are_refused_with_their_number(path, bad, where):
    for dtype in DTYPES:
        weight = torch.randn(130).to(dtype)
        weight[where] = bad
        with pytest.raises(ValueError, match=r"1 of 130 weights are NaN or infinite"):
            quantize(weight)


def test_wrong_arguments_are_refused_with_what_is_allowed():
    weight = torch.randn(64, 64)
    for kwargs, message in [
        ({"codebook": "nf3"}, "'nf3' is not known"),
        ({"codebook": "dynamic8"}, "has 256 levels"),
        ({"blocksize": 48}, r"blocksize=48 is not known; choose one of \(32"),
        ({"scale_rounding": "up", "double_quant": False}, "scale_rounding='up'"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize(weight, **kwargs)
    with pytest.raises(TypeError, match=r"not torch[.]int64"):
        quantize(torch.arange(64))
    with pytest.raises(ValueError, match="is empty"):
        quantize(torch.empty(0, 64))
    with pytest.raises(ValueError, match=r"needs a contiguous tensor of shape \(64, 64\)"):
        quantize(weight).dequantize(out=torch.empty(64, 32))


def test_a_transposed_weight_is_quantized_in_its_own_order():
    weight = torch.randn(64, 96).T
    assert_same_bits(quantize(weight).packed, quantize(weight.contiguous()).packed)


@pytest.mark.parametrize("fast", [True, False])
def test_weights_are_dequantized_to_any_floating_dtype_and_to_no_other(fast):
    q = quantize(torch.randn(33, 97))
    exact = q.dequantize()
    set_fast(fast)
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            assert torch.equal(q.dequantize(dtype).double(), exact.to(dtype).double())
            assert torch.equal(
                q.dequantize(out=torch.empty(33, 97, dtype=dtype)).double(), exact.to(dtype).double()
            )
        for dtype in (torch.int8, torch.int32, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match="cannot be dequantized to"):
                q.dequantize(dtype)
            with pytest.raises(TypeError, match="cannot be dequantized to"):
                q.dequantize(out=torch.empty(33, 97, dtype=dtype))
    finally:
        set_fast(True)

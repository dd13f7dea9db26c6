"""bitsandbytes' checkpoints: written byte for byte, read back, and refused where a part is missing."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch

from labkit.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from labkit.quant.tensor import NestedScales, quantize
from tests.quant.cases import (
    DTYPES,
    assert_same_bits,
)


def bnb_linear(weight, codebook, double_quant):
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type=codebook)
    settings_4bit = {"quant_type": codebook, "compress_statistics": double_quant, "blocksize": 64}
    layer.weight = Params4bit(weight, requires_grad=False, **settings_4bit)
    return layer.to("cpu")  # quantizes


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear4bit_state_dict_is_written_byte_for_byte_and_read_back(codebook, double_quant, dtype):
    torch.manual_seed(9)
    weight = torch.randn(96, 128).to(dtype)
    theirs = bnb_linear(weight, codebook, double_quant).state_dict()
    q = quantize(weight, codebook, 64, double_quant, scale_rounding="lookup")
    ours = to_bitsandbytes(q)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_same_bits(ours[key], theirs[key])
    back = from_bitsandbytes({f"model.q_proj.{k}": v for k, v in theirs.items()}, "model.q_proj.weight")
    assert (back.shape, back.dtype, back.codebook, back.blocksize) == (q.shape, q.dtype, codebook, 64)
    assert isinstance(back.scales, NestedScales) == double_quant
    assert_same_bits(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_what_we_write(double_quant):
    from bitsandbytes.nn import Params4bit

    q = quantize(torch.randn(64, 128), double_quant=double_quant)
    entries = to_bitsandbytes(q, "weight")
    state = {key.removeprefix("weight."): value for key, value in entries.items() if key != "weight"}
    parameter = Params4bit.from_prequantized(entries["weight"], state, device="cpu")
    assert_same_bits(bnb.dequantize_4bit(parameter.data, parameter.quant_state), q.dequantize())


def test_a_4bit_checkpoint_saved_by_transformers_is_read(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
    )
    torch.manual_seed(10)
    full = LlamaForCausalLM(config)
    full.save_pretrained(tmp_path / "full")
    settings_4bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    four_bit = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=settings_4bit, device_map="cpu", dtype=torch.float32
    )
    four_bit.save_pretrained(tmp_path / "four_bit")
    saved = load_file(tmp_path / "four_bit" / "model.safetensors")
    names = [key.partition(".quant_state.")[0] for key in saved if ".quant_state." in key]
    assert len(names) == 7
    for name in names:
        expected = quantize(full.get_parameter(name), scale_rounding="lookup").dequantize()
        assert_same_bits(from_bitsandbytes(saved, name).dequantize(torch.float32), expected)


def test_what_cannot_be_written_or_read_is_refused():
    with pytest.raises(ValueError, match="no codebook 'int4'"):
        to_bitsandbytes(quantize(torch.randn(64, 64), "int4"))
    entries = to_bitsandbytes(quantize(torch.randn(64, 64)), "a.weight")
    with pytest.raises(KeyError, match=r"no 4-bit weight .b.weight. .* It holds: a.weight"):
        from_bitsandbytes(entries, "b.weight")
    entries["a.weight.quant_map"] = entries["a.weight.quant_map"].flip(0)
    with pytest.raises(ValueError, match=r"a[.]weight: its nf4 codebook differs"):
        from_bitsandbytes(entries, "a.weight")


def test_a_checkpoint_that_lacks_a_part_is_refused_and_the_part_named():
    entries = to_bitsandbytes(quantize(torch.randn(64, 64)), "a.weight")
    for part in ("quant_map", "absmax", "nested_quant_map", "nested_absmax"):
        rest = {key: value for key, value in entries.items() if key != f"a.weight.{part}"}
        with pytest.raises(KeyError, match=rf"lacks a[.]weight[.]{part}, without"):
            from_bitsandbytes(rest, "a.weight")
    plain = to_bitsandbytes(quantize(torch.randn(64, 64), double_quant=False), "a.weight")
    for absmax, other in ((entries, plain), (plain, entries)):
        mixed = other | {"a.weight.absmax": absmax["a.weight.absmax"]}
        with pytest.raises(ValueError, match="the two do not belong together"):
            from_bitsandbytes(mixed, "a.weight")


def describe(entries, **changes):
    """The entries of a weight with another description; None takes a key out."""
    key = next(key for key in entries if ".quant_state." in key)
    rest = json.loads(bytes(entries[key].tolist())) | changes
    letters = json.dumps({name: value for name, value in rest.items() if value is not None}).encode()
    return entries | {key: torch.tensor(list(letters), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": None}, {"quant_type": [1]}, {"blocksize": None}, {"blocksize": True}, {"blocksize": -64},
        {"blocksize": 64.0}, {"dtype": None}, {"dtype": "load"}, {"dtype": "int8"}, {"dtype": 7}, {"shape": None},
        {"shape": 7}, {"shape": ["a"]}, {"shape": [64.0, 64]}, {"shape": [-64, -64]}, {"shape": [64, 65]},
        {"nested_offset": None}, {"nested_offset": "x"}, {"nested_offset": float("nan")}, {"nested_blocksize": 64},
    ],
)  # fmt: skip
def test_a_description_that_is_damaged_is_refused(changes):
    entries = describe(to_bitsandbytes(quantize(torch.randn(64, 64)), "a.weight"), **changes)
    with pytest.raises(ValueError, match="a[.]weight: |4160 weights in blocks of 64 need"):
        from_bitsandbytes(entries, "a.weight")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_scales_that_are_no_largest_absolute_values_are_refused(double_quant, value):
    entries = to_bitsandbytes(quantize(torch.randn(64, 64), double_quant=double_quant), "a.weight")
    scales = entries["a.weight.nested_absmax" if double_quant else "a.weight.absmax"]
    scales[0] = float(value)
    with pytest.raises(ValueError, match="its scales hold NaN, infinity or numbers below 0"):
        from_bitsandbytes(entries, "a.weight")


def test_a_codebook_cut_short_or_with_nan_is_refused():
    entries = to_bitsandbytes(quantize(torch.randn(64, 64)), "a.weight")
    for levels in (entries["a.weight.quant_map"][:3], entries["a.weight.quant_map"] * float("nan")):
        with pytest.raises(ValueError, match="its nf4 codebook differs"):
            from_bitsandbytes(entries | {"a.weight.quant_map": levels}, "a.weight")

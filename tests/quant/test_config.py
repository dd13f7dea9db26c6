"""The settings of quantization, checked when they are given: as one object or one by one, everywhere."""

import copy
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.provenance import read_provenance
from labkit.lora.config import LoRAConfig
from labkit.lora.qlora import add_qlora
from labkit.quant.config import SETTINGS, QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.tensor import quantize
from tests.conftest import make_small_llama
from tests.quant.cases import assert_same_bits

FP4 = QuantConfig("fp4", 128, double_quant=False, compute_dtype=torch.bfloat16)
FP4_SETTINGS = {"codebook": "fp4", "blocksize": 128, "double_quant": False, "compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"codebook": "nf5"},
            r"codebook='nf5' is not known; choose one of \('nf4', .*; did you mean 'nf4'\?",
        ),
        ({"codebook": None}, "codebook=None is not known; choose one of"),
        ({"codebook": ["nf4"]}, r"codebook=\['nf4'\] is not known; choose one of"),
        ({"codebook": "dynamic8"}, "has 256 levels; a 4-bit weight needs one with 16"),
        ({"codebook": "optimal-1"}, "use 2 or more"),
        ({"blocksize": 48}, r"blocksize=48 is not known; choose one of \(32, 64"),
        ({"blocksize": 64.0}, "blocksize=64.0 is not known"),
        ({"blocksize": "64"}, "blocksize='64' is not known"),
        ({"blocksize": True}, "blocksize=1 is not known"),
        ({"double_quant": "no"}, r"double_quant='no' is not known; choose one of \(True, False\)"),
        ({"double_quant": 1}, "double_quant=1 is not known"),
        ({"scale_rounding": "neares"}, "scale_rounding='neares' is not known.*did you mean 'nearest'"),
        (
            {"compute_dtype": torch.int8},
            "compute_dtype=torch.int8 is not a floating dtype; choose torch.float32",
        ),
        ({"compute_dtype": "bfloat16"}, "compute_dtype='bfloat16' is not a floating dtype"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_wherever_it_is_given(settings, message):
    calls = [
        lambda: QuantConfig(**settings),
        lambda: quantize(torch.randn(64, 64), **settings),
        lambda: QuantLinear.from_linear(nn.Linear(64, 64), **settings),
        lambda: quantize_model(nn.Sequential(nn.Linear(64, 64)), progress=False, **settings),
        lambda: add_qlora(make_small_llama(num_hidden_layers=1), LoRAConfig(), **settings),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest_one():
    model = make_small_llama(num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    for call in (
        lambda: quantize(torch.randn(64, 64), block_size=32),
        lambda: QuantLinear.from_linear(nn.Linear(64, 64), block_size=32),
        lambda: quantize_model(model, progress=False, block_size=32),
        lambda: add_qlora(model, LoRAConfig(init="pissa"), block_size=32),
    ):
        message = (
            "'block_size' is not a setting of quantization; did you mean 'blocksize'.* codebook, blocksize"
        )
        with pytest.raises(TypeError, match=message):
            call()
    assert all(p.requires_grad for p in model.parameters()) and before.keys() == model.state_dict().keys()


def test_a_config_and_settings_together_are_refused():
    weight = torch.randn(64, 64)
    for call in (
        lambda: quantize(weight, FP4, 64),
        lambda: quantize(weight, FP4, blocksize=64),
        lambda: quantize(weight, config=FP4, blocksize=64),
        lambda: quantize_model(nn.Sequential(nn.Linear(64, 64)), FP4, blocksize=64),
        lambda: add_qlora(
            make_small_llama(num_hidden_layers=1), LoRAConfig(), quantization=FP4, blocksize=64
        ),
    ):
        with pytest.raises(TypeError, match=r"codebook='fp4'.* and (blocksize=)?64 are given together"):
            call()
    with pytest.raises(TypeError, match="multiple values for argument 'codebook'"):
        quantize(weight, "nf4", codebook="fp4")


def test_a_config_its_values_in_order_and_its_values_by_name_give_the_same_bits():
    weight = torch.randn(96, 128)
    expected = quantize(weight, codebook="fp4", blocksize=128, double_quant=False)
    assert (expected.codebook, expected.blocksize) == ("fp4", 128)
    for q in (
        quantize(weight, FP4),
        quantize(weight, config=FP4),
        quantize(weight, "fp4", 128, False),
        quantize(weight, "fp4", blocksize=128, double_quant=False),
        quantize(weight, **asdict(FP4)),
    ):
        assert_same_bits(q.packed, expected.packed)
        assert_same_bits(q.scales, expected.scales)
        assert (q.codebook, q.blocksize, q.dtype) == ("fp4", 128, torch.float32)
    assert_same_bits(quantize(weight).packed, quantize(weight, QuantConfig()).packed)


def test_layers_and_models_take_a_config_or_its_values():
    linear, x = nn.Linear(128, 96), torch.randn(20, 128)
    layers = [QuantLinear.from_linear(linear, FP4), QuantLinear.from_linear(linear, **FP4_SETTINGS)]
    for given in (FP4, None):
        model = nn.Sequential(copy.deepcopy(linear))
        quantize_model(model, given, progress=False, **({} if given else FP4_SETTINGS))
        layers.append(model[0])
    for layer in layers:
        assert (layer.codebook, layer.blocksize, layer.double_quant) == ("fp4", 128, False)
        assert layer.compute_dtype == torch.bfloat16 and torch.equal(layer(x), layers[0](x))


def test_a_config_is_a_value_that_cannot_be_changed_but_replaced():
    assert labkit.QuantConfig is QuantConfig
    assert {FP4: 1}[QuantConfig(**FP4_SETTINGS)] == 1 and QuantConfig() != FP4
    with pytest.raises(FrozenInstanceError):
        FP4.blocksize = 64
    assert replace(FP4, blocksize=64).blocksize == 64
    with pytest.raises(ValueError, match="blocksize=65"):
        replace(FP4, blocksize=65)
    numpys = QuantConfig(blocksize=np.int64(128))
    assert numpys == QuantConfig(blocksize=128) and type(numpys.blocksize) is int
    assert SETTINGS == ("codebook", "blocksize", "double_quant", "scale_rounding", "compute_dtype")
    assert QuantConfig().changes() == {} and FP4.changes() == FP4_SETTINGS


@pytest.mark.parametrize("init", ["pissa", "loftq_iter_1"])
@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({}, {}),
        ({"blocksize": 64, "codebook": "nf4"}, {"blocksize": 64, "codebook": "nf4"}),
        ({"compute_dtype": torch.bfloat16}, {"compute_dtype": "torch.bfloat16"}),
        ({"compute_dtype": None}, {"compute_dtype": None}),
        ({"quantization": FP4}, FP4_SETTINGS | {"compute_dtype": "torch.bfloat16"}),
    ],
)
def test_an_adapter_folder_records_the_settings_that_were_given_and_makes_its_base_again(
    init, given, written, tmp_path
):
    model = add_qlora(make_small_llama(), LoRAConfig(r=2, init=init), **given)
    save_adapter(model, tmp_path / "a", plain=False)
    assert read_provenance(tmp_path / "a")["start"]["quantization"] == written
    again = load_adapter(make_small_llama(), tmp_path / "a")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)

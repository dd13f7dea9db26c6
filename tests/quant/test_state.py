"""A state_dict says how to read itself: another codebook, block size or shape is read right, or refused."""

import copy
import io
import json
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from labkit.quant.linear import QuantLinear
from labkit.quant.model import quantize_model
from labkit.quant.state import DESCRIPTION, describe
from tests.quant.cases import assert_same_bits

SETTINGS = [
    {"codebook": "fp4"},
    {"codebook": "optimal-64", "double_quant": False},
    {"blocksize": 128},
    {"blocksize": 32, "double_quant": False},
    {"codebook": "int4", "blocksize": 4096},
]
X = torch.randn(20, 128, generator=torch.Generator().manual_seed(1))


def make_net(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64, bias=False))
    quantize_model(net, progress=False, **settings)
    return net


def through_safetensors(state):
    return load(save(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through", [dict, through_safetensors, through_torch])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_layer_with_other_settings_takes_on_those_of_the_state(settings, through, assign):
    source, other = make_net(**settings), make_net()
    assert not torch.equal(other(X), source(X))
    state = through(source.state_dict())
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(other(X), source(X)) and torch.equal(other(X[:1]), source(X[:1]))
    for ours, theirs in ((other[0], source[0]), (other[2], source[2])):
        assert_same_bits(ours.weight.dequantize(), theirs.weight.dequantize())
        assert (ours.codebook, ours.blocksize, ours.double_quant, ours.extra_repr()) == (
            theirs.codebook, theirs.blocksize, theirs.double_quant, theirs.extra_repr()
        )  # fmt: skip
    again = make_net()
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(X), source(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_keep_the_settings(copied):
    net = make_net(codebook="fp4", blocksize=128)
    assert torch.equal(copied(net)(X), net(X)) and copied(net)[0].codebook == "fp4"


def test_a_state_is_of_tensors_and_describes_itself_in_json():
    state = make_net(codebook="fp4").state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert json.loads(bytes(state["0." + DESCRIPTION].tolist())) == {
        "codebook": "fp4", "blocksize": 64, "double_quant": True, "shape": [192, 128], "dtype": "float32"
    }  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_before_without_a_description_loads_if_its_tensors_fit(assign):
    source, other = make_net(), make_net()
    nn.init.normal_(source[0].bias)
    old = {name: value for name, value in source.state_dict().items() if DESCRIPTION not in name}
    assert str(other.load_state_dict(old, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(other(X), source(X))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.absmax_codes"):
        make_net(blocksize=128).load_state_dict(old)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.absmax\""):
        make_net(double_quant=False).load_state_dict(old)


def described(layer, **changes):
    """The state of a layer, with changes to its description."""
    state = layer.state_dict()
    fields = json.loads(bytes(state[DESCRIPTION].tolist())) | changes
    return state | {DESCRIPTION: torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda layer: described(layer, shape=[128, 192]),
            r"a weight of shape \(128, 192\); this layer's is",
        ),
        (lambda layer: described(layer, codebook="nf5"), "codebook='nf5' is not known"),
        (lambda layer: described(layer, codebook=7), "codebook=7 is not known"),
        (lambda layer: described(layer, blocksize=-64), "blocksize=-64 is not known"),
        (
            lambda layer: described(layer, blocksize=128),
            r"scales.codes is \(384,\) torch.uint8; 24576 weights in blocks",
        ),
        (lambda layer: described(layer, double_quant=False), "absmax are missing, without which"),
        (
            lambda layer: described(layer, dtype="int8"),
            "dtype=torch.int8: weights cannot be dequantized to it",
        ),
        (lambda layer: described(layer, dtype="no"), "_extra_state is damaged"),
        (lambda layer: layer.state_dict() | {DESCRIPTION: torch.arange(9, dtype=torch.uint8)}, "is damaged"),
        (lambda layer: layer.state_dict() | {DESCRIPTION: torch.zeros(0)}, "is damaged"),
        (lambda layer: layer.state_dict() | {DESCRIPTION: torch.randn(3)}, "is damaged"),
        (lambda layer: layer.state_dict() | {"packed": layer.packed[:-1]}, r"packed is \(12287, 1\)"),
        (
            lambda layer: layer.state_dict() | {"packed": layer.packed.float()},
            r"packed is \(12288, 1\) torch.float32",
        ),
        (
            lambda layer: layer.state_dict() | {"absmax_codes": layer.absmax_codes.int()},
            "torch.int32; 24576 weights",
        ),
        (lambda layer: {k: v for k, v in layer.state_dict().items() if k != "packed"}, "packed are missing"),
        (
            lambda layer: layer.state_dict() | {"absmax_offset": torch.tensor(torch.nan)},
            "hold NaN or infinity",
        ),
        (
            lambda layer: layer.state_dict() | {"absmax_absmax": layer.absmax_absmax / 0},
            "hold NaN or infinity",
        ),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_that_does_not_describe_its_bytes_is_refused_and_the_layer_is_as_it_was(
    spoil, message, assign, strict
):
    layer, source = QuantLinear.from_linear(nn.Linear(128, 192)), QuantLinear.from_linear(nn.Linear(128, 192))
    before, y = copy.deepcopy(layer.state_dict()), layer(X)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(spoil(source), assign=assign, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(X), y)


def test_a_state_in_full_precision_is_refused_even_where_names_need_not_match():
    dense = nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 64, bias=False))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"0.weight is in full precision, and this layer is in 4 bits"):
            make_net().load_state_dict(dense.state_dict(), strict=strict)


def test_assigning_takes_the_dtype_too_and_copying_does_not_as_in_any_module():
    source = make_net().bfloat16()
    for assign, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        net = make_net()
        net.load_state_dict(source.state_dict(), assign=assign)
        dense = nn.Linear(128, 192)
        dense.load_state_dict(nn.Linear(128, 192).bfloat16().state_dict(), assign=assign)
        assert net[0].weight.dtype == net[0].bias.dtype == dense.weight.dtype == dtype


def test_a_description_is_read_before_the_bytes_so_layers_of_any_settings_exchange_states():
    nets = [make_net(**settings) for settings in SETTINGS]
    expected = [net(X) for net in nets]
    states = [copy.deepcopy(net.state_dict()) for net in nets]
    for net in nets:
        for state, y in zip(states, expected, strict=True):
            net.load_state_dict(state)
            assert torch.equal(net(X), y)


def test_the_settings_of_a_layer_are_those_of_its_weight_and_cannot_drift_apart():
    layer = make_net(codebook="fp4")[0]
    with pytest.raises(AttributeError):
        layer.codebook = "nf4"
    assert bytes(describe(layer.weight).tolist()) == bytes(layer.get_extra_state().tolist())

"""Linear layers, however their weight is stored."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from labkit.quant.layer_kinds import dense_weight, is_conv1d, is_four_bit, is_linear, is_transposed, widths
from labkit.quant.linear import QuantLinear


def bitsandbytes_layer():
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu")


@pytest.mark.parametrize(
    ("make", "linear", "four_bit", "transposed"),
    [
        (lambda: nn.Linear(96, 64), True, False, False),
        (lambda: QuantLinear.from_linear(nn.Linear(96, 64)), True, True, False),
        (bitsandbytes_layer, True, True, False),
        (lambda: Conv1D(64, 96), True, False, True),
        (lambda: nn.Embedding(96, 64), False, False, True),
    ],
)
def test_every_kind_is_a_map_from_96_to_64(make, linear, four_bit, transposed):
    module = make()
    assert (is_linear(module), is_four_bit(module), is_transposed(module)) == (linear, four_bit, transposed)
    assert widths(module) == (96, 64)
    if make is bitsandbytes_layer:
        with pytest.raises(ValueError, match="a Linear4bit is packed in a format of its own"):
            dense_weight(module)
    else:
        assert dense_weight(module).shape == (64, 96)
    if transposed:
        assert torch.equal(dense_weight(module), module.weight.T)


def test_conv1d_is_known_by_its_class_and_not_by_its_name():
    class NamedAlike(nn.Module):
        nf = 4

    NamedAlike.__name__ = "Conv1D"
    assert is_conv1d(Conv1D(4, 4)) and not is_conv1d(NamedAlike()) and not is_linear(nn.ReLU())


def test_asking_for_conv1d_does_not_import_transformers():
    code = """
import sys
from torch import nn
from labkit.quant.layer_kinds import is_linear
assert is_linear(nn.Linear(4, 4)) and not is_linear(nn.ReLU())
print("transformers.pytorch_utils" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr

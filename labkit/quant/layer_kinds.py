"""Linear layers, however their weight is stored.

Every kind is a map W x with W of shape (out, in):

    nn.Linear, QuantLinear, Linear4bit    W is stored as it is, or in four bits (the last is bitsandbytes')
    Conv1D (GPT-2)                        W is stored transposed, (in, out)
    nn.Embedding                          x is a one-hot row, so W x picks a column; stored (in, out)
"""

import sys

from torch import Tensor, nn

from labkit.models.walk import PACKED, kind_of
from labkit.quant.linear import QuantLinear


def is_conv1d(module: nn.Module) -> bool:
    """Is it GPT-2's transposed linear layer?

    Importing transformers' class takes seconds; where nobody has imported it yet, no layer can be one.
    """
    layers = sys.modules.get("transformers.pytorch_utils")
    return layers is not None and isinstance(module, layers.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """A linear layer in 32, 16 or 4 bits, or GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module)


def is_four_bit(module: nn.Module) -> bool:
    """Is its weight packed, so that nothing can be added to it? So are `QuantLinear`'s and bitsandbytes'."""
    return kind_of(module) == PACKED


def holds_weight(module: nn.Module) -> bool:
    """Is its weight there to be replaced? A parametrized layer (`weight_norm`) makes it anew at each call."""
    return isinstance(module, QuantLinear) or "weight" in module._parameters


def is_transposed(module: nn.Module) -> bool:
    """Is the weight stored (in, out)?"""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that can have an adapter; the vocabulary is the input width of an embedding."""
    if is_transposed(module):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in), dequantized if need be.

    Raises:
        ValueError: it is packed in a format that is not ours.
    """
    if isinstance(module, QuantLinear):
        return module.weight.dequantize()
    if is_four_bit(module):
        raise ValueError(
            f"the weight of a {type(module).__name__} is packed in a format of its own; quantize with "
            "labkit.quantize_model, whose layers give their weight back"
        )
    weight = module.weight.detach()
    return weight.T if is_transposed(module) else weight

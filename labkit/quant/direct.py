"""A few tokens through a 4-bit layer, without writing its dequantized weight W' anywhere.

Text is generated one token at a time. For one row of x, writing all of W' is most of the work, so on a CPU in fp32,
and where no gradients are to come, a kernel adds up the products as it looks the weights up. They are the same
products, added in another order: results differ from the other path in the last bits, as they do between any two
matrix libraries. `FEW_ROWS = 0` turns this path off.
"""

import torch
from torch import Tensor

from labkit.quant.kernels.dispatch import multiplies
from labkit.quant.tensor import QuantizedTensor

FEW_ROWS = 16  # rows of x up to which not writing W' was faster than a matrix multiplication with it


def multiplies_directly(x: Tensor, in_features: int, compute_dtype: torch.dtype | None) -> bool:
    """Are there so few rows, and no gradients to come, that W' need not be made at all?"""
    return (
        x.shape[-1:] == (in_features,)
        and 0 < x.numel() <= FEW_ROWS * in_features
        and compute_dtype in (None, x.dtype)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and multiplies(x, in_features)
        and not torch.is_autocast_enabled(x.device.type)
    )


def multiply_directly(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """y = x W'^T + b, (..., in) to (..., out), where `multiplies_directly` says so."""
    height, width = weight.shape
    y = weight.multiply(x.reshape(-1, width)).view(*x.shape[:-1], height)
    return y if bias is None else y + bias

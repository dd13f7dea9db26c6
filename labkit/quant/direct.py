"""A few tokens through a 4-bit layer, without writing its dequantized weight W' anywhere.

Text is generated one token at a time. For a single row of x, writing all of W' is most of the work. So where no
gradient of any kind is needed, on a CPU in fp32 and on a GPU in bf16 and fp16 too, a kernel adds up the products as it
looks the weights up. They are the same products, added in another order: results differ from those of the other path
in the last bits, as they do between any two matrix libraries. `FEW_ROWS = 0` turns this path off.
"""

import torch
from torch import Tensor

from labkit.quant.kernels import operations
from labkit.quant.kernels.dispatch import multiplies
from labkit.quant.tensor import QuantizedTensor

FEW_ROWS = 16  # rows of x up to which this was faster, on a CPU, than a matrix multiplication with W'
FEW_ROWS_ON_GPU = 4  # estimated by counting instructions; `make gpu` measures where both take equally long


def multiplies_directly(x: Tensor, in_features: int, compute_dtype: torch.dtype | None) -> bool:
    """Can W' stay unwritten: are there only a few rows of an ordinary x, and is no gradient needed?"""
    return (
        x.shape[-1:] == (in_features,)
        and 0 < x.numel() <= (min(FEW_ROWS, FEW_ROWS_ON_GPU) if x.is_cuda else FEW_ROWS) * in_features
        and compute_dtype in (None, x.dtype)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and multiplies(x, in_features)
        and not torch.is_autocast_enabled(x.device.type)
    )


def multiply_directly(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """y = x W'^T + b, (..., in) to (..., out), where `multiplies_directly` allows it."""
    height, width = weight.shape
    rows = x.reshape(-1, width)
    y = operations.multiply_4bit(rows, weight.for_kernels(), height).view(*x.shape[:-1], height)
    return y if bias is None else y + bias.to(y.dtype)

"""NF4 and its relatives: codebooks, two levels of quantization, a 4-bit layer, a model in four bits.

    codebooks.py     the levels that a code stands for
    blockwise.py     the algorithm, in plain PyTorch
    config.py        the settings
    tensor.py        `quantize`, and the weight that it returns; fields.py checks it, stand_in.py lets others read it
    linear.py        the layer; state.py is how it is saved, direct.py and scratch.py make it fast
    model.py         a whole model
    layer_kinds.py   linear layers, however they are stored
    kernels/         the fast path of the same calls

Start with codebooks, blockwise and linear.
"""

from labkit.quant.blockwise import dequantize_blocks, pack, quantize_blocks, unpack
from labkit.quant.codebooks import CODEBOOKS, codebook
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.model import LayerReport, dequantize_model, quantize_model
from labkit.quant.tensor import NestedScales, QuantizedTensor, quantize, quantize_scales

__all__ = [
    "CODEBOOKS",
    "LayerReport",
    "NestedScales",
    "QuantConfig",
    "QuantLinear",
    "QuantizedTensor",
    "codebook",
    "dequantize_blocks",
    "dequantize_model",
    "pack",
    "quantize",
    "quantize_blocks",
    "quantize_model",
    "quantize_scales",
    "unpack",
]

"""NF4 and its relatives: codebooks, block-wise and double quantization, the frozen 4-bit layer, a whole model in four bits."""

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

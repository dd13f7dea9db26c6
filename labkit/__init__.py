"""A laboratory for LoRA and QLoRA: every part from scratch, measured, and checked against the libraries."""

from labkit.adapter_io import AdapterMismatch, load_adapter, save_adapter
from labkit.lora import LoRAConfig, adapter_strength, add_lora, merge, trainable, unmerge
from labkit.quant import QuantizedTensor, quantize
from labkit.quant_linear import QuantLinear, dequantize_model, quantize_model
from labkit.train import History, TrainConfig, TrainingDiverged, train

__all__ = [
    "AdapterMismatch",
    "History",
    "LoRAConfig",
    "QuantLinear",
    "QuantizedTensor",
    "TrainConfig",
    "TrainingDiverged",
    "adapter_strength",
    "add_lora",
    "dequantize_model",
    "load_adapter",
    "merge",
    "quantize",
    "quantize_model",
    "save_adapter",
    "train",
    "trainable",
    "unmerge",
]

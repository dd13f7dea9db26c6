"""A laboratory for LoRA and QLoRA: every part from scratch, measured, and checked against the libraries."""

from labkit.adam import AdamW, AdamW8bit
from labkit.adapter_io import AdapterMismatch, load_adapter, save_adapter
from labkit.lora import LoRAConfig, adapter_strength, add_lora, merge, trainable, unmerge
from labkit.paging import PagedAdamW, attach_paging, detach_paging
from labkit.quant import QuantizedTensor, quantize
from labkit.quant_linear import QuantLinear, dequantize_model, quantize_model
from labkit.train import History, TrainConfig, TrainingDiverged, train

__all__ = [
    "AdamW",
    "AdamW8bit",
    "AdapterMismatch",
    "History",
    "LoRAConfig",
    "PagedAdamW",
    "QuantLinear",
    "QuantizedTensor",
    "TrainConfig",
    "TrainingDiverged",
    "adapter_strength",
    "add_lora",
    "attach_paging",
    "dequantize_model",
    "detach_paging",
    "load_adapter",
    "merge",
    "quantize",
    "quantize_model",
    "save_adapter",
    "train",
    "trainable",
    "unmerge",
]

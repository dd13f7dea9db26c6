"""A laboratory for LoRA and QLoRA: every part from scratch, measured, and checked against the libraries."""

import importlib
from types import ModuleType

from labkit.checks import version_of
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.lora.adapters import active_adapter, adapter_configs, add_adapter, remove_adapter, use_adapter
from labkit.lora.adapters import base_only as disabled
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.count import adapter_report, trainable
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora
from labkit.lora.merging import adapter_strength, merge, unload, unmerge
from labkit.lora.plain import to_plain_lora
from labkit.lora.qlora import add_qlora
from labkit.models.surgery import untie_embeddings
from labkit.optim.adamw import AdamW, AdamW8bit
from labkit.optim.paging import PagedAdamW, attach_paging, detach_paging
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.model import dequantize_model, quantize_model
from labkit.quant.tensor import QuantizedTensor, quantize
from labkit.training.config import TrainConfig
from labkit.training.history import History, TrainingDiverged
from labkit.training.loop import train

__version__ = version_of("labkit")

__all__ = [
    "AdamW",
    "AdamW8bit",
    "AdapterMismatch",
    "History",
    "LoRAConfig",
    "PagedAdamW",
    "QuantConfig",
    "QuantLinear",
    "QuantizedTensor",
    "TrainConfig",
    "TrainingDiverged",
    "active_adapter",
    "adapter_configs",
    "adapter_report",
    "adapter_strength",
    "add_adapter",
    "add_lora",
    "add_qlora",
    "attach_paging",
    "combine",
    "dequantize_model",
    "detach_paging",
    "disabled",
    "load_adapter",
    "merge",
    "quantize",
    "quantize_model",
    "remove_adapter",
    "save_adapter",
    "to_plain_lora",
    "train",
    "trainable",
    "unload",
    "unmerge",
    "untie_embeddings",
    "use_adapter",
]

FOLDERS = (
    "alternatives",
    "analysis",
    "data",
    "doctor",
    "files",
    "formats",
    "lora",
    "memory",
    "models",
    "optim",
    "quant",
    "scale",
    "serving",
    "sweeps",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    """A folder of labkit, imported when it is first asked for: `import labkit; labkit.models.load(…)`."""
    if name in FOLDERS:
        return importlib.import_module(f"labkit.{name}")
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")

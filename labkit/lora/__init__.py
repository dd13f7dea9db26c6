"""Low-rank adapters: the layer and its variants, where they go, several on one base, merging, QLoRA."""

from labkit.lora.adapters import (
    active_adapter,
    adapter_configs,
    add_adapter,
    base_only,
    remove_adapter,
    use_adapter,
)
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.count import adapter_report, trainable
from labkit.lora.dora import DoRALinear
from labkit.lora.extraction import compress_adapter, extract_adapter
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.merging import adapter_strength, merge, unload, unmerge, unmerged
from labkit.lora.mounting import Adapter, ModelAdapters, adapters_of, mounted_adapter
from labkit.lora.plain import to_plain_lora
from labkit.lora.qat import QATLinear, quantization_aware
from labkit.lora.qlora import add_qlora
from labkit.lora.survival import Survival, merged_survival, survival
from labkit.lora.targets import matching_layers

__all__ = [
    "Adapter",
    "AdapterMismatch",
    "DoRALinear",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "ModelAdapters",
    "QATLinear",
    "Survival",
    "active_adapter",
    "adapter_configs",
    "adapter_report",
    "adapter_strength",
    "adapters_of",
    "add_adapter",
    "add_lora",
    "add_qlora",
    "base_only",
    "combine",
    "compress_adapter",
    "extract_adapter",
    "fingerprint",
    "lora_layers",
    "matching_layers",
    "merge",
    "merged_survival",
    "mounted_adapter",
    "quantization_aware",
    "remove_adapter",
    "survival",
    "to_plain_lora",
    "trainable",
    "unload",
    "unmerge",
    "unmerged",
    "use_adapter",
]

"""Low-rank adapters: the layer and its variants, where they go, several on one base, merging, QLoRA."""

from labkit.lora.adapters import (
    active_adapter,
    adapter_configs,
    add_adapter,
    disabled,
    remove_adapter,
    use_adapter,
)
from labkit.lora.combining import combine
from labkit.lora.config import LoRAConfig
from labkit.lora.count import adapter_report, trainable
from labkit.lora.dora import DoRALinear
from labkit.lora.fingerprint import AdapterMismatch, fingerprint
from labkit.lora.inject import Adapter, add_lora, lora_layers
from labkit.lora.layer import LoRAEmbedding, LoRALinear
from labkit.lora.merging import adapter_strength, merge, unmerge
from labkit.lora.plain import to_plain_lora
from labkit.lora.qlora import add_qlora
from labkit.lora.targets import matching_layers

__all__ = [
    "Adapter",
    "AdapterMismatch",
    "DoRALinear",
    "LoRAConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "active_adapter",
    "adapter_configs",
    "adapter_report",
    "adapter_strength",
    "add_adapter",
    "add_lora",
    "add_qlora",
    "combine",
    "disabled",
    "fingerprint",
    "lora_layers",
    "matching_layers",
    "merge",
    "remove_adapter",
    "to_plain_lora",
    "trainable",
    "unmerge",
    "use_adapter",
]

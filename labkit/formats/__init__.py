"""Models on disk as other programs read them: PEFT folders, merged models, GGUF files, and bitsandbytes' 4-bit layers."""

from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.formats.audit import ExportCell, audit_exports, audit_table
from labkit.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from labkit.formats.card import CardFacts, save_with_card
from labkit.formats.fitness import check_for_vllm
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.formats.merged import save_merged
from labkit.formats.modelfile import save_modelfile
from labkit.formats.services import read_preferences, write_for_service

__all__ = [
    "CardFacts",
    "ExportCell",
    "audit_exports",
    "audit_table",
    "check_for_vllm",
    "from_bitsandbytes",
    "load_adapter",
    "load_alternative",
    "read_preferences",
    "save_adapter",
    "save_alternative",
    "save_gguf",
    "save_gguf_adapter",
    "save_merged",
    "save_modelfile",
    "save_with_card",
    "to_bitsandbytes",
    "write_for_service",
]

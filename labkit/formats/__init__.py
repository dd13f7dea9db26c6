"""Adapters on disk as other libraries read them: PEFT folders with a model card, and bitsandbytes' 4-bit layers."""

from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from labkit.formats.card import CardFacts, save_with_card

__all__ = [
    "CardFacts",
    "from_bitsandbytes",
    "load_adapter",
    "load_alternative",
    "save_adapter",
    "save_alternative",
    "save_with_card",
    "to_bitsandbytes",
]

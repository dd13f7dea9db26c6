"""Base models by name, their shapes without weights, and how to change a module of a model.

Read `loading` first; `folders` says when a folder is a whole model, `fetching` and `gguf` bring the named models
here, `shapes` builds models without memory, `walk` finds layers through wrappers, and `surgery` replaces modules.
"""

from labkit.models.fetching import SOURCES, ModelUnavailable, Source, fetch
from labkit.models.loading import SHIPPED, load, shipped
from labkit.models.shapes import changes_logits, config_of, known_models, meta_model

__all__ = [
    "SHIPPED",
    "SOURCES",
    "ModelUnavailable",
    "Source",
    "changes_logits",
    "config_of",
    "fetch",
    "known_models",
    "load",
    "meta_model",
    "shipped",
]

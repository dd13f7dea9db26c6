"""Serving: many adapters, versioned, on one base."""

from labkit.serving.adapter_cache import AdapterCache, che_hit_rate
from labkit.serving.admission import Base
from labkit.serving.audit import Problem, repair, verify
from labkit.serving.batched import AdapterBank
from labkit.serving.drift import Drift, find_drift
from labkit.serving.engine import Engine
from labkit.serving.moves import AliasMoved
from labkit.serving.naming import UnknownAdapter
from labkit.serving.registry import Registry
from labkit.serving.requests import Completion, Draining, Full, GenerationRequest, Source, Stream
from labkit.serving.rollout import Evidence, assign
from labkit.serving.rows import EngineLimits
from labkit.serving.sampling import Sampling
from labkit.serving.version_card import version_card
from labkit.serving.versions import Move, Version
from labkit.serving.vllm_line import VllmLine, vllm_line

__all__ = [
    "AdapterBank",
    "AdapterCache",
    "AliasMoved",
    "Base",
    "Completion",
    "Draining",
    "Drift",
    "Engine",
    "EngineLimits",
    "Evidence",
    "Full",
    "GenerationRequest",
    "Move",
    "Problem",
    "Registry",
    "Sampling",
    "Source",
    "Stream",
    "UnknownAdapter",
    "Version",
    "VllmLine",
    "assign",
    "che_hit_rate",
    "find_drift",
    "repair",
    "verify",
    "version_card",
    "vllm_line",
]

"""Serving: many adapters, versioned, on one base."""

from labkit.serving.admission import Base
from labkit.serving.audit import Problem, repair, verify
from labkit.serving.drift import Drift, find_drift
from labkit.serving.moves import AliasMoved
from labkit.serving.naming import UnknownAdapter
from labkit.serving.registry import Registry
from labkit.serving.rollout import Evidence, assign
from labkit.serving.version_card import version_card
from labkit.serving.versions import Move, Version
from labkit.serving.vllm_line import VllmLine, vllm_line

__all__ = [
    "AliasMoved",
    "Base",
    "Drift",
    "Evidence",
    "Move",
    "Problem",
    "Registry",
    "UnknownAdapter",
    "Version",
    "VllmLine",
    "assign",
    "find_drift",
    "repair",
    "verify",
    "version_card",
    "vllm_line",
]

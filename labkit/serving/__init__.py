"""Serving: many adapters, versioned, on one base."""

from labkit.serving.adapter_cache import AdapterCache, che_hit_rate
from labkit.serving.admission import Base
from labkit.serving.assignment import assign
from labkit.serving.audit import Problem, repair, verify
from labkit.serving.batched import AdapterBank
from labkit.serving.drift import Drift, find_class_drift, find_drift
from labkit.serving.engine import Engine
from labkit.serving.moves import AliasMoved
from labkit.serving.naming import UnknownAdapter
from labkit.serving.registry import Registry
from labkit.serving.requests import Completion, Draining, Full, GenerationRequest, Source, Stream
from labkit.serving.rollout import Rollouts
from labkit.serving.routed import AlreadyScored, UnknownAnswer
from labkit.serving.rows import EngineLimits
from labkit.serving.sampling import Sampling
from labkit.serving.sequential import Evidence, PairedEvidence
from labkit.serving.trial import Trial, TrialPlan
from labkit.serving.trial_log import answers_of, explain
from labkit.serving.version_card import version_card
from labkit.serving.versions import Move, Version
from labkit.serving.vllm_line import VllmLine, vllm_line

__all__ = [
    "AdapterBank",
    "AdapterCache",
    "AliasMoved",
    "AlreadyScored",
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
    "PairedEvidence",
    "Problem",
    "Registry",
    "Rollouts",
    "Sampling",
    "Source",
    "Stream",
    "Trial",
    "TrialPlan",
    "UnknownAdapter",
    "UnknownAnswer",
    "Version",
    "VllmLine",
    "answers_of",
    "assign",
    "che_hit_rate",
    "explain",
    "find_class_drift",
    "find_drift",
    "repair",
    "verify",
    "version_card",
    "vllm_line",
]

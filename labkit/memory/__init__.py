"""Where the bytes of a training step go: by formula, by running the code without numbers, and measured."""

from labkit.memory.formulas import crossover, plan
from labkit.memory.ledger import Ledger, LedgerRow, Timeline, size
from labkit.memory.measurement import measure
from labkit.memory.random_weights import random_model
from labkit.memory.resident import measure_resident
from labkit.memory.setup import METHODS, PUBLISHED, Setup
from labkit.memory.simulation import simulate
from labkit.memory.subjects import make_batch, real_model

__all__ = [
    "METHODS",
    "PUBLISHED",
    "Ledger",
    "LedgerRow",
    "Setup",
    "Timeline",
    "crossover",
    "make_batch",
    "measure",
    "measure_resident",
    "plan",
    "random_model",
    "real_model",
    "simulate",
    "size",
]

"""Explorers: move a control, and a figure is computed live from real weights or a real run."""

from labkit.lab.explore.memory import weight_memory
from labkit.lab.explore.tickets import answer_table, ticket_explorer, token_probabilities

__all__ = ["answer_table", "ticket_explorer", "token_probabilities", "weight_memory"]

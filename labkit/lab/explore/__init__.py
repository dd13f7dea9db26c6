"""Explorers: move a control, and a figure is computed live from real weights or a real run."""

from labkit.lab.explore.alternatives import cost_explorer
from labkit.lab.explore.bill import bill_explorer
from labkit.lab.explore.breakdown import peak_explorer
from labkit.lab.explore.double_quantization import constants_explorer
from labkit.lab.explore.forgetting import plane_explorer
from labkit.lab.explore.lora import strength_explorer
from labkit.lab.explore.paging import paging_explorer
from labkit.lab.explore.quantization import codebook_explorer
from labkit.lab.explore.ranks import sweep_explorer
from labkit.lab.explore.spectra import update_explorer
from labkit.lab.explore.start import weight_memory
from labkit.lab.explore.tickets import answer_table, ticket_explorer, token_probabilities
from labkit.lab.explore.variants import variant_explorer

__all__ = [
    "answer_table",
    "bill_explorer",
    "codebook_explorer",
    "constants_explorer",
    "cost_explorer",
    "paging_explorer",
    "peak_explorer",
    "plane_explorer",
    "strength_explorer",
    "sweep_explorer",
    "ticket_explorer",
    "token_probabilities",
    "update_explorer",
    "variant_explorer",
    "weight_memory",
]

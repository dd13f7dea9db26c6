"""Explorers: move a control, and a figure is computed live from real weights or a real run."""

from labkit.lab.explore.alternatives import cost_explorer
from labkit.lab.explore.answers import read_answer
from labkit.lab.explore.background import UpdateSpectra
from labkit.lab.explore.bill import bill_explorer
from labkit.lab.explore.breakdown import peak_explorer
from labkit.lab.explore.capstone import ledger_explorer
from labkit.lab.explore.double_quantization import constants_explorer
from labkit.lab.explore.failures import tensor_explorer
from labkit.lab.explore.forgetting import plane_explorer, turned_down_explorer
from labkit.lab.explore.knobs import knobs_explorer
from labkit.lab.explore.lora import strength_explorer
from labkit.lab.explore.merging import mixing_explorer, survival_explorer
from labkit.lab.explore.messages import message_box
from labkit.lab.explore.own_data import answers_beside, record_explorer
from labkit.lab.explore.paging import card_explorer, paging_explorer
from labkit.lab.explore.pipeline import labels_explorer
from labkit.lab.explore.quantization import codebook_explorer, levels_explorer
from labkit.lab.explore.ranks import sweep_explorer
from labkit.lab.explore.scaling import wire_explorer
from labkit.lab.explore.serving import serving_explorer
from labkit.lab.explore.spectra import update_explorer
from labkit.lab.explore.start import weight_memory
from labkit.lab.explore.supervision import show_supervision
from labkit.lab.explore.tickets import answer_table, ticket_explorer, token_probabilities
from labkit.lab.explore.training import TrainingPanel, training_panel
from labkit.lab.explore.variants import variant_explorer

__all__ = [
    "TrainingPanel",
    "UpdateSpectra",
    "answer_table",
    "answers_beside",
    "bill_explorer",
    "card_explorer",
    "codebook_explorer",
    "constants_explorer",
    "cost_explorer",
    "knobs_explorer",
    "labels_explorer",
    "ledger_explorer",
    "levels_explorer",
    "message_box",
    "mixing_explorer",
    "paging_explorer",
    "peak_explorer",
    "plane_explorer",
    "read_answer",
    "record_explorer",
    "serving_explorer",
    "show_supervision",
    "strength_explorer",
    "survival_explorer",
    "sweep_explorer",
    "tensor_explorer",
    "ticket_explorer",
    "token_probabilities",
    "training_panel",
    "turned_down_explorer",
    "update_explorer",
    "variant_explorer",
    "weight_memory",
    "wire_explorer",
]

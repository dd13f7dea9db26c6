"""Data sets of the course, and the way from records to batches of token ids.

Read `encoding` and `batches` first. `own` reads a file of your own, and `posing` puts its prompts into the form that the
model is asked in; every other module is one data set, with a datasheet in `data/NAME/README.md`.
"""

from labkit.data.batches import IGNORE, Batch, batch_order, collate, endless_batches
from labkit.data.docstrings import load_docstrings
from labkit.data.encoding import Encoded, encode, encode_all
from labkit.data.facts import make_facts
from labkit.data.own.leaks import find_leaks, hold_out
from labkit.data.own.reading import read_records
from labkit.data.passages import cut_passages, load_austen, load_held_out
from labkit.data.posing import posed
from labkit.data.splits import SPLITS, read_jsonl
from labkit.data.sql import load_questions
from labkit.data.tickets import load_tickets, ticket_chat

__all__ = [
    "IGNORE",
    "SPLITS",
    "Batch",
    "Encoded",
    "batch_order",
    "collate",
    "cut_passages",
    "encode",
    "encode_all",
    "endless_batches",
    "find_leaks",
    "hold_out",
    "load_austen",
    "load_docstrings",
    "load_held_out",
    "load_questions",
    "load_tickets",
    "make_facts",
    "posed",
    "read_jsonl",
    "read_records",
    "ticket_chat",
]

"""A file of your own: read, checked and reported on before anything is trained on it.

lines                  a file    -> its lines
json_rows, csv_rows    lines     -> rows: JSON objects, or lines of CSV by column
forms, texts           rows      -> records, and what is wrong with them
shingles, leaks        records   -> copies and near copies, in one file or across two
classes                records   -> classes that only one of two files has
findings, report       what may be wrong with all of these, with what is allowed and what to do
reading                `read_records`, the way through these modules
"""

from labkit.data.own.classes import OneSided, one_sided_classes
from labkit.data.own.findings import KINDS, Finding
from labkit.data.own.leaks import Leak, find_leaks, hold_out
from labkit.data.own.reading import read_records
from labkit.data.own.report import DataReport, FaultyData

__all__ = [
    "KINDS",
    "DataReport",
    "FaultyData",
    "Finding",
    "Leak",
    "OneSided",
    "find_leaks",
    "hold_out",
    "one_sided_classes",
    "read_records",
]

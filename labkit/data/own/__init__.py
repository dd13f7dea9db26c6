"""A file of your own: read, checked and reported on before anything is trained on it.

lines      a file             -> its lines
rows       lines              -> rows: JSON objects, or lines of CSV by column
forms      rows               -> records
texts      what a text should not hold
findings   what may be wrong with all of these: the kinds, with what is allowed and what to do
report     all that was found
reading    the way through these modules: `read_records`
"""

from labkit.data.own.findings import KINDS, Finding
from labkit.data.own.reading import read_records
from labkit.data.own.report import DataReport, FaultyData

__all__ = ["KINDS", "DataReport", "FaultyData", "Finding", "read_records"]

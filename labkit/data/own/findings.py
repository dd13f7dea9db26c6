"""What is wrong with a file of records, and what is only suspicious.

A *fault* is something that cannot be trained on, or should never be: a line that is not JSON, an empty answer, a
role that no template knows. A *warning* is about records that can be used and may still spoil a result: the same
record twice, a test record that is in the training file too. Every kind is in `KINDS`, with what is allowed and
what to do; a finding adds where it is and what was found there.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

MAX_KEPT = 1000  # findings of a kind that are kept in full; all are counted


class Kind(NamedTuple):
    """A kind of finding: is it a fault, what is allowed, and what to do."""

    is_fault: bool
    allowed: str
    advice: str


ONE_OBJECT = 'one JSON object per line, such as {"prompt": "…", "completion": "…"}'
FIELDS = "'messages', or 'prompt' and 'completion', or 'text'"

KINDS = {
    # the file, before it is divided into records
    "not text": Kind(True, "a text file in UTF-8, with JSON lines or CSV", "convert or unpack it first"),
    "not UTF-8": Kind(True, "text in UTF-8, with or without a BOM", "save it again as UTF-8"),
    "empty file": Kind(True, "at least one record", "check that it was written to the end, and the path"),
    "line too long": Kind(
        True, "lines of at most 16 MiB", "cut the text into passages; no model reads so much at once"
    ),
    # JSON
    "not JSON": Kind(True, ONE_OBJECT, "write the file with json.dumps(record), one call per line"),
    "trailing comma": Kind(
        True, "no comma after the last value, nor at the end of a line", "remove the comma"
    ),
    "duplicate key": Kind(
        True, "each key once in an object", "remove one; Python would keep the last and lose the rest"
    ),
    "not a number": Kind(
        True, "the numbers of JSON, which has no NaN and no Infinity", "write null, or leave it out"
    ),
    "not an object": Kind(True, ONE_OBJECT, "give the values names"),
    # CSV
    "wrong delimiter": Kind(True, "commas between the columns", "save it again with commas"),
    "missing column": Kind(
        True, "a first line with the names of both columns", "name them with columns=(…, …)"
    ),
    "duplicate column": Kind(True, "each column name once", "rename one of the columns"),
    "ragged row": Kind(
        True, "as many values as there are columns", 'put values that hold a comma into "double quotes"'
    ),
    "broken quotes": Kind(
        True,
        'a value in "double quotes", each quote inside it doubled: ""',
        "close the quote; nothing after it is read, for it is not known where the next row begins",
    ),
    # one record
    "unknown fields": Kind(True, FIELDS, "rename the fields, or name two with columns=(…, …)"),
    "missing field": Kind(True, FIELDS, "add the field, or remove the record"),
    "two forms": Kind(True, f"one form per record: {FIELDS}", "keep the one that you want to train on"),
    "mixed forms": Kind(
        True, "one form per file", "convert these records, or read them from a file of their own"
    ),
    "wrong type": Kind(True, "a text", "convert it to a text, or remove the record"),
    "wrong messages": Kind(
        True,
        'a list of {"role": …, "content": …}, with something to answer and the answer',
        "repair the list",
    ),
    "wrong role": Kind(True, "'system', 'user', 'assistant', 'tool'", "rename the role"),
    "wrong order": Kind(
        True,
        "'system' first or not at all, then 'user', and 'assistant' last",
        "put the messages in order, or remove the record",
    ),
    "wrong calls": Kind(
        True, 'a list of {"function": {"name": "…", …}}', "repair the list, or remove the record"
    ),
    "empty completion": Kind(
        True,
        "an answer with at least one letter or sign",
        "fill it in, or remove it: the model would learn to say nothing",
    ),
    "NUL byte": Kind(
        True, "text without NUL characters", "find out what wrote them; the text around them is often lost"
    ),
    "lone surrogate": Kind(
        True,
        "both halves of a surrogate pair, or the character itself",
        "write the file with ensure_ascii=False",
    ),
    "cannot be encoded": Kind(
        True, "what the template and the tokenizer write in full", "see labkit.data.encode"
    ),
    # records that can be used
    "too long": Kind(
        False, "records that fit max_length", "raise max_length, or shorten them; they are left out, not cut"
    ),
    "empty prompt": Kind(False, "something to answer", "fill it in; for texts without a prompt, use 'text'"),
    "same role twice": Kind(False, "'user' and 'assistant' in turn", "join the two messages if they are one"),
    "control character": Kind(
        False, "tabs and line breaks only", "remove it, unless the model is to learn it"
    ),
    "damaged text": Kind(False, "text that was decoded as what it is", "write it anew from the source"),
    "duplicate": Kind(False, "each record once", "remove one; it counts twice as much in training"),
    "two answers": Kind(False, "one answer per prompt", "decide which is right, if only one can be"),
    "leak": Kind(False, "test records that are not in the training file", "remove it from one of the two"),
    "near leak": Kind(
        False,
        "test records unlike those of the training file",
        "read both, and remove one if they are the same",
    ),
    "class in one split": Kind(False, "every class in both splits", "split anew, or score the class apart"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found in a file.

    Attributes:
        kind: one of `KINDS`.
        path: of the file.
        line: where it begins, counted from 1; 0 if it is about the whole file.
        found: what is there, as the rest of a sentence about the line.
        allowed: what may be there.
        advice: what to do.
    """

    kind: str
    path: str
    line: int
    found: str
    allowed: str
    advice: str

    @property
    def is_fault(self) -> bool:
        return KINDS[self.kind].is_fault

    @property
    def place(self) -> str:
        return f"line {self.line} of {self.path}" if self.line else self.path

    def __str__(self) -> str:
        return f"{self.place} {self.found}; allowed: {self.allowed}; to do: {self.advice}"


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 line", "2,000 lines"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


class Findings:
    """The findings of one file: all are counted, and the first `MAX_KEPT` of each kind kept."""

    def __init__(self, path: str):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.kept: list[Finding] = []

    def add(self, kind: str, line: int, found: str, allowed: str = "", advice: str = "") -> None:
        """Note a finding; `allowed` and `advice` are those of its kind unless given."""
        usual = KINDS[kind]
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_KEPT:
            self.kept.append(
                Finding(kind, self.path, line, found, allowed or usual.allowed, advice or usual.advice)
            )

    def of(self, is_fault: bool) -> list[Finding]:
        """The kept faults, or the kept warnings, by line."""
        return sorted((f for f in self.kept if f.is_fault is is_fault), key=lambda f: f.line)

    def count(self, is_fault: bool) -> int:
        """How many faults, or warnings, there are."""
        return sum(n for kind, n in self.counts.items() if KINDS[kind].is_fault is is_fault)

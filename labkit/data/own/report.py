"""What `read_records` found out about a file: counts, lengths, faults and warnings, as numbers and as a text."""

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from labkit.checks import check_choice
from labkit.data.own.findings import KINDS, Finding, Findings, counted

SHOWN = 3  # findings of a kind in the printed report
BAR = 40  # characters of the longest bar of the histogram


class FaultyData(ValueError):
    """A file has lines that cannot be trained on. `report` says which, and what to do with each."""

    def __init__(self, message: str, report: "DataReport"):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class DataReport:
    """What is in a file of records.

    Attributes:
        path: of the file.
        form: "messages", "prompt/completion" or "text"; "" if nothing could be read.
        has_bom: does the file begin with a BOM? It is read without.
        newlines: how its lines end: "LF", "CRLF", "LF and CRLF", or "" if there is only one.
        n_lines: in the file, blank ones included.
        lines: of each record returned, the line where it begins.
        other_fields: fields that are in no record, with how many rows have them.
        lengths: tokens of each record returned, the end mark included; empty without a tokenizer.
        supervised: of these, how many are learned.
        max_length: tokens, beyond which a record is left out of training; None if it is not known.
        findings: all that was found in the file.
        test: the report on the test file, if there is one.
        test_records: the records of the test file, or those that were given.
    """

    path: str
    form: str
    has_bom: bool
    newlines: str
    n_lines: int
    lines: list[int]
    other_fields: dict[str, int]
    lengths: list[int]
    supervised: list[int]
    max_length: int | None
    findings: Findings = field(repr=False)
    test: "DataReport | None" = None
    test_records: list[dict] = field(default_factory=list, repr=False)

    @property
    def n_records(self) -> int:
        """How many records can be trained on, the too long included."""
        return len(self.lines)

    @property
    def faults(self) -> list[Finding]:
        """What cannot be trained on, by line; at most 1000 of a kind."""
        return self.findings.of(is_fault=True)

    @property
    def warnings(self) -> list[Finding]:
        """What can be trained on, and is suspicious, by line; at most 1000 of a kind."""
        return self.findings.of(is_fault=False)

    @property
    def counts(self) -> Counter[str]:
        """How many findings there are of each kind."""
        return self.findings.counts

    @property
    def n_faults(self) -> int:
        return self.findings.count(is_fault=True)

    @property
    def n_warnings(self) -> int:
        return self.findings.count(is_fault=False)

    @property
    def n_too_long(self) -> int:
        """How many records are longer than `max_length`."""
        return 0 if self.max_length is None else sum(n > self.max_length for n in self.lengths)

    def check(self, also: tuple[str, ...] = ()) -> None:
        """Raise unless the files have no faults.

        Args:
            also: kinds of warnings that are to count as faults, such as ("leak", "duplicate").

        Raises:
            FaultyData: a `ValueError`, with the faults as its message and this report as `report`.
        """
        for kind in also:
            check_choice("also", kind, KINDS)
        for report in (self, *([self.test] if self.test else [])):
            bad = [kind for kind in report.counts if KINDS[kind].is_fault or kind in also]
            if bad:
                sound = f"read_records(…, faulty='leave out') returns the {counted(report.n_records, 'sound record')}"
                raise FaultyData(f"{report.listed(bad)}\n{sound}", self)

    def listed(self, kinds: list[str]) -> str:
        """The findings of these kinds in words, the first few of each."""
        texts = []
        for kind in kinds:
            found = [one for one in self.faults + self.warnings if one.kind == kind]
            count = self.counts[kind]
            texts.append(f"{kind} ({count:,}):")
            texts += [f"  {one.place} {one.found}" for one in found[:SHOWN]]
            texts += [f"  … and {count - SHOWN:,} more"] if count > SHOWN else []
            texts.append(f"  allowed: {found[0].allowed}; to do: {found[0].advice}")
        total = sum(self.counts[kind] for kind in kinds)
        return "\n".join([f"{self.path} has {counted(total, 'fault')}", *texts])

    def quantile(self, share: float) -> int:
        """The length in tokens that `share` of the records do not exceed; without a tokenizer an error."""
        if not self.lengths:
            raise ValueError("no lengths are known; give read_records a tokenizer, and a file with records")
        return int(np.quantile(self.lengths, share, method="higher"))

    def histogram(self, bins: int = 10) -> str:
        """The lengths in tokens as a picture of bars, with a line where `max_length` is; "" if none are known."""
        if not self.lengths:
            return ""
        top = max(self.lengths)
        width = -(-top // bins)
        counts = [
            sum(i * width < n <= (i + 1) * width for n in self.lengths) for i in range(-(-top // width))
        ]
        rows = []
        for i, n in enumerate(counts):
            bar = "█" * round(BAR * n / max(counts)) or ("▏" if n else "")
            cut = (
                "  ← max_length" if self.max_length and i * width < self.max_length <= (i + 1) * width else ""
            )
            rows.append(f"{i * width + 1:>7,}–{(i + 1) * width:<7,} {bar} {n:,}{cut}")
        return "\n".join(rows)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {counted(self.n_records, 'record')} of the form {self.form or '(none)'} in {counted(self.n_lines, 'line')}"
        ]
        lines += ["it begins with a BOM, which is not read"] if self.has_bom else []
        if self.other_fields:
            lines.append(
                f"fields that are not read: {', '.join(f'{k} ({n:,})' for k, n in self.other_fields.items())}"
            )
        if self.lengths:
            lines.append(
                f"tokens: {min(self.lengths):,} to {max(self.lengths):,}, median {self.quantile(0.5):,}; "
                f"{sum(self.supervised):,} of {sum(self.lengths):,} are learned"
            )
            if self.max_length:
                lines.append(
                    f"longer than max_length={self.max_length:,}: {self.n_too_long:,}, which are left out"
                )
            lines.append(self.histogram())
        for name, count, is_fault in (("faults", self.n_faults, True), ("warnings", self.n_warnings, False)):
            kinds = [kind for kind in self.counts if KINDS[kind].is_fault is is_fault]
            lines.append(f"{name}: {count:,}")
            lines += self.listed(kinds).split("\n")[1:]
        if self.test:
            lines += ["", str(self.test)]
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        text = str(self)
        fence = "`" * max(
            3, 1 + max(map(len, re.findall("`+", text)), default=0)
        )  # a found text may hold one
        return f"{fence}text\n{text}\n{fence}"

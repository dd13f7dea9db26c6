"""From CSV (RFC 4180) to rows: the values of each row by the names in the first line.

Whatever cannot be read is noted as a finding, and none of it becomes a row.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator

from labkit.checks import nearest
from labkit.data.own.findings import Findings, counted
from labkit.data.own.lines import MAX_LINE, Line, Row, can_be_read
from labkit.data.records import shortened

DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def parse_csv(lines: Iterable[Line], columns: tuple[str, str], findings: Findings) -> Iterator[Row]:
    """The rows of a CSV file (RFC 4180), by the names in its first line."""
    header: list[str] = []
    for number, values in csv_values(lines, findings):
        if not header:
            header = values or []
            if not header or not is_header(header, number, columns, findings):
                return
        elif values is not None and len(values) != len(header):
            findings.add(
                "ragged row",
                number,
                f"has {counted(len(values), 'value')} for the columns {shortened(header)}",
            )
        elif values is not None:
            yield Row(number, dict(zip(header, values)))


def csv_values(lines: Iterable[Line], findings: Findings) -> Iterator[tuple[int, list[str] | None]]:
    """The values of each row that is not blank, with the line where it begins (a value may go over several lines).

    None stands for a row with a line that cannot be read. Behind a quote that is not closed, or a line too long to
    look for quotes in, any guess where the next row begins could make a record of two halves, so nothing more is read.
    """
    lines = iter(lines)
    latest, start, is_bad = Line(0, "", "", 0), 1, False

    def fed() -> Iterator[str]:
        nonlocal latest, is_bad
        for latest in lines:
            is_bad = not can_be_read(latest, findings) or is_bad
            if latest.text is None:
                return
            yield latest.text + latest.ending

    reader = csv.reader(fed(), strict=True)
    why = ""
    try:
        while (values := next_row(reader)) is not None:
            if values:
                yield start, None if is_bad else values
            start, is_bad = latest.number + 1, False
    except csv.Error as error:
        cr = "new-line" in str(error)
        why = (
            "ends its rows with CR alone"
            if cr
            else f"cannot be divided into values: {error} in line {latest.number}"
        )
    rest = sum(1 for _ in lines)
    if why or rest:
        skipped = (
            f"what stands after line {latest.number} is not read ({counted(rest, 'line')})" if rest else ""
        )
        advice = "end lines with LF or CRLF" if "CR alone" in why else ""
        findings.add(
            "broken quotes", start, "; ".join(filter(None, [why or "is too long", skipped])), advice=advice
        )


def next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row, however long its values; the limit is the csv module's for everybody, so it is put back."""
    limit = csv.field_size_limit(MAX_LINE)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


def is_header(header: list[str], number: int, columns: tuple[str, str], findings: Findings) -> bool:
    """Does the first line name both columns? If not, says why."""
    twice = [name for name, n in Counter(header).items() if n > 1]
    missing = [name for name in columns if name not in header]
    if not missing and not set(twice) & set(columns):
        return True
    if not missing:
        findings.add("duplicate column", number, f"names the column {twice[0]!r} twice")
        return False
    found, advice, kind = f"has the columns {shortened(header)}, and not {missing[0]!r}", "", "missing column"
    plural = next(
        (plural for sign, plural in DELIMITERS.items() if len(header) == 1 and sign in header[0]), ""
    )
    if plural:
        found, kind = f"has {plural} between its columns: {shortened(header[0])}", "wrong delimiter"
    elif header[0].lstrip().startswith("{"):
        found, advice = (
            f"begins with {shortened(header[0])}",
            "a file with a JSON object per line is named .jsonl",
        )
    elif len(header) == 2:
        advice = f"if these are names and not a record, read_records(…, columns={tuple(header)!r})"
    else:
        found += nearest(missing[0], header).removesuffix(".")
    findings.add(kind, number, found, advice=advice)
    return False

"""From lines to rows: the dicts of a file with JSON, or the lines of a CSV file by the names in its first line.

Whatever cannot be read is noted as a finding, and none of it becomes a row.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from labkit.checks import nearest
from labkit.data.own.findings import Findings
from labkit.data.own.lines import MAX_LINE, Line
from labkit.data.records import shortened
from labkit.files.reading import DuplicateKey, unique_keys

DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class Row(NamedTuple):
    """What one record was made of, and the line where it begins."""

    line: int
    values: dict


class NotANumber(ValueError):
    """NaN or Infinity, which Python's json would take."""


def refuse_constant(name: str) -> None:
    raise NotANumber(name)


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def json_rows(lines: Iterable[Line], findings: Findings) -> Iterator[Row]:
    """The JSON objects, one per line; blank lines are passed over."""
    for line in lines:
        if not line.is_blank and can_be_read(line, findings):
            yield from parsed(line.text, line.number, findings)


def can_be_read(line: Line, findings: Findings) -> bool:
    """Is the line short enough, in UTF-8 and without NUL bytes?"""
    if line.text is None:
        findings.add("line too long", line.number, f"has {line.size:,} bytes")
        return False
    bad = re.search("[\udc80-\udcff]", line.text)
    if bad:
        byte = ord(bad[0]) - 0xDC00
        findings.add(
            "not UTF-8",
            line.number,
            f"has the byte 0x{byte:02x} in column {bad.start() + 1}, which is no UTF-8, after "
            f"{line.text[max(0, bad.start() - 20) : bad.start()]!r}",
            advice=f"if it is {legacy_letter(byte)}: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
        )
        return False
    if "\0" in line.text:
        findings.add("NUL byte", line.number, f"has a NUL byte in column {line.text.index(chr(0)) + 1}")
        return False
    return True


def legacy_letter(byte: int) -> str:
    """What a byte means in Windows-1252, of which Latin-1 is a part."""
    letter = bytes([byte]).decode("cp1252", "replace")
    return f"{letter!r} in Windows-1252 or Latin-1"


def parsed(text: str, number: int, findings: Findings, decode: Callable = DECODER.decode) -> Iterator[Row]:
    """The object in `text`, if there is one."""
    try:
        value = decode(text)
    except DuplicateKey as error:
        findings.add("duplicate key", number, f"has an object in which {error}")
    except NotANumber as error:
        findings.add("not a number", number, f"has the value {error}")
    except RecursionError:
        findings.add("not JSON", number, "is not JSON that can be read: nested too deeply")
    except json.JSONDecodeError as error:
        explain(text, error, number, findings)
    except ValueError as error:  # a number of more digits than Python takes
        findings.add("not JSON", number, f"is not JSON that can be read: {error}")
    else:
        if isinstance(value, dict):
            yield Row(number, value)
        else:
            findings.add("not an object", number, f"is a JSON {type(value).__name__}, not an object {{…}}")


def explain(text: str, error: json.JSONDecodeError, number: int, findings: Findings) -> None:
    """Note why `text` is no JSON, as what people do who write it by hand."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].strip()
    said = f"is not JSON: {error.msg} in column {error.pos + 1}, at {shortened(text[error.pos :][:40])}"
    if after == "," or (before.endswith(",") and after[:1] in ("}", "]")) or after[:1] == ",":
        findings.add("trailing comma", number, f"has a comma too many in column {error.pos + 1}")
    elif text.startswith("\ufeff"):
        findings.add("not JSON", number, "begins with a BOM", advice="remove it; two files were joined here")
    elif "\r" in text:
        findings.add(
            "not JSON", number, f"{said}; it holds CR without LF", advice="end lines with LF or CRLF"
        )
    elif after[:1] == "{" and before.endswith("}"):
        findings.add("not JSON", number, "holds two objects", advice="begin a line for each")
    elif text.lstrip().startswith(("{'", "['")):
        findings.add("not JSON", number, f"{said}; it is written as Python does, with 'single quotes'")
    elif not after:
        findings.add(
            "not JSON",
            number,
            f"{said}: it ends in the middle of an object",
            advice="write every object on one line; of the last line, see whether the file was written to its end",
        )
    else:
        findings.add("not JSON", number, said)


def csv_rows(lines: Iterable[Line], columns: tuple[str, str], findings: Findings) -> Iterator[Row]:
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
                f"has {len(values)} values for the {len(header)} columns {shortened(header)}",
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
    try:
        while (values := next_row(reader)) is not None:
            if values:
                yield start, None if is_bad else values
            start, is_bad = latest.number + 1, False
    except csv.Error as error:
        rest = sum(1 for _ in lines)
        found = f"cannot be divided into values: {error}, in line {latest.number}"
        findings.add(
            "broken quotes", start, found + (f"; the {rest:,} lines after it are not read" if rest else "")
        )
    else:
        rest = sum(1 for _ in lines)
        if rest:
            findings.add(
                "broken quotes", latest.number, f"is not searched for quotes; {rest:,} lines are not read"
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
    for delimiter, plural in DELIMITERS.items():
        if len(header) == 1 and delimiter in header[0]:
            findings.add(
                "wrong delimiter", number, f"has {plural} between its columns: {shortened(header[0])}"
            )
            return False
    hint = nearest(missing[0], header).removesuffix(".")
    if len(header) == 2:
        hint += f"; read them with columns={tuple(header)!r}"
    findings.add(
        "missing column", number, f"has the columns {shortened(header)}, and not {missing[0]!r}{hint}"
    )
    return False

"""From JSON to rows: one object per line, or a list of objects.

Whatever cannot be read is noted as a finding, and none of it becomes a row.
"""

import json
import re
from collections.abc import Iterable, Iterator

from labkit.data.own.findings import Findings
from labkit.data.own.lines import Line, Row, can_be_read
from labkit.data.records import shortened
from labkit.files.reading import DuplicateKey, unique_keys


class NotANumber(ValueError):
    """NaN or Infinity, which Python's json would take."""


def refuse_constant(name: str) -> None:
    raise NotANumber(name)


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def parse_lines(lines: Iterable[Line], findings: Findings) -> Iterator[Row]:
    """The JSON objects, one per line; blank lines are passed over."""
    for line in lines:
        if not line.is_blank and can_be_read(line, findings):
            yield from parse_object(line.text, line.number, findings)


def parse_list(text: str, findings: Findings) -> Iterator[Row]:
    """The objects of one JSON list, however it is laid out. Behind what is not JSON, no more of it is read."""
    lines = (Line(number, line, "", 0) for number, line in enumerate(text.split("\n"), 1))
    if [line for line in lines if not can_be_read(line, findings)]:
        return
    place, number = text.index("["), 1
    separator = "["
    while separator != "]":
        start = after_space(text, place + 1)
        number += text.count("\n", place, start)
        if text[start : start + 1] == "]":
            if separator == ",":
                findings.add("trailing comma", number, "has a comma too many at the end of the list")
            place = start
            break
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            end = len(text)
        yield from parse_object(text[start:end], number, findings)
        number += text.count("\n", start, end)
        place = after_space(text, end)
        number += text.count("\n", end, place)
        separator = text[place : place + 1]
        if separator not in (",", "]"):
            if end < len(text):
                findings.add(
                    "not JSON",
                    number,
                    f"has {shortened(text[place : place + 40])} where ',' or ']' should be",
                )
            return
    if rest := text[place + 1 :].strip():
        findings.add("not JSON", number, f"has {shortened(rest[:40])} behind the end of the list")


def after_space(text: str, place: int) -> int:
    """The first place from `place` on where no white space of JSON is."""
    return re.compile(r"[ \t\n\r]*").match(text, place).end()


def parse_object(text: str, number: int, findings: Findings) -> Iterator[Row]:
    """The object in `text`, if there is one."""
    try:
        value = DECODER.decode(text)
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
    said = f"is not JSON: {error.msg} in column {error.pos + 1}, at {shortened(text[error.pos : error.pos + 40])}"
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

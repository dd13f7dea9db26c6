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


UNREAD = "; what stands behind it is not read"
JSON_TYPES = {str: "string", bool: "boolean", list: "list", dict: "object", type(None): "null"}
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
    place, number, separator = text.index("["), 1, "["
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
            yield from parse_object(text[start:].rstrip(), number, findings, UNREAD)
            return
        yield from parse_object(text[start:end], number, findings)
        place = after_space(text, end)
        number += text.count("\n", start, place)
        separator = text[place : place + 1]
        if separator not in ("]", ","):
            what = shortened(text[place : place + 40]) if separator else "the end of the file"
            findings.add("not JSON", number, f"has {what} where ',' or ']' should be{UNREAD}")
            return
    rest = after_space(text, place + 1)
    if rest < len(text):
        number += text.count("\n", place, rest)
        findings.add(
            "not JSON", number, f"has {shortened(text[rest : rest + 40])} behind the end of the list{UNREAD}"
        )


def after_space(text: str, place: int) -> int:
    """The first place from `place` on where no white space of JSON is."""
    return re.compile(r"[ \t\n\r]*").match(text, place).end()


def parse_object(text: str, number: int, findings: Findings, unread: str = "") -> Iterator[Row]:
    """The object in `text`, if there is one; if there is not, `unread` says what that means for the rest."""
    try:
        value = DECODER.decode(text)
    except DuplicateKey as error:
        findings.add("duplicate key", number, f"has the key {shortened(error.key)} twice in an object")
    except NotANumber as error:
        findings.add("not a number", number, f"has the value {error}")
    except RecursionError:
        findings.add("not JSON", number, f"holds lists or objects nested too deeply{unread}")
    except json.JSONDecodeError as error:
        explain(text, error, number, findings, unread)
    except ValueError:  # of more than 4300 digits, which Python refuses to read: it takes quadratic time
        findings.add("not JSON", number, f"holds a number of thousands of digits{unread}")
    else:
        if isinstance(value, dict):
            yield Row(number, value)
        else:
            findings.add("not an object", number, f"is {type_of(value)}, not an object {{…}}")


def type_of(value: object) -> str:
    """What JSON calls the type of a value."""
    return f"a JSON {JSON_TYPES.get(type(value), 'number')}"


def explain(text: str, error: json.JSONDecodeError, number: int, findings: Findings, unread: str) -> None:
    """Note why `text` is not JSON, in terms of what was probably done to it."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].strip()
    around = shortened(text[error.pos : error.pos + 40])
    found, advice, kind = f"is not JSON: {error.msg} in column {error.pos + 1}, at {around}", "", "not JSON"
    is_missing = before.endswith(
        ":"
    )  # {"prompt": , …}: it is a value that is wanted, and not a comma too many
    if (after[:1] == "," and not is_missing) or (before.endswith(",") and after[:1] in ("}", "]")):
        found, kind = f"has a comma too many in column {error.pos + 1}", "trailing comma"
    elif text.startswith("\ufeff"):
        found, advice = "begins with a BOM", "remove it; two files were joined here"
    elif "\r" in text:
        found, advice = "ends its records with CR alone", "end lines with LF or CRLF"
    elif not after or error.msg.startswith("Unterminated"):
        found = f"ends in the middle of an object: {error.msg} in column {error.pos + 1}"
        advice = (
            "write every object on one line; if this is the last, see whether the file was written to its end"
        )
    elif error.msg.startswith("Invalid control character"):
        advice = "inside a text, write a tab as \\t and a line break as \\n"
    elif after[:1] == "{" and before.endswith("}"):
        found, advice = "holds two objects", "begin a line for each"
    elif text.lstrip().startswith("{'"):
        found += ", as Python writes a dict"
    elif not text.lstrip().startswith("{"):
        advice = "begin every line with {; a file with commas between columns is named .csv"
    findings.add(kind, number, found + unread, advice=advice)

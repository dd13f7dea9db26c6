"""Your own data: a file of records, read and checked before anything is trained on it."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from labkit.checks import check_choice, check_whole
from labkit.data.encoding import encode
from labkit.data.own.classes import note_classes
from labkit.data.own.csv_rows import parse_csv
from labkit.data.own.findings import Findings
from labkit.data.own.forms import COLUMNS, PAIR, TEXT, own_records
from labkit.data.own.json_rows import parse_lines, parse_list
from labkit.data.own.leaks import note_duplicates, note_leaks
from labkit.data.own.lines import MAX_FILE, Line, Row, Start, look_at_start, numbered_lines
from labkit.data.own.report import DataReport
from labkit.data.records import records_of, shortened
from labkit.files.reading import read_bytes

FAULTY = ("raise", "leave out")
MAX_LIST = 64 * 2**20  # bytes of one JSON list, which is parsed as a whole
CSV, JSON = (".csv",), (".jsonl", ".ndjson", ".json")
NO_LIMIT = 10**6  # tokens; tokenizers that know no context say more than this


def read_records(
    path: str | Path,
    tokenizer=None,
    *,
    test: str | Path | list[dict] | None = None,
    columns: tuple[str, str] | None = None,
    max_length: int | None = None,
    faulty: str = "raise",
) -> tuple[list[dict], DataReport]:
    """Read the records of a file, and say everything about them that could spoil a training run.

    The file is UTF-8, with or without a BOM, its lines ending in LF or CRLF. It holds JSON (`.jsonl`, `.json`), one
    object per line or a list of objects, with `messages`, or `prompt` and `completion`, or `text`; or CSV (`.csv`),
    whose first line names two columns. A record is never repaired, cut or guessed at.

    A line that cannot be trained on raises, with all the others of the file. With "leave out" the sound records are
    returned, and the report alone says what is missing: whoever does not look at it trains on less than the file
    holds, so this must be asked for.

    Args:
        path: of the file.
        tokenizer: to measure lengths, and to see whether template and tokenizer write every answer in full.
        test: what the model will be tested on: a file, read in the same way, or records; looked at for leaks.
        columns: the names of prompt and completion, in CSV or JSON; default: ("prompt", "completion").
        max_length: tokens; default: the tokenizer's context. A longer record is a warning, for training leaves it out.
        faulty: "raise" (default) or "leave out".

    Returns:
        the records in labkit's own form, `{"messages"}` or `{"prompt", "completion"}`, and the report.

    Raises:
        FaultyData: there are faults (unless left out); its `report` holds them.
        FileNotFoundError: there is no such file.
        ValueError: a folder, a pipe, a file of more than 256 MiB; or a setting that is not allowed.
    """
    check_choice("faulty", faulty, FAULTY)
    if max_length is not None:
        check_whole("max_length", max_length, usual="None is for the tokenizer's context")
    check_columns(columns)
    max_length = named_context(tokenizer, max_length)
    records, report = read_one(path, tokenizer, columns, max_length)
    if test is not None:
        if isinstance(test, (str, os.PathLike)):
            test_records, test_report = read_one(test, tokenizer, columns, max_length)
            places = [f"line {line} of {test}" for line in test_report.lines]
            report = replace(report, test=test_report, test_records=test_records)
        else:
            report = replace(report, test_records=[dict(record) for record in records_of(test, "test")])
            places = [f"record {i} of test" for i in range(len(report.test_records))]
        note_leaks(records, report.test_records, report.lines, places, report.findings)
        note_classes(records, report.test_records, places, report.findings)
    if faulty == "raise":
        report.check()
    return records, report


def read_one(
    path: str | Path, tokenizer, columns: tuple[str, str] | None, max_length: int | None
) -> tuple[list[dict], DataReport]:
    """The sound records of one file, and its report."""
    findings, ends = Findings(str(path)), Counter[str]()
    start = look_at_start(path)
    rows = list(rows_of(path, start, columns, findings, ends))
    found, places, form = own_records(rows, columns, findings)
    if not rows and not findings.counts:
        findings.add("empty file", 0, "holds no record")
    records, lines, lengths, supervised = [], [], [], []
    for record, line in zip(found, places):
        if tokenizer is not None:
            try:
                one = encode(record, tokenizer)
            except ValueError as error:
                findings.add("cannot be encoded", line, f"cannot be encoded: {error}")
                continue
            lengths.append(len(one))
            supervised.append(one.n_supervised)
            if max_length is not None and len(one) > max_length:
                findings.add("too long", line, f"has {len(one):,} tokens, and max_length is {max_length:,}")
        records.append(record)
        lines.append(line)
    note_duplicates(records, lines, findings)
    return records, DataReport(
        path=str(path),
        form=form,
        has_bom=start.has_bom,
        newlines=" and ".join(name for end, name in (("\n", "LF"), ("\r\n", "CRLF")) if ends[end]),
        n_lines=ends.total(),
        lines=lines,
        other_fields=other_fields(rows, form, columns),
        lengths=lengths,
        supervised=supervised,
        max_length=max_length,
        findings=findings,
    )


def rows_of(
    path: str | Path, start: Start, columns: tuple[str, str] | None, findings: Findings, ends: Counter[str]
) -> Iterator[Row]:
    """The rows of a file, whichever way it is written; counts how its lines end."""
    suffix = Path(path).suffix.lower()
    if suffix not in CSV + JSON:
        raise ValueError(
            f"{path} ends in {suffix!r}; name the file {', '.join(JSON)} if it holds JSON objects, "
            f"and {', '.join(CSV)} if it holds columns with commas between them"
        )
    if start.kind:
        findings.add(start.kind, 0, start.found, advice=start.advice)
        return

    def counted() -> Iterator[Line]:
        for line in numbered_lines(path, MAX_FILE):
            ends[line.ending] += 1
            yield line

    lines = counted()
    if suffix in CSV:
        yield from parse_csv(lines, columns or COLUMNS, findings)
    elif start.is_list:
        text = read_bytes(path, MAX_LIST).decode("utf-8-sig", "surrogateescape")
        yield from parse_list(text, findings)
    else:
        yield from parse_lines(lines, findings)
    for _ in lines:  # what is left of a file of which no more is read
        pass


def other_fields(rows: Sequence[Row], form: str, columns: tuple[str, str] | None) -> dict[str, int]:
    """The fields that no record of this form keeps, with how many rows have them."""
    kept = {PAIR: set(columns or COLUMNS), TEXT: {"text"}}.get(form, {"messages", "tools"})
    return dict(Counter(name for row in rows for name in row.values if name not in kept))


def named_context(tokenizer, max_length: int | None) -> int | None:
    """`max_length`, or the context that the tokenizer names, or None."""
    named = getattr(tokenizer, "model_max_length", None)
    return max_length if max_length is not None or named is None or named > NO_LIMIT else int(named)


def check_columns(columns: object) -> None:
    """Raise a `ValueError` unless it is None or two different names."""
    names = columns if isinstance(columns, (tuple, list)) else ()
    if columns is not None and not (
        len(set(map(str, names))) == 2 == len(names) == sum(isinstance(n, str) for n in names)
    ):
        raise ValueError(
            f"columns={shortened(columns)} must be the names of two columns, such as ('question', 'answer')"
        )

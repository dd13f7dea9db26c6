"""The lines of a data set: one JSON object per line, in `data/NAME/SPLIT.jsonl`."""

from pathlib import Path

from labkit.checks import check_choice
from labkit.data.own.findings import Findings
from labkit.data.own.json_rows import parse_lines
from labkit.data.own.lines import check_is_file, numbered_lines
from labkit.paths import data_folder

SPLITS = ("train", "validation", "test")


def rows(name: str, split: str) -> list[dict]:
    """The lines of data/`name`/`split`.jsonl."""
    check_choice("split", split, SPLITS)
    return read_jsonl(data_folder() / name / f"{split}.jsonl")


def read_jsonl(path: str | Path) -> list[dict]:
    """The JSON objects in a file, one per line: records to train on, if they are such.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: a line is not a JSON object; says which. `labkit.data.read_records` reports on all of them.
    """
    findings = Findings(str(path))
    found = list(parse_lines(numbered_lines(path), findings))
    if findings.kept:
        raise ValueError(str(findings.kept[0]))
    return [row.values for row in found]


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: it is missing; of the data folder, says how to point to it.
    """
    check_is_file(path)
    return path.read_text(encoding="utf-8")

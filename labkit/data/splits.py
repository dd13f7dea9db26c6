"""The lines of a data set: one JSON object per line, in `data/NAME/SPLIT.jsonl`."""

import json
from pathlib import Path

from labkit.checks import check_choice
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
        ValueError: a line is not a JSON object; says which.
    """
    records = []
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"line {number} of {path} is a JSON {type(record).__name__}, not an object {{…}}"
                )
            records.append(record)
    return records


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: it is missing; of the data folder, says how to point to it.
    """
    if not path.exists():
        ours = path.is_relative_to(data_folder())
        hint = (
            "run from a checkout of the course, or set LABKIT_DATA to its data/" if ours else "check the path"
        )
        raise FileNotFoundError(f"{path} is missing; {hint}")
    return path.read_text(encoding="utf-8")

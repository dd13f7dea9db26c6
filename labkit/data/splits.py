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


def read_jsonl(path: Path) -> list[dict]:
    """The JSON objects in a file, one per line."""
    return [json.loads(line) for line in read_text(path).split("\n") if line]


def read_text(path: Path) -> str:
    """The text of a file of the data folder.

    Raises:
        FileNotFoundError: it is missing; says how to point to the data folder.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run from a checkout of the course, or set LABKIT_DATA to its data/"
        )
    return path.read_text(encoding="utf-8")

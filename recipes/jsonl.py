"""The rows of a data set, one JSON object per line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labkit.files.reading import read_json_lines
from labkit.files.writing import only_one, write_text
from labkit.sweeps.records import mend_last_line


def write(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file is whole or as it was."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    """The rows of a file; none if it is not there yet."""
    return read_json_lines(path) if path.exists() else []


@contextmanager
def resuming(path: Path) -> Iterator[None]:
    """For a recipe that adds to a file: nobody else does meanwhile, and a last line that a kill cut off is put aside."""
    with only_one(path.with_suffix(".lock"), f"this recipe is running already, and writes to {path}"):
        mend_last_line(path)
        yield

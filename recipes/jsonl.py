"""The rows of a data set, one JSON object per line."""

import json
from pathlib import Path

from labkit.files.reading import read_json_lines
from labkit.files.writing import write_text


def write(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file is whole or as it was."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    """The rows of a file; none if it is not there yet."""
    return read_json_lines(path) if path.exists() else []

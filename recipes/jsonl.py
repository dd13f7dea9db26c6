"""The rows of a data set, one JSON object per line."""

import json
from pathlib import Path

from labkit.files.reading import parse_json, read_bytes
from labkit.files.writing import write_text


def write(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file is whole or as it was."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    """The rows of a file; none if it is not there yet."""
    if not path.exists():
        return []
    return [parse_json(path, line) for line in read_bytes(path).split(b"\n") if line]

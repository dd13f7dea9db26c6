"""Writing the rows of a data set."""

import json
from pathlib import Path

from labkit.files.writing import write_text


def write(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line; the file is whole or as it was."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

"""Writing the rows of a data set."""

import json
import os
from pathlib import Path


def write(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line, under a temporary name first: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(scratch, path)

"""A record as a table in the terminal."""

import importlib
from pathlib import Path
from typing import Any

from labkit.files.reading import read_json


def show(path: Path) -> None:
    """Print the record at `path`: a row for each measurement, then what follows from them."""
    record = read_json(path)
    columns = importlib.import_module(f"gpu.{record['section']}").SECTION.columns
    print(f"\n{record['title']}" + (" · a rehearsal on the CPU" if record["rehearsal"] else ""))
    lines = [["", *columns.values()]]
    for row in record["rows"]:
        if row["outcome"] == "measured":
            cells = [in_words(row["numbers"].get(name)) for name in columns]
        else:
            cells = [f"{row['outcome']}: {row.get('reason', '')}"]
        lines.append([row["key"], *cells])
    full = [line for line in lines if len(line) == len(columns) + 1]
    widths = [max(len(line[i]) for line in full) for i in range(len(columns) + 1)]
    widths[0] = max(len(line[0]) for line in lines)
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += (
            [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])] if line in full else line[1:]
        )
        print("  ".join(cells).rstrip())
    for sentence in record["conclusions"]:
        print(f"→ {sentence}")


def in_words(value: Any) -> str:
    """A number as the table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

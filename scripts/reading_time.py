"""How long do the lessons take? Counted from the notebooks; see `labkit.lab.reading`.

.venv/bin/python scripts/reading_time.py                       # all of them
.venv/bin/python scripts/reading_time.py 00 01 02 08           # a path, with its sum
.venv/bin/python scripts/reading_time.py --execute 00 01 02    # run only what the core needs, from a cold kernel
.venv/bin/python scripts/reading_time.py --write 00 01         # put the numbers into the box at their head
"""

import argparse
import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from labkit.files.writing import write_text
from labkit.lab.reading import core_code, reading_time, with_minutes

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def lessons(chosen: list[str]) -> list[Path]:
    """The notebooks whose names begin with these, or all."""
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    return [p for p in paths if not chosen or p.name.split("_")[0] in chosen]


def table(paths: list[Path]) -> str:
    head = f"{'lesson':32} {'read':>5} {'core':>5} {'words':>6} {'lines':>6} {'exercises':>10} {'core ones':>10} {'run':>5} {'core, all':>10}"
    rows, whole = [head], 0.0
    for path in paths:
        t = reading_time(path)
        whole += t.whole_core
        rows.append(
            f"{path.stem:32} {t.reading:5} {t.core:5} {t.core_words:6,} {t.core_lines:6} {t.exercises:10} {t.core_exercises:10} {t.run:5g} {t.whole_core:10.0f}"
        )
    hours, minutes = divmod(round(whole), 60)
    return "\n".join([*rows, f"core, with its exercises and the waiting: {hours} h {minutes:02} min"])


def execute_core(path: Path) -> None:
    """Run the code cells of the core, and no other, from a cold kernel."""
    notebook = nbformat.read(path, as_version=4)
    kept = core_code(json.loads(path.read_text(encoding="utf-8"))["cells"])
    notebook.cells = [cell for cell, is_kept in zip(notebook.cells, kept) if is_kept]
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", help="numbers, such as 02 or 08b; default: all")
    parser.add_argument("--execute", action="store_true", help="run the core alone")
    parser.add_argument("--write", action="store_true", help="write the minutes into the notebooks")
    chosen = parser.parse_args()
    paths = lessons(chosen.lessons) or sys.exit(f"no lesson is called {', '.join(chosen.lessons)}")
    for path in paths:
        if chosen.execute:
            os.environ["LABKIT_STATIC"] = "1"
            execute_core(path)
            print(f"{path.stem}: the core runs without the rest")
        if chosen.write:
            write_text(path, with_minutes(path))
    print(table(paths))


if __name__ == "__main__":
    main()

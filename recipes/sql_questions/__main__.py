"""Write data/sql: `python -m recipes.sql_questions [folder]`, the same bytes every time."""

import json
import sys
from pathlib import Path

from labkit.files.writing import write_text
from labkit.paths import data_folder
from recipes.jsonl import write
from recipes.sql_questions.generate import check_names, generate


def one_row_a_line(databases: dict[str, dict]) -> str:
    """JSON that reads like tables."""
    parts = []
    for name, content in databases.items():
        tables = []
        for table, inside in content.items():
            rows = ",\n    ".join(json.dumps(row) for row in inside["rows"])
            tables.append(
                f'  "{table}": {{"columns": {json.dumps(inside["columns"])}, "rows": [\n    {rows}]}}'
            )
        parts.append(f'"{name}": {{\n' + ",\n".join(tables) + "}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(folder: Path) -> None:
    databases, items, dropped = generate()
    check_names(databases)
    write_text(folder / "databases.json", one_row_a_line(databases))
    for split, rows in items.items():
        write(folder / f"{split}.jsonl", rows)
    print({split: len(rows) for split, rows in items.items()}, dropped)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else data_folder() / "sql")

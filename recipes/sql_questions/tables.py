"""The tables of the databases: their schemas, read from schemas.txt, and rows drawn from a seed.

Rows are random, except that the numbers in a column differ where its range allows: if two columns were equal,
no rows could distinguish queries about them.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

TYPES = {"name": "TEXT", "cat": "TEXT", "real": "REAL"}  # the others: INTEGER


@dataclass
class Column:
    """A column: its name and kind, the words that people use for it, and the values that it may have."""

    name: str
    kind: str
    words: list[str] = field(default_factory=list)
    values: str = ""
    said: str = ""  # "heaviest/lightest", or a phrase around {v}

    @property
    def is_number(self) -> bool:
        return self.kind.rstrip("+-") in ("int", "real", "year")


@dataclass
class Table:
    """A table: its name, what one row and many rows are called, its columns, and its rows."""

    name: str
    singular: str
    plural: str
    columns: list[Column] = field(default_factory=list)
    rows: list[list] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Column]:
        """The columns of these kinds."""
        return [c for c in self.columns if c.kind.rstrip("+-") in kinds or c.kind in kinds]


def read_schemas() -> list[tuple[str, str, list[Table]]]:
    """(database, split, tables) in the order of schemas.txt."""
    databases: list[tuple[str, str, list[Table]]] = []
    for line in (Path(__file__).parent / "schemas.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("db "):
            _, split, name = line.split()
            databases.append((name, split, []))
        elif line.startswith("table "):
            table, words = line.removeprefix("table ").split(" = ")
            singular, plural = words.split(", ")
            databases[-1][2].append(Table(table, singular, plural))
        elif line and not line.startswith("#"):
            name, kind, words, values, said = (line.split(" | ") + [""] * 4)[:5]
            databases[-1][2][-1].columns.append(Column(name, kind, words.split(", "), values, said))
    return databases


def numbers(rng: random.Random, column: Column, n: int) -> list:
    """`n` numbers of a column's range, rounded as people would, and different where the range allows."""
    low, high = (float(x) for x in column.values.split(".."))
    if column.kind.startswith("real"):
        tenths = range(round(low * 10), round(high * 10) + 1)
        steps = [tenth / 10 for tenth in tenths if tenth % 10]  # no 54.0, which people write as 54
    else:
        step = 1 if high < 1000 or column.kind == "year" else 10 if high < 10_000 else 500
        steps = list(range(int(low), int(high) + 1, step))
    return rng.sample(steps, n) if len(steps) >= n else rng.sample(steps * 2, n)


def fill(rng: random.Random, tables: list[Table]) -> dict[str, dict]:
    """Fill the tables with rows; returns them as `labkit.data.sql.tables` does."""
    for table in reversed(tables):  # the table that is referred to comes last
        n = len(table.of("name")[0].values.split("; ")) if table.of("name") else 12
        filled: list[list] = []
        for column in table.columns:
            if column.kind == "id":
                filled.append(list(range(1, n + 1)))
            elif column.kind == "ref":
                filled.append([rng.randint(1, len(tables[1].rows)) for _ in range(n)])
            elif column.kind == "name":
                names = column.values.split("; ")
                filled.append(rng.sample(names, n))
            elif column.kind == "cat":
                values = column.values.split("; ")
                filled.append(
                    rng.sample(values * 2, 2 * len(values)) + rng.choices(values, k=n - 2 * len(values))
                )
                rng.shuffle(filled[-1])
            else:
                filled.append(numbers(rng, column, n))
        table.rows = [list(row) for row in zip(*filled)]
    return {
        t.name: {
            "columns": {c.name: TYPES.get(c.kind.rstrip("+-"), "INTEGER") for c in t.columns},
            "rows": t.rows,
        }
        for t in tables
    }

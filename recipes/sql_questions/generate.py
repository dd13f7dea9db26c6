"""All questions, from hand-written schemas and phrasings and a seed.

A question is kept only if its query returns something that is neither empty nor everything, if its order
leaves no ties at a limit, and if every core near miss returns something else (near_misses.py).
"""

import random
import string

from labkit.data.sql import connect, execute, is_ordered, same_rows
from recipes.sql_questions.near_misses import core
from recipes.sql_questions.tables import fill, read_schemas
from recipes.sql_questions.writer import Writer

SEED = 11
PER_DATABASE = {"train": 70, "validation": 25, "test": 25, "more": 70}
SHARES = {
    "where": 24,
    "like": 6,
    "two": 13,
    "count": 13,
    "aggregate": 14,
    "order": 15,
    "group": 11,
    "distinct": 4,
}
JOIN_SHARE = 0.36  # of the questions to a database of two tables


def distinguished(connection, query: str, misses: list[str]) -> list[bool]:
    """For each near miss: does it fail, or return something else than `query` does?"""
    gold = execute(connection, query)
    results = [execute(connection, miss) for miss in misses]
    return [bool(r.error) or not same_rows(r.rows, gold.rows, is_ordered(query)) for r in results]


def is_trivial(connection, query: str, content: dict[str, dict]) -> bool:
    """Nothing, NULL, a count below two, or everything; or ties in what it is ordered by."""
    rows = execute(connection, query).rows
    if not rows or any(value is None for row in rows for value in row):
        return True
    everything = {len(table["rows"]) for table in content.values()}
    if " WHERE " in query and ("COUNT(*)" in query or "(" not in query):
        n = rows[0][0] if "COUNT(*)" in query else len(rows)
        if n < 1 + ("COUNT(*)" in query) or ("LIMIT" not in query and n in everything):
            return True
    if " ORDER BY " in query:
        column = query.split(" ORDER BY ")[1].split()[0]
        table = next(t for t in content.values() if column in t["columns"])
        values = [row[list(table["columns"]).index(column)] for row in table["rows"]]
        return len(set(values)) < len(values)
    return False


def generate() -> tuple[dict[str, dict], dict[str, list[dict]], dict[str, int]]:
    """All databases, the questions of each split, and how many candidates were dropped for which reason."""
    databases: dict[str, dict] = {}
    items: dict[str, list[dict]] = {split: [] for split in PER_DATABASE}
    dropped = {"candidates": 0, "trivial": 0, "near miss": 0}
    asked = set()
    for name, split, tables in read_schemas():
        rng = random.Random(f"{SEED} {name}")
        databases[name] = content = fill(rng, tables)
        connection, writer = connect(content), Writer(rng, split, tables)
        total = PER_DATABASE[split]
        joins = round(JOIN_SHARE * total) if len(tables) == 2 else 0
        # the same shares in every database, with the rounding left to chance
        kinds = ["join"] * joins + rng.choices(list(SHARES), list(SHARES.values()), k=total - joins)
        queries: list[str] = []
        for kind in kinds:
            for _ in range(2000):
                question, query, pattern = writer.write(kind)
                if question.lower() in asked or queries.count(query) >= (
                    2 if split in ("train", "more") else 1
                ):
                    continue
                dropped["candidates"] += 1
                if is_trivial(connection, query, content):
                    dropped["trivial"] += 1
                    continue
                if not all(distinguished(connection, query, core(query, content))):
                    dropped["near miss"] += 1
                    continue
                asked.add(question.lower())
                queries.append(query)
                items[split].append(
                    {"db": name, "question": question, "query": query, "kind": kind, "pattern": pattern}
                )
                break
            else:
                raise RuntimeError(f"no {kind} question found for {name}; give its columns wider ranges")
    for split, rows in items.items():
        random.Random(f"{SEED} {split}").shuffle(rows)
    return databases, items, dropped


def check_names(databases: dict[str, dict]) -> None:
    """Raise a `ValueError` if two tables share a column: queries name columns without their table."""
    for name, content in databases.items():
        columns = [c for table in content.values() for c in table["columns"]]
        if len(set(columns)) < len(columns) or not all(
            set(c) <= set(string.ascii_lowercase + "_") for c in columns
        ):
            raise ValueError(f"{name}: column names must differ and be plain: {columns}")

"""What the registry's database is asked: one function a question, each inside a transaction that is under way."""

import sqlite3
from datetime import datetime

from labkit.checks import nearest
from labkit.serving import times
from labkit.serving.naming import Reference, UnknownAdapter


def numbered(db: sqlite3.Connection, name: str, number: int) -> sqlite3.Row:
    """The row of a version whose files are there.

    Raises:
        UnknownAdapter: there is none, or its files were deleted.
    """
    row = db.execute("SELECT * FROM versions WHERE name = ? AND number = ?", (name, number)).fetchone()
    if row is None:
        query = "SELECT number FROM versions WHERE name = ? AND deleted IS NULL ORDER BY number"
        there = [f"v{n}" for (n,) in db.execute(query, (name,))]
        raise UnknownAdapter(
            f"there is no version v{number} of {name!r}; there is {', '.join(there[-10:])}"
            if there
            else no_name(db, name)
        )
    if row["deleted"] is not None:
        raise UnknownAdapter(
            f"{name}@v{number} was deleted at {row['deleted']}; its record is kept, its files are not"
        )
    return row


def no_name(db: sqlite3.Connection, name: str) -> str:
    """The sentence about a name that no adapter has."""
    names = [
        n for (n,) in db.execute("SELECT DISTINCT name FROM versions WHERE deleted IS NULL ORDER BY name")
    ]
    there = (
        f"; there are {len(names)}: {', '.join(names[:10])}{', …' * (len(names) > 10)}"
        if names
        else "; there is none"
    )
    hint = nearest(name, names)
    return f"there is no adapter {name!r}{there}{hint if hint != '.' else ''}"


def top(db: sqlite3.Connection, reference: Reference) -> sqlite3.Row | None:
    """The last move of an alias; None if it never was."""
    query = "SELECT * FROM moves WHERE name = ? AND alias = ? ORDER BY id DESC LIMIT 1"
    return db.execute(query, (reference.name, reference.alias)).fetchone()


def standing(db: sqlite3.Connection, reference: Reference) -> sqlite3.Row:
    """The last move of an alias that points somewhere.

    Raises:
        UnknownAdapter: it does not.
    """
    row = top(db, reference)
    if row is None or row["number"] is None:
        raise no_alias(db, reference)
    return row


def no_alias(db: sqlite3.Connection, reference: Reference) -> UnknownAdapter:
    """The error about an alias that points to nothing; says which there are."""
    known = list(pointing(db, reference.name))
    if not db.execute("SELECT 1 FROM versions WHERE name = ?", (reference.name,)).fetchone():
        return UnknownAdapter(no_name(db, reference.name))
    there = f"its aliases are {', '.join(known)}" if known else f"{reference.name!r} has no alias"
    return UnknownAdapter(
        f"there is no alias {reference}; {there}; or name a version, as {reference.name}@v1"
    )


def meant(db: sqlite3.Connection, reference: Reference) -> sqlite3.Row:
    """The row of the version that a reference means.

    Raises:
        UnknownAdapter: none.
    """
    number = reference.number or standing(db, reference)["number"]
    return numbered(db, reference.name, number)


def pointing(db: sqlite3.Connection, name: str | None = None) -> dict[str, int]:
    """The version that each alias points to, of one adapter or of all."""
    query = "SELECT name, alias, number FROM aliases WHERE ? IN (name, '') ORDER BY name, alias"
    return {f"{row['name']}@{row['alias']}": row["number"] for row in db.execute(query, (name or "",))}


def needing(db: sqlite3.Connection, name: str, number: int) -> list[str]:
    """Why a version cannot be deleted: aliases that point to it, or whose rollback would."""
    rows = db.execute(
        "SELECT * FROM aliases WHERE name = ? AND ? IN (number, before) ORDER BY alias", (name, number)
    )
    said = {True: "points to it", False: "would roll back to it"}
    return [f"{name}@{row['alias']} {said[row['number'] == number]}" for row in rows]


def is_used(db: sqlite3.Connection, content: str) -> bool:
    """Is a content one of a version that is not deleted?"""
    query = "SELECT 1 FROM versions WHERE content = ? AND deleted IS NULL"
    return db.execute(query, (content,)).fetchone() is not None


def pointed_at(db: sqlite3.Connection, when: datetime, reference: Reference | None = None) -> dict[str, int]:
    """The version that each alias pointed to at a time, of one alias or of all."""
    chosen = ("", "") if reference is None else (reference.name, reference.alias)
    query = """SELECT name, alias, number FROM moves WHERE id IN (
        SELECT max(id) FROM moves WHERE at <= ? AND ? IN (name, '') AND ? IN (alias, '') GROUP BY name, alias
    ) AND number IS NOT NULL ORDER BY name, alias"""
    rows = db.execute(query, (times.written(when), *chosen))
    return {f"{row['name']}@{row['alias']}": row["number"] for row in rows}


def best(
    db: sqlite3.Connection, metric: str, dataset: str, since: datetime | None, name: str | None, highest: bool
) -> sqlite3.Row:
    """The row of the version with the best value of a metric, of several the first one.

    Raises:
        LookupError: none has such a result; says which results there are.
    """
    query = f"""SELECT versions.* FROM results JOIN versions USING (name, number)
        WHERE metric = ? AND dataset = ? AND deleted IS NULL AND published >= ? AND ? IN (name, '')
        ORDER BY value {"DESC" if highest else "ASC"}, published, name, number LIMIT 1"""
    row = db.execute(query, (metric, dataset, times.written(since) if since else "", name or "")).fetchone()
    if row is None:
        known = db.execute("SELECT DISTINCT dataset, metric FROM results ORDER BY 1, 2 LIMIT 20").fetchall()
        there = ", ".join(f"{metric} on {dataset}" for dataset, metric in known) or "none"
        raise LookupError(
            f"no version has a result {metric!r} on {dataset!r} in that time; the results recorded at all: {there}"
        )
    return row

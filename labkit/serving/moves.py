"""Moves of aliases, inside a transaction that writes.

What an alias pointed to before lies below what it points to, as in a stack: setting it puts a version on top, and a
rollback takes the top away. Every step is a row of its own, so that the history is never rewritten.
"""

import sqlite3
from datetime import datetime
from typing import NamedTuple

from labkit.serving import entries, lookup, times
from labkit.serving.naming import Reference
from labkit.serving.versions import Move, move_of


class AliasMoved(RuntimeError):
    """An alias does not point where the caller thought; nothing was moved."""


class Signed(NamedTuple):
    """When an alias is moved, by whom, and why."""

    at: datetime
    author: str
    note: str


def put(db: sqlite3.Connection, alias: Reference, number: int, signed: Signed, expected: int | None) -> Move:
    """Let `alias` point to a version; see `labkit.serving.registry.Registry.set_alias`."""
    lookup.numbered(db, alias.name, number)
    last = lookup.top(db, alias)
    check_expected(alias, last, expected)
    if last is not None and last["number"] == number:
        return move_of(last)
    below = last["id"] if last is not None and last["number"] is not None else None
    return record(db, alias, "set", number, below, signed)


def back(db: sqlite3.Connection, alias: Reference, signed: Signed, expected: int | None) -> Move:
    """Let `alias` point to the version below; see `labkit.serving.registry.Registry.rollback`."""
    last = lookup.standing(db, alias)
    check_expected(alias, last, expected)
    under = db.execute("SELECT * FROM moves WHERE id = ?", (last["below"],)).fetchone()
    if under is None:
        raise ValueError(f"{alias} has pointed to nothing before v{last['number']}; set it to a version")
    lookup.numbered(db, alias.name, under["number"])
    return record(db, alias, "rollback", under["number"], under["below"], signed)


def remove(db: sqlite3.Connection, alias: Reference, signed: Signed) -> Move:
    """Let `alias` point to nothing; see `labkit.serving.registry.Registry.remove_alias`."""
    lookup.standing(db, alias)
    return record(db, alias, "remove", None, None, signed)


def check_expected(alias: Reference, last: sqlite3.Row | None, expected: int | None) -> None:
    """Raise an `AliasMoved` unless the last move was to `expected`, if that is given."""
    number = None if last is None else last["number"]
    if expected is not None and number != expected:
        there = "nothing" if number is None else f"v{number}"
        raise AliasMoved(
            f"{alias} points to {there}, and not to v{expected}: it was moved meanwhile; nothing has changed"
        )


def record(
    db: sqlite3.Connection, alias: Reference, kind: str, number: int | None, below: int | None, signed: Signed
) -> Move:
    """Write a move down."""
    author, note = entries.text("author", signed.author), entries.text("note", signed.note)
    db.execute(
        "INSERT INTO moves (name, alias, at, kind, number, below, author, note) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (alias.name, alias.alias, times.written(signed.at), kind, number, below, author, note),
    )
    return move_of(lookup.top(db, alias))


def history(db: sqlite3.Connection, alias: Reference) -> list[Move]:
    """All moves of an alias, the first one first.

    Raises:
        labkit.serving.naming.UnknownAdapter: it never was.
    """
    query = "SELECT * FROM moves WHERE name = ? AND alias = ? ORDER BY id"
    made = [move_of(row) for row in db.execute(query, (alias.name, alias.alias))]
    if not made:
        raise lookup.no_alias(db, alias)
    return made

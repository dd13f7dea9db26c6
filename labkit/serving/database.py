"""The registry's file: opened for one operation, read or written in one transaction, its errors in words.

SQLite's rollback journal is kept, and not its write-ahead log: the registry is then one file that can be copied when
nobody writes, and read from a disk that is read-only. Writers take the lock at the beginning (BEGIN IMMEDIATE), so that
what they read is still so when they write. A connection lives for one operation, about 0.2 ms: threads and forked
processes share none, and nothing has to be closed.
"""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from labkit.files.writing import CannotWrite, InUse
from labkit.serving import schema

MODE = "rw"  # which reads where it must not write


class RegistryDamaged(ValueError):
    """The database is damaged; the message says which file, and what to do."""


@contextmanager
def reading(path: Path, wait: float) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the database throughout the block.

    Args:
        path: of the database.
        wait: seconds to wait for a writer.

    Raises:
        FileNotFoundError: there is none.
        InUse: it was locked for longer.
        RegistryDamaged: it cannot be read.
        labkit.serving.schema.OtherSchema: a newer one, or no registry.
        CannotWrite: it is an older one, which cannot be brought up to date, or was being written when its writer
            died, and cannot be put in order.
    """
    with transaction(path, wait, "BEGIN") as db:
        yield db


@contextmanager
def writing(path: Path, wait: float) -> Iterator[sqlite3.Connection]:
    """As `reading`, for the only one who writes; what the block does happens whole, or, if it raises, not at all.

    Raises:
        CannotWrite: no permission, or no space; nothing has changed.
    """
    with transaction(path, wait, "BEGIN IMMEDIATE") as db:
        yield db


@contextmanager
def transaction(path: Path, wait: float, begin: str) -> Iterator[sqlite3.Connection]:
    """What `reading` and `writing` have in common."""
    with explained(path), closing(connect(path, wait)) as db:
        if schema.steps_lacking(db, path):
            db.execute("BEGIN IMMEDIATE")
            schema.go_through(db)  # by another process meanwhile: then there is no step left
            db.execute("COMMIT")
        db.execute(begin)
        yield db
        db.execute("COMMIT")  # not reached if the block raises; closing rolls back


def create(path: Path, wait: float, statement: str, values: tuple) -> None:
    """Make a database with the schema of today and one row.

    Raises:
        FileExistsError: there is one.
        CannotWrite: no permission, or no space.
    """
    with explained(path), closing(connect(path, wait, "rwc")) as db:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise FileExistsError(f"there is a registry in {path.parent} already; it is left as it is")
        schema.go_through(db)
        db.execute(statement, values)
        db.execute("COMMIT")


def connect(path: Path, wait: float, mode: str = "") -> sqlite3.Connection:
    """A connection whose transactions are begun by hand."""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode or MODE}", wait, isolation_level=None, uri=True
    )
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say in one sentence what SQLite reports of the file `path`, where a user can do something about it."""
    try:
        yield
    except sqlite3.Error as error:
        words = in_words(path, error)
        if words is None:
            raise
        raise words from error


def in_words(path: Path, error: sqlite3.Error) -> Exception | None:
    """The error that says it better; None for one that users cannot cause."""
    kind = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]
    if kind in ("BUSY", "LOCKED"):
        return InUse(f"{path} is locked: another process is writing to it; try again. Nothing has changed")
    if kind == "CANTOPEN" and not path.exists():
        return FileNotFoundError(f"there is no registry in {path.parent}; make one with `init`")
    reasons = {
        "READONLY": ("writing there is not permitted", errno.EROFS),
        "PERM": ("writing there is not permitted", errno.EACCES),
        "CANTOPEN": ("its folder or its journal cannot be opened", errno.EACCES),
        "FULL": ("the disk is full", errno.ENOSPC),
        "IOERR": ("the disk reports an error", errno.EIO),
    }
    if kind in reasons:
        reason, number = reasons[kind]
        cannot = CannotWrite(f"cannot write {path}: {reason}; nothing has changed")
        cannot.errno = number
        return cannot
    if kind in ("CORRUPT", "NOTADB") or "decode" in str(error):
        return RegistryDamaged(
            f"{path} is damaged ({error}); the adapters beside it are not touched. Put back a copy of the file, "
            "or make a new registry elsewhere and publish from the folder `adapters`"
        )
    return None

"""What the registry's database holds, and how an older one becomes a newer one.

    base       one row: the base model that all adapters are for
    versions   one row a version, which never changes and is never taken away; `deleted` says that its files are
    results    of evaluations: version, data set, metric, value
    moves      of aliases, in the order in which they happened; the last one says where an alias points now

`below` of a move is the move that a rollback returns to, so that two rollbacks go back two steps and not to and fro.
Triggers refuse what must not happen even by a mistake in the code above: a change of a version or of the history.

`PRAGMA user_version` is the number of steps in `STEPS` that a database has been through. A newer database than this
code knows is refused; an older one goes through the steps that it lacks, in one transaction.
"""

import sqlite3

APPLICATION = 0x6C6F7261  # "lora" in ASCII: SQLite's mark of whose file it is

FIRST = (
    """CREATE TABLE base (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        name TEXT NOT NULL,
        forms TEXT NOT NULL,
        modules TEXT NOT NULL
    )""",
    """CREATE TABLE versions (
        name TEXT NOT NULL,
        number INTEGER NOT NULL CHECK (number >= 1),
        content TEXT NOT NULL CHECK (length(content) = 64),
        published TEXT NOT NULL,
        owner TEXT NOT NULL,
        note TEXT NOT NULL,
        code TEXT NOT NULL,
        data TEXT NOT NULL,
        config TEXT NOT NULL,
        base TEXT NOT NULL,
        facts TEXT NOT NULL,
        files TEXT NOT NULL,
        deleted TEXT,
        PRIMARY KEY (name, number)
    )""",
    "CREATE INDEX by_content ON versions (content)",
    """CREATE TABLE results (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        dataset TEXT NOT NULL,
        metric TEXT NOT NULL,
        value REAL NOT NULL CHECK (typeof(value) = 'real'),
        PRIMARY KEY (name, number, dataset, metric),
        FOREIGN KEY (name, number) REFERENCES versions
    )""",
    """CREATE TABLE moves (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        alias TEXT NOT NULL,
        at TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('set', 'rollback', 'remove')),
        number INTEGER CHECK ((number IS NULL) = (kind = 'remove')),
        below INTEGER REFERENCES moves (id),
        author TEXT NOT NULL,
        note TEXT NOT NULL,
        FOREIGN KEY (name, number) REFERENCES versions
    )""",
    "CREATE INDEX by_alias ON moves (name, alias, id)",
    """CREATE VIEW aliases AS
        SELECT top.name, top.alias, top.number, top.id, top.at, under.number AS before
        FROM moves AS top LEFT JOIN moves AS under ON under.id = top.below
        WHERE top.number IS NOT NULL
        AND top.id = (SELECT max(id) FROM moves WHERE name = top.name AND alias = top.alias)""",
    """CREATE TRIGGER versions_do_not_change BEFORE UPDATE ON versions
        WHEN OLD.deleted IS NOT NULL OR NEW.deleted IS NULL
        OR (OLD.name, OLD.number, OLD.content, OLD.published, OLD.owner, OLD.note, OLD.code, OLD.data, OLD.config,
            OLD.base, OLD.facts, OLD.files)
        IS NOT (NEW.name, NEW.number, NEW.content, NEW.published, NEW.owner, NEW.note, NEW.code, NEW.data, NEW.config,
            NEW.base, NEW.facts, NEW.files)
        BEGIN SELECT RAISE(ABORT, 'a version does not change'); END""",
    *(
        f"CREATE TRIGGER {table}_{name} BEFORE {event} ON {table} BEGIN SELECT RAISE(ABORT, '{table} are kept'); END"
        for table, name, event in (
            ("versions", "are_kept", "DELETE"),
            ("results", "are_kept", "DELETE"),
            ("results", "do_not_change", "UPDATE"),
            ("moves", "are_kept", "DELETE"),
            ("moves", "do_not_change", "UPDATE"),
        )
    ),
)

STEPS: tuple[tuple[str, ...], ...] = (FIRST,)


class OtherSchema(ValueError):
    """The database is none of this registry, or of a newer one."""


def steps_lacking(db: sqlite3.Connection, path: object) -> int:
    """How many steps the database has to go through to be one of today.

    Raises:
        OtherSchema: it is another program's, or a newer labkit's.
    """
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (done,) = db.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise OtherSchema(f"{path} is not a registry of labkit; give the folder that `init` made")
    if done > len(STEPS):
        raise OtherSchema(
            f"{path} was written by a newer labkit (schema {done}; this one knows {len(STEPS)}); update labkit. "
            "Nothing was changed"
        )
    return len(STEPS) - done


def go_through(db: sqlite3.Connection) -> None:
    """Bring a database to the schema of today, inside a transaction that is under way."""
    (done,) = db.execute("PRAGMA user_version").fetchone()
    for step in STEPS[done:]:
        for statement in step:
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {len(STEPS)}")

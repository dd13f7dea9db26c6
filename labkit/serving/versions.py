"""A version of an adapter, a move of an alias, and how a row of the database becomes one."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from labkit.serving import times
from labkit.serving.admission import Base
from labkit.serving.contents import link_of, place_of
from labkit.serving.database import RegistryDamaged


@dataclass(frozen=True)
class Version:
    """One version of an adapter, which never changes.

    Attributes:
        name, number: "support", 2.
        content: the hash of its files, in hexadecimal: the identity of what it computes.
        path: of the PEFT folder, named after `content`.
        place: the same folder under the version's name: `adapters/support/v2`.
        published: when.
        owner, note, code: whose it is, what is new, and the version of the code that trained it.
        data: what it was trained on: hashes of files, counts.
        config: of the adapter and its training.
        results: of evaluations: data set → metric → value.
        base: the fingerprint of its base; None if its folder does not say it.
        facts: what it is; see `labkit.serving.admission.Admitted`.
        files: the sha256 of each file.
        deleted: when its files were taken away; None while they are there.
    """

    name: str
    number: int
    content: str
    path: Path
    place: Path
    published: datetime
    owner: str
    note: str
    code: str
    data: Any
    config: Any
    results: Mapping[str, Mapping[str, float]]
    base: dict[str, str] | None
    facts: Mapping[str, Any]
    files: Mapping[str, str]
    deleted: datetime | None

    @property
    def label(self) -> str:
        """ "support@v2"."""
        return f"{self.name}@v{self.number}"

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold of it: all."""
        made = {key: getattr(self, key) for key in ("label", *self.__dataclass_fields__)}
        made |= {"path": str(self.path), "place": str(self.place), "published": times.written(self.published)}
        return made | {"deleted": self.deleted and times.written(self.deleted)}


@dataclass(frozen=True)
class Move:
    """One move of an alias.

    Attributes:
        alias: "support@production".
        at: when.
        kind: "set", "rollback" or "remove".
        number: the version that it points to since; None after "remove".
        author, note: who did it, and why.
    """

    alias: str
    at: datetime
    kind: str
    number: int | None
    author: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold of it: all."""
        return {**vars(self), "at": times.written(self.at)}


def version_of(root: Path, db: sqlite3.Connection, row: sqlite3.Row) -> Version:
    """The version of a row of `versions`, with its results.

    Raises:
        RegistryDamaged: the row is not as it was written.
    """
    name, number = row["name"], row["number"]
    results: dict[str, dict[str, float]] = {}
    query = (
        "SELECT dataset, metric, value FROM results WHERE name = ? AND number = ? ORDER BY dataset, metric"
    )
    for dataset, metric, value in db.execute(query, (name, number)):
        results.setdefault(dataset, {})[metric] = value
    try:
        read = {key: json.loads(row[key]) for key in ("data", "config", "base", "facts", "files")}
        return Version(
            **{key: row[key] for key in ("name", "number", "content", "owner", "note", "code")},
            **read,
            path=place_of(root, row["content"]),
            place=link_of(root, name, number),
            published=times.read(row["published"]),
            results=results,
            deleted=times.read(row["deleted"]) if row["deleted"] else None,
        )
    except (ValueError, TypeError) as error:
        raise RegistryDamaged(
            f"the record of {name}@v{number} in {root} is damaged ({error}); put back a copy of the database"
        ) from None


def move_of(row: sqlite3.Row) -> Move:
    """The move of a row of `moves`."""
    alias = f"{row['name']}@{row['alias']}"
    return Move(alias, times.read(row["at"]), row["kind"], row["number"], row["author"], row["note"])


def base_of(row: sqlite3.Row) -> Base:
    """The base of the row of `base`."""
    modules = {name: (inputs, outputs) for name, (inputs, outputs) in json.loads(row["modules"]).items()}
    return Base(row["name"], tuple(json.loads(row["forms"])), modules)

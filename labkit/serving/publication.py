"""What is to become a version: examined, hashed, and as a row of the database."""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from labkit.serving import contents, entries, times
from labkit.serving.admission import Base, examine
from labkit.serving.naming import check_name


@dataclass(frozen=True)
class Publication:
    """A folder that may become a version.

    Attributes:
        folder: where its files are.
        files: the sha256 of each that is kept.
        row: the texts of its row of `versions`.
        results: (data set, metric, value).
    """

    folder: Path
    files: Mapping[str, str]
    row: Mapping[str, str]
    results: list[tuple[str, str, float]]

    @property
    def content(self) -> str:
        """The hash of its content."""
        return self.row["content"]


def prepare(
    base: Base,
    name: str,
    folder: Path,
    owner: str,
    note: str,
    code: str,
    data: object,
    config: object,
    results: Mapping[str, Mapping[str, float]] | None,
    trust_base: bool,
) -> Publication:
    """Check all that `labkit.serving.registry.Registry.publish` is given; it says what is raised."""
    check_name(name)
    said = {
        "owner": entries.text("owner", owner, required=True),
        "note": entries.text("note", note),
        "code": entries.text("code", code),
    }
    rows = entries.read_results(results)
    files = contents.hash_files(folder)
    admitted = examine(folder, base, trust_base)
    made_by = admitted.facts["versions"].get("labkit")
    recorded = {
        "data": admitted.data if data is None else data,
        "config": admitted.config if config is None else config,
        "base": admitted.base,
        "facts": admitted.facts,
        "files": files,
    }
    row = {"name": name, "content": contents.content_of(files), **said}
    row["code"] = row["code"] or (f"labkit {made_by}" if made_by else "")
    row |= {key: entries.json_text(key, value) for key, value in recorded.items()}
    return Publication(folder, files, row, rows)


def insert(db: sqlite3.Connection, publication: Publication, now: datetime) -> int:
    """Record the next version of an adapter; its number, which none before had, deleted ones included."""
    name = publication.row["name"]
    (number,) = db.execute(
        "SELECT coalesce(max(number), 0) + 1 FROM versions WHERE name = ?", (name,)
    ).fetchone()
    values = {**publication.row, "number": number, "published": times.written(now)}
    marks = ", ".join(f":{key}" for key in values)
    db.execute(f"INSERT INTO versions ({', '.join(values)}) VALUES ({marks})", values)
    rows = [(name, number, *result) for result in publication.results]
    db.executemany("INSERT INTO results (name, number, dataset, metric, value) VALUES (?, ?, ?, ?, ?)", rows)
    return number

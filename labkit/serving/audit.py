"""Is a registry as it should be? What is damaged, missing, or lies about; and what of that can be put right.

Reading everything is the only way to know: `verify` hashes every file. Nothing that was published is ever taken away
here, but for contents without a record, and only if that is asked for.
"""

import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from labkit.files.writing import clear_leftovers
from labkit.serving import contents
from labkit.serving.registry import Registry
from labkit.serving.versions import Version, version_of

HASH = re.compile(r"[0-9a-f]{64}")


class Problem(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        kind: "damaged": a version's files are not those that were published, or are gone; "unlinked": its place under
            `adapters` does not lead to them; "orphan": files that no version has; "leftover": of a writer that was
            killed; "stray": what is not the registry's; "database".
        where: the file, or the version.
        what: in words, with what to do.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where} {self.what}"


def verify(registry: Registry) -> list[Problem]:
    """All that is wrong with a registry; empty if nothing is. What others publish or delete meanwhile may be among it.

    Raises:
        as opening it: locked, or so damaged that it cannot be read.
    """
    with registry.reading() as db:
        problems = list(of_database(db, registry.path))
        rows = db.execute("SELECT * FROM versions WHERE deleted IS NULL ORDER BY name, number").fetchall()
        versions = [version_of(registry.root, db, row) for row in rows]
        pointing = db.execute(
            "SELECT * FROM aliases JOIN versions USING (name, number) WHERE deleted IS NOT NULL"
        )
        problems += [
            Problem(
                "database", f"{row['name']}@{row['alias']}", f"points to v{row['number']}, which was deleted"
            )
            for row in pointing
        ]
    problems += of_contents(registry.root, versions)
    problems += of_places(registry.root, versions)
    return problems + list(of_leftovers(registry.root))


def of_database(db: sqlite3.Connection, path: Path) -> Iterator[Problem]:
    """What SQLite itself finds."""
    for (found,) in db.execute("PRAGMA integrity_check"):
        if found != "ok":
            yield Problem("database", str(path), f"is damaged ({found}); put back a copy of it")
    for row in db.execute("PRAGMA foreign_key_check"):
        yield Problem("database", str(path), f"has a row in {row[0]} of a version that it does not have")


def of_contents(root: Path, versions: list[Version]) -> Iterator[Problem]:
    """Versions whose files are not theirs, and files that no version has."""
    wrong: dict[str, str] = {}
    for version in versions:
        if version.content not in wrong:
            wrong[version.content] = contents.wrong_with(version.path, version.files)
        if wrong[version.content]:
            what = f"{wrong[version.content]} in {version.path}; publish the folder it was made from again, which mends it"
            yield Problem("damaged", version.label, what)
    for name in orphans(root, versions):
        yield Problem(
            "orphan", str(root / contents.CONTENTS / name), "is of no version; --remove-orphans takes it away"
        )
    for name in names_in(root / contents.CONTENTS):
        if not HASH.fullmatch(name):
            yield stray(root / contents.CONTENTS / name)


def orphans(root: Path, versions: list[Version]) -> list[str]:
    """The contents that no version has."""
    used = {version.content for version in versions}
    return [name for name in names_in(root / contents.CONTENTS) if HASH.fullmatch(name) and name not in used]


def of_places(root: Path, versions: list[Version]) -> Iterator[Problem]:
    """Places under `adapters` that lead elsewhere, are missing, or are nobody's."""
    expected: dict[str, set[str]] = {}
    for version in versions:
        link, card = version.place, contents.card_of(root, version.name, version.number)
        expected.setdefault(version.name, set()).update((link.name, card.name))
        if not os.path.lexists(link):
            yield Problem("unlinked", version.label, f"is not in {link}; --repair puts it there")
        elif not contents.leads_to(root, version.name, version.number, version.content, version.files):
            yield Problem(
                "unlinked", version.label, f"is not what {link} leads to; move that away, then --repair"
            )
        if not card.exists():
            yield Problem("unlinked", version.label, f"has no card in {card}; --repair writes it")
    for name in names_in(root / contents.ADAPTERS):
        if name not in expected or not (root / contents.ADAPTERS / name).is_dir():
            yield stray(root / contents.ADAPTERS / name)
            continue
        for entry in names_in(root / contents.ADAPTERS / name):
            if entry not in expected[name]:
                yield stray(root / contents.ADAPTERS / name / entry)


def stray(path: Path) -> Problem:
    return Problem("stray", str(path), "is of no version that there is; move it away")


def names_in(folder: Path) -> list[str]:
    """What is in a folder, but for scratch folders; nothing if there is none."""
    return sorted(n for n in os.listdir(folder) if not n.endswith(".part")) if folder.is_dir() else []


def of_leftovers(root: Path) -> Iterator[Problem]:
    """Scratch folders; those of writers that live are among them."""
    for part, _ in contents.scratch_folders(root):
        yield Problem(
            "leftover", str(part), "is of a writer that was killed, or still writes; --repair takes it away"
        )


def repair(registry: Registry, remove_orphans: bool = False) -> list[Problem]:
    """Put right what can be: links and cards, what deleted versions and killed writers left, and, if asked for, contents
    that no version has. What is left is returned.

    Raises:
        as `verify`; labkit.files.CannotWrite: no permission, or no space.
    """
    for _, place in contents.scratch_folders(registry.root):
        clear_leftovers(place)
    with registry.reading() as db:
        names = [name for (name,) in db.execute("SELECT DISTINCT name FROM versions ORDER BY name")]
    for name in names:
        registry.align(name)
    if remove_orphans:
        for content in orphans(registry.root, registry.versions()):
            registry.discard_unused(content)
    return verify(registry)

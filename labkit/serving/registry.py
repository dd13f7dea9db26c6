"""A registry of adapters for one base: versions that never change, and aliases that point to them.

A server asks for `support@production`, and whoever releases moves that alias: forward, or back with `rollback`. What a
version is, where it comes from and how it was judged is recorded when it is published; what an alias pointed to at any
time stays known. Versions that nothing points to can be deleted: their files go, their record stays.

    registry.sqlite        the record; one transaction an operation (`labkit.serving.database`, `labkit.serving.schema`)
    contents/, adapters/   the files (`labkit.serving.contents`)

Any number of threads and processes may use a registry. A kill at any moment leaves what was before, or what is after.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from labkit.checks import check_number, check_whole, needed
from labkit.files.writing import InUse
from labkit.serving import contents, database, lookup, moves, times
from labkit.serving.admission import Base
from labkit.serving.naming import check_name, read_alias, read_reference, read_version
from labkit.serving.publication import Publication, insert, prepare
from labkit.serving.version_card import write_card
from labkit.serving.versions import Move, Version, base_of, version_of


class Registry:
    """The registry in the folder `root`.

    Args:
        root: a folder that `Registry.create` made.
        wait: seconds to wait for another process that writes.
        clock: what says the time; see `labkit.serving.times.utc_now`.

    Attributes:
        base: the base model that its adapters are for.

    Raises:
        FileNotFoundError: there is no registry.
        labkit.serving.schema.OtherSchema: it is a newer labkit's, or no registry.
        labkit.serving.database.RegistryDamaged: it cannot be read.
        labkit.files.InUse: it was locked for longer than `wait`; every method may raise this, and the one before.
    """

    def __init__(self, root: str | Path, wait: float = 10.0, clock: Callable[[], datetime] = times.utc_now):
        check_number("wait", wait, at_least=0)
        self.root, self.wait, self.clock = Path(root).absolute(), wait, clock
        self.path = self.root / contents.DATABASE
        with self.reading() as db:
            self.base: Base = base_of(db.execute("SELECT * FROM base").fetchone())

    @classmethod
    def create(cls, root: str | Path, base: Base, **others: Any) -> "Registry":
        """Make a registry for `base` in the folder `root`, which may be new; `others` as for opening it.

        Raises:
            FileExistsError: there is one, or the files of one.
            labkit.files.CannotWrite: no permission, or no space.
        """
        root = Path(root).absolute()
        contents.check_free(root)
        root.mkdir(parents=True, exist_ok=True)
        row = (base.name, json.dumps(base.forms), json.dumps(dict(base.modules)))
        statement = "INSERT INTO base (only, name, forms, modules) VALUES (1, ?, ?, ?)"
        database.create(root / contents.DATABASE, others.get("wait", 10.0), statement, row)
        return cls(root, **others)

    def reading(self):
        """A transaction that reads; see `labkit.serving.database.reading`."""
        return database.reading(self.path, self.wait)

    def writing(self):
        """A transaction that writes; see `labkit.serving.database.writing`."""
        return database.writing(self.path, self.wait)

    def publish(
        self,
        name: str,
        folder: str | Path,
        owner: str,
        note: str = "",
        code: str = "",
        data: object = None,
        config: object = None,
        results: Mapping[str, Mapping[str, float]] | None = None,
        trust_base: bool = False,
    ) -> Version:
        """Make the PEFT folder `folder` the next version of the adapter `name`. No alias is moved.

        Args:
            name: of the adapter; a new one makes it.
            folder: as `labkit.save_adapter` or PEFT writes it. It is copied, and stays as it is.
            owner: who answers for it.
            note: what is new.
            code: the version of the code that trained it, such as a commit.
            data: what it was trained on, such as hashes of files.
            config: of the training. Of these three the default is what `labkit.json` says.
            results: of evaluations: data set → metric → value.
            trust_base: you state that it was trained on the base of the registry, where the folder cannot show it.

        Returns:
            the version.

        Raises:
            FileNotFoundError: no adapter in `folder`.
            labkit.AdapterMismatch: it is for another base, or for one that it does not say.
            ValueError: a name that is not allowed; a damaged adapter, one with NaN, or of a kind that labkit does not
                load; `data`, `config` or `results` that cannot be recorded.
            labkit.serving.contents.Changed: somebody writes to `folder`.
            labkit.files.CannotWrite: no permission, or no space.
        """
        needed("huggingface_hub", "the model card of a version")  # imported here, and not while others wait
        made = prepare(self.base, name, Path(folder), owner, note, code, data, config, results, trust_base)
        try:
            version = self.record(made)
        except InUse:
            raise  # what was copied waits for the next attempt
        except BaseException:
            with suppress(Exception):
                self.discard_unused(made.content)
            raise
        try:
            self.align(name)
        except (OSError, InUse) as error:
            warnings.warn(
                f"{version.label} is published, but not yet in {version.place}: {error}", stacklevel=2
            )
        return version

    def record(self, made: Publication) -> Version:
        """Copy the files, then record the version. A content that another process deletes in between is copied again."""
        place = contents.place_of(self.root, made.content)
        while True:
            contents.store(self.root, made.folder, made.files)
            with self.writing() as db:
                if contents.is_there(place):
                    number = insert(db, made, self.clock())
                    return version_of(self.root, db, lookup.numbered(db, made.row["name"], number))

    def align(self, name: str) -> None:
        """Make `adapters/NAME/` what the database says: a link and a card for each version that is there."""
        with self.writing() as db:
            for row in db.execute(
                "SELECT * FROM versions WHERE name = ? ORDER BY number", (name,)
            ).fetchall():
                if row["deleted"] is not None:
                    contents.unlink(self.root, name, row["number"])
                elif contents.is_there(contents.place_of(self.root, row["content"])):
                    contents.link(self.root, name, row["number"], row["content"])
                    write_card(self.root, version_of(self.root, db, row), self.base.name)

    def discard_unused(self, content: str) -> None:
        """Take the files of a content away, unless a version has them."""
        with self.writing() as db:
            if not lookup.is_used(db, content):
                contents.discard(self.root, content)

    def resolve(self, reference: str) -> Version:
        """The version that "support@v2", "support@production", or "support" (its alias production) means now.

        Raises:
            labkit.serving.naming.UnknownAdapter: there is none, or it was deleted.
            ValueError: it cannot be a reference.
        """
        meant = read_reference(reference)
        with self.reading() as db:
            return version_of(self.root, db, lookup.meant(db, meant))

    def versions(self, name: str | None = None, deleted: bool = False) -> list[Version]:
        """All versions, of one adapter or of all; `deleted`: with those whose files are gone."""
        query = (
            "SELECT * FROM versions WHERE ? IN (name, '') AND (? OR deleted IS NULL) ORDER BY name, number"
        )
        with self.reading() as db:
            rows = db.execute(query, (check_name(name) if name else "", deleted)).fetchall()
            return [version_of(self.root, db, row) for row in rows]

    def aliases(self, name: str | None = None) -> dict[str, int]:
        """The number of the version that each alias points to: {"support@production": 2}."""
        with self.reading() as db:
            return lookup.pointing(db, check_name(name) if name else None)

    def set_alias(
        self, alias: str, number: int, author: str = "", note: str = "", expected: int | None = None
    ) -> Move:
        """Let an alias, "support@production", point to a version from now on.

        Args:
            alias: with the name of its adapter; a new one is made.
            number: of the version.
            author, note: who moves it, and why.
            expected: the version that it must point to until now, where two may move it at the same time.

        Returns:
            the move; the last one, if it points there already.

        Raises:
            labkit.serving.naming.UnknownAdapter: there is no such version.
            labkit.serving.moves.AliasMoved: it does not point to `expected`.
        """
        check_whole("number", number)
        with self.writing() as db:
            return moves.put(
                db, read_alias(alias), number, moves.Signed(self.clock(), author, note), expected
            )

    def rollback(self, alias: str, author: str = "", note: str = "", expected: int | None = None) -> Move:
        """Let an alias point to the version before; once more, to the one before that.

        Args:
            alias, author, note, expected: as for `set_alias`.

        Raises:
            labkit.serving.naming.UnknownAdapter: there is no such alias, or the version before was deleted.
            ValueError: it has pointed to one version only.
            labkit.serving.moves.AliasMoved: it does not point to `expected`.
        """
        with self.writing() as db:
            return moves.back(db, read_alias(alias), moves.Signed(self.clock(), author, note), expected)

    def remove_alias(self, alias: str, author: str = "", note: str = "") -> Move:
        """Let an alias point to nothing from now on; its history stays.

        Raises:
            labkit.serving.naming.UnknownAdapter: it points to nothing.
        """
        with self.writing() as db:
            return moves.remove(db, read_alias(alias), moves.Signed(self.clock(), author, note))

    def history(self, alias: str) -> list[Move]:
        """All moves of an alias, the first one first.

        Raises:
            labkit.serving.naming.UnknownAdapter: it never was.
        """
        with self.reading() as db:
            return moves.history(db, read_alias(alias))

    def at(self, when: datetime, alias: str | None = None) -> dict[str, int]:
        """What an alias, or each, pointed to at a time; those that pointed to nothing are left out."""
        with self.reading() as db:
            return lookup.pointed_at(db, when, read_alias(alias) if alias else None)

    def best(
        self,
        metric: str,
        dataset: str,
        since: datetime | None = None,
        name: str | None = None,
        highest: bool = True,
    ) -> Version:
        """The version with the best result, of several the first one; deleted ones do not count.

        Args:
            metric, dataset: as they were published: "exact_match", "tickets".
            since: only those published at that time or later.
            name: only those of this adapter.
            highest: the highest value is the best; False for a loss.

        Raises:
            LookupError: no version has such a result; says which results there are.
        """
        with self.reading() as db:
            row = lookup.best(db, metric, dataset, since, check_name(name) if name else None, highest)
            return version_of(self.root, db, row)

    def delete(self, version: str) -> Version:
        """Take the files of a version away, for good. Its record stays, and its number is not used again.

        Args:
            version: by its number: "support@v2".

        Raises:
            labkit.serving.naming.UnknownAdapter: there is none, or it was deleted before.
            ValueError: an alias points to it, or would after a rollback; says which.
        """
        meant = read_version(version)
        with self.writing() as db:
            row = lookup.numbered(db, meant.name, meant.number)
            if needing := lookup.needing(db, meant.name, meant.number):
                raise ValueError(
                    f"{meant} cannot be deleted: {'; '.join(needing)}. Move or remove the alias first"
                )
            where = (times.written(self.clock()), meant.name, meant.number)
            db.execute("UPDATE versions SET deleted = ? WHERE name = ? AND number = ?", where)
            query = "SELECT * FROM versions WHERE name = ? AND number = ?"
            deleted = version_of(self.root, db, db.execute(query, where[1:]).fetchone())
        self.align(meant.name)
        self.discard_unused(row["content"])
        return deleted

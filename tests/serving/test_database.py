"""Databases that are locked, full, read-only, damaged, of another program, older or newer."""

import os
import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest

from labkit.files.writing import CannotWrite, InUse
from labkit.serving import Registry, database, schema, verify
from labkit.serving.database import RegistryDamaged
from labkit.serving.schema import OtherSchema
from tests.campaign.harness import small_disk
from tests.serving.cases import make_registry


@contextmanager
def untouched(registry):
    """Within the block the registry's file does not change."""
    before = registry.path.read_bytes()
    yield
    assert registry.path.read_bytes() == before


def writers(registry, folder):
    """Every operation that writes."""
    return {
        "publish": lambda: registry.publish("support", folder, "ann"),
        "set_alias": lambda: registry.set_alias("support@production", 1),
        "rollback": lambda: registry.rollback("support@production"),
        "remove_alias": lambda: registry.remove_alias("support@production"),
        "delete": lambda: registry.delete("sales@v1"),
    }


WRITERS = ("publish", "set_alias", "rollback", "remove_alias", "delete")


@pytest.mark.parametrize("operation", WRITERS)
def test_a_locked_registry_says_so_and_nothing_changes(filled, folders, operation):
    filled.wait = 0.05
    with closing(sqlite3.connect(filled.path, isolation_level=None)) as other, untouched(filled):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            InUse, match=r"registry.sqlite is locked: another process is writing to it; try again"
        ):
            writers(filled, folders[0])[operation]()
        assert filled.resolve("support").number == 2, (
            "who only reads is not kept waiting by who has not yet written"
        )
        other.execute("ROLLBACK")
    writers(filled, folders[0])[operation]()


def test_a_reader_waits_for_a_writer_who_is_just_writing(filled):
    filled.wait = 0.05
    with closing(sqlite3.connect(filled.path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InUse, match="is locked"):
            filled.resolve("support")
        filled.wait = 60
        timer = threading.Timer(0.1, other.execute, ["ROLLBACK"])
        timer.start()
        assert filled.resolve("support").number == 2
        timer.join()


@pytest.mark.parametrize("operation", WRITERS)
def test_a_registry_that_is_read_only_can_be_read_and_says_what_it_cannot(
    filled, folders, operation, monkeypatch
):
    monkeypatch.setattr(database, "MODE", "ro")
    with (
        untouched(filled),
        pytest.raises(CannotWrite, match="cannot write .*registry.sqlite: writing there is not perm"),
    ):
        writers(filled, folders[0])[operation]()
    assert filled.resolve("support").number == 2 and filled.aliases() == {"support@production": 2}


@pytest.mark.parametrize("operation", ["publish", "set_alias"])
def test_a_full_disk_says_so_and_nothing_changes(filled, folders, operation, monkeypatch):
    def small(*arguments, connect=database.connect):
        db = connect(*arguments)
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    monkeypatch.setattr(database, "connect", small)
    with pytest.raises(CannotWrite, match="the disk is full; nothing has changed"):
        for n in range(1000):
            before = filled.path.read_bytes(), sorted(os.listdir(filled.root / "contents"))
            if operation == "publish":
                filled.publish("support", folders[0], "ann", "x" * 9000)
            else:
                filled.set_alias("support@production", 1 + n % 2, note="x" * 9000)
    assert (filled.path.read_bytes(), sorted(os.listdir(filled.root / "contents"))) == before
    assert verify(filled) == []


def test_a_disk_that_is_full_while_files_are_copied_keeps_what_there_is(folders, tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=600) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        registry = make_registry(disk / "r")
        registry.publish("support", folders[0], "ann")
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(CannotWrite, match="the disk is full"):
            registry.publish("support", folders[1], "ann")
        assert verify(registry) == [] and len(registry.versions()) == 1
        filler.unlink()
        assert registry.publish("support", folders[1], "ann").number == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"not a database" * 1000,
        lambda raw: raw[:3000],
        lambda raw: raw[:4096] + b"\xff" * (len(raw) - 4096),
    ],
    ids=["other", "cut", "overwritten"],
)
def test_a_damaged_database_says_so_and_the_adapters_stay(filled, damage):
    filled.path.write_bytes(damage(filled.path.read_bytes()))
    with (
        untouched(filled),
        pytest.raises(RegistryDamaged, match="is damaged .*the adapters beside it are not touched"),
    ):
        Registry(filled.root).resolve("support")
    assert (filled.root / "adapters" / "support" / "v2" / "adapter_config.json").exists()


@pytest.mark.parametrize("value", ["{", "[1", "\ufffd"])
def test_a_damaged_record_is_named(filled, value):
    with closing(sqlite3.connect(filled.path)) as db, db:
        db.execute("DROP TRIGGER versions_do_not_change")
        db.execute("UPDATE versions SET facts = ? WHERE name = 'support' AND number = 2", (value,))
    with pytest.raises(RegistryDamaged, match="the record of support@v2 .* is damaged"):
        filled.resolve("support")
    assert filled.resolve("support@v1").number == 1


def test_where_there_is_no_registry_that_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no registry in .*; make one with `init`"):
        Registry(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("empty", [True, False])
def test_another_programs_database_is_refused(tmp_path, empty):
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as db:
        if not empty:
            db.execute("CREATE TABLE base (x)")
    (tmp_path / "registry.sqlite").touch()
    with pytest.raises(OtherSchema, match="is not a registry of labkit"):
        Registry(tmp_path)


def test_a_newer_database_is_refused_and_left_as_it_is(filled, folders):
    with closing(sqlite3.connect(filled.path)) as db:
        db.execute(f"PRAGMA user_version = {len(schema.STEPS) + 1}")
    for use in (lambda: Registry(filled.root), *writers(filled, folders[0]).values()):
        with (
            untouched(filled),
            pytest.raises(OtherSchema, match="was written by a newer labkit .schema 2; this one kno"),
        ):
            use()


def test_an_older_database_is_brought_up_to_date_when_it_is_next_used(filled, monkeypatch):
    newer = (*schema.STEPS, ("ALTER TABLE versions ADD COLUMN licence TEXT", "CREATE TABLE extra (x)"))
    monkeypatch.setattr(schema, "STEPS", newer)
    assert Registry(filled.root).resolve("support").number == 2
    with filled.reading() as db:
        assert (
            db.execute("SELECT licence FROM versions").fetchall()
            and not db.execute("SELECT * FROM extra").fetchall()
        )
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2


def test_a_step_that_fails_leaves_the_older_database(filled, monkeypatch):
    monkeypatch.setattr(
        schema, "STEPS", (*schema.STEPS, ("CREATE TABLE extra (x)", "CREATE TABLE extra (x)"))
    )
    with untouched(filled), pytest.raises(sqlite3.OperationalError, match="already exists"):
        Registry(filled.root)
    monkeypatch.undo()
    assert Registry(filled.root).resolve("support").number == 2


def test_a_copy_of_the_folder_is_a_registry(filled, tmp_path):
    shutil.copytree(filled.root, tmp_path / "copy", symlinks=True)
    copy = Registry(tmp_path / "copy")
    assert verify(copy) == [] and copy.resolve("support").path.is_relative_to(tmp_path / "copy")

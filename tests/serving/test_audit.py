"""What `verify` finds, and what `repair` puts right."""

import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from labkit.serving import contents, repair, verify
from labkit.serving.contents import hash_files
from tests.serving.cases import write_adapter


def kinds(problems):
    return [(problem.kind, problem.where.rpartition("/")[2]) for problem in problems]


def test_a_registry_that_is_whole_has_no_problems(filled):
    assert verify(filled) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "labkit.json").unlink(), "lacks labkit.json"),
        (lambda path: (path / "extra.json").write_text(""), "has extra.json too many"),
        (
            lambda path: (path / "adapter_config.json").write_text("{}"),
            "has another adapter_config.json than was publ",
        ),
        (lambda path: shutil.rmtree(path), "is missing"),
    ],
    ids=["lost", "too many", "changed", "gone"],
)
def test_damaged_versions_are_named_and_not_touched(filled, damage, said):
    path = filled.resolve("support").path
    for file in path.iterdir():
        file.chmod(0o644)
    damage(path)
    damaged = next(problem for problem in verify(filled) if problem.kind == "damaged")
    assert damaged.where == "support@v2" and damaged.what.startswith(said)
    assert damaged in repair(filled, remove_orphans=True)


def test_one_flipped_bit_is_found(filled):
    weights = filled.resolve("support").path / "adapter_model.safetensors"
    weights.chmod(0o644)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert kinds(verify(filled)) == [("damaged", "support@v2")]


def test_links_and_cards_that_are_gone_are_made_again(filled):
    place = filled.resolve("support").place
    place.unlink()
    place.with_suffix(".md").unlink()
    shutil.rmtree(filled.root / "adapters" / "sales")
    found = verify(filled)
    assert kinds(found) == [("unlinked", "sales@v1")] * 2 + [("unlinked", "support@v2")] * 2
    assert repair(filled) == [] and hash_files(place) == filled.resolve("support").files


def test_a_place_that_leads_elsewhere_is_named_and_left(filled, tmp_path):
    place = filled.resolve("support").place
    place.unlink()
    other = write_adapter(tmp_path / "other", 7)
    os.symlink(other, place)
    assert kinds(repair(filled)) == [("unlinked", "support@v2")]
    assert os.readlink(place) == str(other)


def test_files_without_a_version_go_only_if_that_is_asked_for(filled, tmp_path):
    folder = write_adapter(tmp_path / "a", 9)
    place = contents.store(filled.root, folder, hash_files(folder))
    assert kinds(repair(filled)) == [("orphan", place.name)] and place.exists()
    assert repair(filled, remove_orphans=True) == [] and not place.exists()
    assert len(os.listdir(filled.root / "contents")) == 3


def test_what_is_not_the_registrys_is_named_and_never_taken_away(filled):
    mine = [filled.root / place for place in ("contents/notes", "adapters/mine", "adapters/support/v9")]
    for path in mine:
        path.mkdir()
        (path / "notes.txt").write_text("a week of work")
    assert sorted(kinds(repair(filled, remove_orphans=True))) == [
        ("stray", name) for name in ("mine", "notes", "v9")
    ]
    assert all((path / "notes.txt").read_text() == "a week of work" for path in mine)


def test_what_a_killed_writer_left_is_taken_away(filled):
    content = filled.resolve("support").content
    for place in (f"contents/.{content}.0123abcd.part", "adapters/support/.v2.md.0123abcd.part"):
        (filled.root / place).mkdir()
        (filled.root / place / "half").write_text("")
    assert [kind for kind, _ in kinds(verify(filled))] == ["leftover"] * 2
    assert repair(filled) == []


def test_what_a_deletion_that_was_killed_left_is_taken_away(filled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(filled, "align", lambda name: None)
        patch.setattr(filled, "discard_unused", lambda content: None)
        filled.delete("sales@v1")
    assert {kind for kind, _ in kinds(verify(filled))} == {"orphan", "stray"}
    assert repair(filled, remove_orphans=True) == []


def test_rows_that_do_not_belong_together_are_found(filled):
    with closing(sqlite3.connect(filled.path)) as db, db:
        db.execute("DROP TRIGGER versions_are_kept")
        db.execute("DELETE FROM versions WHERE name = 'support' AND number = 2")
    found = verify(filled)
    assert {problem.kind for problem in found} == {"database", "orphan", "stray"}
    assert any("has a row in moves of a version that it does not have" in problem.what for problem in found)


def test_an_alias_of_a_deleted_version_is_found(filled):
    with filled.writing() as db:
        db.execute(
            "UPDATE versions SET deleted = '2026-11-01T00:00:00.000000Z' WHERE name = 'support' AND number = 2"
        )
    assert any("points to v2, which was deleted" in problem.what for problem in verify(filled))

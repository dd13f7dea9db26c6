"""What a registry keeps, finds and gives up."""

import json
import os
import sqlite3
from datetime import timedelta

import pytest

from labkit.serving import Registry, UnknownAdapter, contents, database, publication, verify
from labkit.serving.contents import content_of, hash_files
from tests.serving.cases import BASE, START, make_registry, write_adapter

MINUTE = timedelta(minutes=1)


def test_a_version_keeps_all_that_was_said_of_it(registry, folders):
    made = registry.publish(
        "support",
        folders[0],
        "ann",
        " the first ",
        "3f2a91c",
        {"t.jsonl": "ab"},
        {"lr": 1e-3},
        {"tickets": {"em": 0.5}},
    )
    again = Registry(registry.root).resolve("support@v1")
    assert made == again
    assert (again.label, again.owner, again.note, again.code) == ("support@v1", "ann", "the first", "3f2a91c")
    assert (again.data, again.config, again.results) == (
        {"t.jsonl": "ab"},
        {"lr": 1e-3},
        {"tickets": {"em": 0.5}},
    )
    assert again.published == START and again.deleted is None
    assert again.files == hash_files(folders[0]) and again.content == content_of(again.files)
    assert again.base == BASE.forms[0]
    assert json.loads(json.dumps(again.as_json()))["place"] == str(
        registry.root / "adapters" / "support" / "v1"
    )


def test_what_the_folder_says_is_recorded_where_the_publisher_says_nothing(registry, folders):
    made = registry.publish("support", folders[0], "ann")
    assert (
        made.data == {"train.jsonl": "0" * 64} and made.config == {"r": 2} and made.code.startswith("labkit ")
    )
    facts = {"variant": "lora", "r": 2, "rank": 2, "alpha": 4, "modules": 4, "parameters": 128, "bytes": 512}
    assert facts.items() <= made.facts.items() and made.facts["alone"] == []


def test_the_folder_that_was_published_is_copied_and_stays(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    before = hash_files(folder)
    made = registry.publish("support", folder, "ann")
    assert hash_files(folder) == before == hash_files(made.path) == hash_files(made.place)
    (folder / "adapter_config.json").write_text("{}")
    assert hash_files(made.path) == before


def test_a_checkpoints_other_files_are_not_kept(registry, tmp_path):
    folder = write_adapter(tmp_path / "a")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "README.md").write_text("a card")
    (folder / "logs").mkdir()
    made = registry.publish("support", folder, "ann")
    assert set(os.listdir(made.path)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "labkit.json",
        "README.md",
    }


def test_versions_of_the_same_files_share_them(registry, folders):
    made = [registry.publish(name, folders[0], "ann") for name in ("support", "support", "sales")]
    assert [version.label for version in made] == ["support@v1", "support@v2", "sales@v1"]
    assert len({version.path for version in made}) == 1 and len(os.listdir(registry.root / "contents")) == 1
    registry.delete("support@v1")
    assert hash_files(made[1].path) == made[1].files
    registry.delete("support@v2")
    registry.delete("sales@v1")
    assert os.listdir(registry.root / "contents") == [] and verify(registry) == []


def test_the_layout_can_be_read_without_the_registry(filled):
    adapters = filled.root / "adapters"
    assert sorted(str(p.relative_to(adapters)) for p in adapters.glob("*/*")) == [
        "sales/v1", "sales/v1.md", "support/v1", "support/v1.md", "support/v2", "support/v2.md",
    ]  # fmt: skip
    assert json.loads((adapters / "support" / "v2" / "adapter_config.json").read_text())["r"] == 2
    assert "# support@v2" in (adapters / "support" / "v2.md").read_text()


def test_where_links_are_not_permitted_the_layout_has_folders_with_the_same_files(
    registry, folders, monkeypatch
):
    def refuse(*arguments, **keywords):
        raise OSError("privilege not held")

    monkeypatch.setattr(os, "symlink", refuse)
    made = registry.publish("support", folders[0], "ann")
    assert not made.place.is_symlink() and hash_files(made.place) == made.files
    assert os.path.samefile(made.place / "labkit.json", made.path / "labkit.json")
    assert verify(registry) == []
    registry.delete("support@v1")
    assert not made.place.exists() and verify(registry) == []


def test_only_what_nothing_needs_is_deleted(filled):
    with pytest.raises(ValueError, match="support@v2 cannot be deleted: support@production points to it"):
        filled.delete("support@v2")
    with pytest.raises(
        ValueError, match="support@v1 cannot be deleted: support@production would roll back to it"
    ):
        filled.delete("support@v1")
    made = filled.delete("sales@v1")
    assert made.deleted is not None and not made.path.exists() and not made.place.parent.exists()
    with pytest.raises(UnknownAdapter, match="sales@v1 was deleted at 2026-11-01T.*; its record is kept"):
        filled.resolve("sales@v1")
    with pytest.raises(UnknownAdapter):
        filled.delete("sales@v1")
    with pytest.raises(UnknownAdapter):
        filled.set_alias("sales@production", 1)
    assert [v.label for v in filled.versions()] == ["support@v1", "support@v2"]
    assert [v.label for v in filled.versions(deleted=True)] == ["sales@v1", "support@v1", "support@v2"]
    assert verify(filled) == []


def test_a_number_is_never_used_again(filled, folders):
    filled.delete("sales@v1")
    assert filled.publish("sales", folders[0], "bob").label == "sales@v2"


def test_the_best_version_is_found(filled, folders):
    assert filled.best("exact_match", "tickets").label == "support@v2"
    assert filled.best("exact_match", "tickets", highest=False).label == "support@v1"
    assert filled.best("exact_match", "tickets", name="sales").label == "sales@v1"
    assert filled.best("exact_match", "tickets", since=START + 2 * MINUTE).label == "sales@v1"
    filled.publish("sales", folders[0], "bob", results={"tickets": {"exact_match": 0.8}})
    assert filled.best("exact_match", "tickets").label == "support@v2", "of equal ones the first"
    said = "no version has a result 'accuracy' on 'tickets' in that time; the results recorded at all: exact_match on tickets"
    with pytest.raises(LookupError, match=said):
        filled.best("accuracy", "tickets")
    with pytest.raises(LookupError):
        filled.best("exact_match", "tickets", since=START + timedelta(days=1))


def test_a_deleted_version_is_not_the_best(filled):
    filled.remove_alias("support@production")
    filled.delete("support@v2")
    assert filled.best("exact_match", "tickets").label == "sales@v1"


@pytest.mark.parametrize("table", ["versions", "results", "moves"])
def test_the_database_itself_refuses_to_rewrite_what_was(filled, table):
    with filled.writing() as db:
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET name = 'x'"):
            with pytest.raises(sqlite3.IntegrityError, match="kept|does not change"):
                db.execute(statement)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"owner": ""}, "owner is empty; say who answers"),
        ({"owner": "a\x1b[31m"}, "holds characters that cannot be shown"),
        ({"note": "x" * 10_001}, "must be text of at most 10,000 letters"),
        ({"note": 3}, "note=3 must be text"),
        ({"data": {1, 2}}, "data cannot be recorded as JSON"),
        ({"config": {"lr": float("nan")}}, "config cannot be recorded as JSON"),
        ({"config": "\ud800"}, "config cannot be recorded as JSON"),
        ({"data": "x" * 2**21}, "more than 1,048,576; give a hash"),
        ({"results": {"tickets": 0.5}}, "results=0.5 must be {data set: {metric: number}}"),
        ({"results": {"tickets": {"em": float("inf")}}}, "tickets em=inf must be a finite number"),
        ({"results": {"tickets": {"em": True}}}, "em=True must be a finite number"),
        ({"results": {"tickets": {"exact match": 1}}}, "the metric 'exact match' must be of A-Z"),
        ({"name": "../x"}, "name='../x' has"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_recorded_is_refused_and_nothing_is_published(registry, folders, given, said):
    with pytest.raises(ValueError, match=said):
        registry.publish(**{"name": "support", "folder": folders[0], "owner": "ann"} | given)
    assert registry.versions() == [] and os.listdir(registry.root) == ["registry.sqlite"]


def test_a_folder_that_changes_while_it_is_published_is_refused(registry, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a", 1)
    examine = publication.examine

    def meanwhile(*arguments):
        admitted = examine(*arguments)
        write_adapter(folder, 2)
        return admitted

    monkeypatch.setattr(publication, "examine", meanwhile)
    with pytest.raises(contents.Changed, match="changed while it was copied; publish it again"):
        registry.publish("support", folder, "ann")
    assert registry.versions() == [] and os.listdir(registry.root / "contents") == []


def test_files_that_are_deleted_before_they_are_recorded_are_copied_again(registry, folders, monkeypatch):
    store, times = contents.store, []

    def and_gone(root, folder, files):
        place = store(root, folder, files)
        if not times:
            contents.discard(root, content_of(files))
        times.append(place)
        return place

    monkeypatch.setattr(contents, "store", and_gone)
    made = registry.publish("support", folders[0], "ann")
    assert len(times) == 2 and hash_files(made.path) == made.files


def test_a_damaged_content_is_mended_by_publishing_the_same_files_again(registry, folders):
    made = registry.publish("support", folders[0], "ann")
    (made.path / "labkit.json").chmod(0o644)
    (made.path / "labkit.json").write_text("{}")
    assert [problem.kind for problem in verify(registry)] == ["damaged"]
    registry.publish("support", folders[0], "ann")
    assert verify(registry) == []


def test_a_second_registry_is_not_made_over_the_first(filled, tmp_path):
    with pytest.raises(FileExistsError, match="holds a registry, or the files of one"):
        make_registry(filled.root)
    filled.path.unlink()
    with pytest.raises(FileExistsError, match="put back a copy of registry.sqlite if that was lost"):
        make_registry(filled.root)
    empty = make_registry(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="holds a registry"):
        make_registry(empty.root)
    with pytest.raises(FileExistsError, match="there is a registry in .* already; it is left as it is"):
        database.create(empty.path, 1.0, "SELECT ?", (1,))  # as of two who make one at once, the second


def test_a_registry_that_was_begun_and_not_made_can_be_made(tmp_path):
    (tmp_path / "registry.sqlite").touch()
    assert make_registry(tmp_path).versions() == []

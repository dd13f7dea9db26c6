"""Registries whose writers are killed, and registries that several processes write to at once."""

import json
from pathlib import Path

import pytest

from labkit.serving import Registry, UnknownAdapter, repair, verify
from labkit.serving.audit import Problem
from labkit.serving.contents import content_of, hash_files
from tests.campaign.harness import duration, kill_after, moments, rounds, start
from tests.serving.cases import make_registry, write_adapter

FOLDERS = 4
OPERATIONS = 24
MENDED = ("orphan", "leftover", "unlinked", "stray")  # what a kill may leave, none of which any reader meets


def folders_in(root: Path) -> list[Path]:
    return [root / "folders" / str(n) for n in range(FOLDERS)]


def work(root: Path, round_: int) -> None:
    """Publish, move, roll back and delete. What is done is written down before it is begun, and after."""
    registry = Registry(root / "registry", wait=60)
    folders = folders_in(root)
    with (root / f"log{round_}.jsonl").open("a", buffering=1) as log:

        def note(stage: str, operation: str, **what) -> None:
            log.write(json.dumps({"stage": stage, "operation": operation, **what}) + "\n")

        for n in range(OPERATIONS // 4):
            which = (round_ + n) % FOLDERS
            note("begin", "publish", folder=which)
            version = registry.publish(
                "support", folders[which], "ann", str(round_), results={"t": {"em": n}}
            )
            note("done", "publish", folder=which, number=version.number)
            note("begin", "set", number=version.number)
            registry.set_alias("support@production", version.number)
            note("done", "set", number=version.number)
            if n % 2 and len(registry.history("support@production")) > 1:
                note("begin", "rollback")
                note("done", "set", number=registry.rollback("support@production").number)
            if version.number > 3:
                doomed = version.number - 3
                note("begin", "delete", number=doomed)
                try:
                    registry.delete(f"support@v{doomed}")
                except (ValueError, UnknownAdapter):
                    pass  # an alias needs it, or it went before
                else:
                    note("done", "delete", number=doomed)


def make(root: Path) -> Registry:
    for n, folder in enumerate(folders_in(root)):
        write_adapter(folder, n)
    return make_registry(root / "registry")


def check(root: Path, round_: int) -> list[Problem]:
    """Compare the registry with the log of the killed process: all that was done is there, and of what had begun all or
    nothing. What a kill left is put right; what it was is returned."""
    registry = Registry(root / "registry")
    log = [
        json.loads(line)
        for line in (root / f"log{round_}.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    done = [one for one in log if one["stage"] == "done"]
    begun = log[-1] if log and log[-1]["stage"] == "begin" else {"operation": "nothing"}
    contents = [content_of(hash_files(folder)) for folder in folders_in(root)]

    versions = {version.number: version for version in registry.versions("support", deleted=True)}
    mine = {n: version for n, version in versions.items() if version.note == str(round_)}
    published = {one["number"]: one["folder"] for one in done if one["operation"] == "publish"}
    assert set(published) <= set(mine) and len(set(mine) - set(published)) <= (
        begun["operation"] == "publish"
    )
    assert all(mine[n].content == contents[folder] for n, folder in published.items())
    assert all(set(version.results) == {"t"} for version in mine.values()), "a version without its results"
    assert sorted(versions) == list(range(1, len(versions) + 1))

    gone = {one["number"] for one in done if one["operation"] == "delete"}
    assert all(versions[n].deleted for n in gone)
    pointed = [one["number"] for one in done if one["operation"] == "set"]
    if pointed and begun["operation"] not in ("set", "rollback"):
        assert registry.resolve("support").number == pointed[-1]
    for version in versions.values():
        if not version.deleted:
            assert hash_files(version.path) == version.files

    found = verify(registry)
    assert {problem.kind for problem in found} <= set(MENDED), found
    assert repair(registry, remove_orphans=True) == []
    return found


@pytest.fixture(scope="module")
def seconds(tmp_path_factory) -> float:
    """How long the work takes, undisturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    make(root)
    return duration(work, root, 0)


def test_a_kill_of_the_writer_leaves_what_was_before_or_what_is_after(tmp_path: Path, seconds):
    make(tmp_path)
    number, killed, left = rounds(10, 100), 0, 0
    for round_, moment in enumerate(moments(number, seconds, seed=1)):
        killed += kill_after(moment, work, tmp_path, round_)
        if (tmp_path / f"log{round_}.jsonl").exists():
            left += bool(check(tmp_path, round_))
    print(f"{killed} of {number} processes were killed at work; {left} left something that was put right")
    assert killed > number / 2
    assert left or number < 100, "no kill fell between a record and its place"


def test_processes_that_write_at_once_lose_nothing_of_each_other(tmp_path: Path):
    make(tmp_path)
    crowd = [start(publish_many, tmp_path, name) for name in ("support", "support", "sales")]
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0, 0, 0]
    registry = Registry(tmp_path / "registry")
    numbers = {name: [version.number for version in registry.versions(name)] for name in ("support", "sales")}
    assert numbers == {"support": list(range(1, 2 * TIMES + 1)), "sales": list(range(1, TIMES + 1))}
    assert len(registry.history("support@production")) == 2 * TIMES and verify(registry) == []


TIMES = rounds(4, 40)


def publish_many(root: Path, name: str) -> None:
    """Publish and move an alias, again and again, with as many others as there are."""
    registry = Registry(root / "registry", wait=120)
    for n in range(TIMES):
        version = registry.publish(name, folders_in(root)[n % FOLDERS], "ann")
        registry.set_alias(f"{name}@production", version.number)


def test_files_that_one_deletes_while_another_publishes_them_are_there_in_the_end(tmp_path: Path):
    make(tmp_path)
    crowd = [start(publish_and_delete, tmp_path, name) for name in ("support", "sales")]
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0, 0]
    registry = Registry(tmp_path / "registry")
    assert verify(registry) == [] and [version.name for version in registry.versions()] == [
        "sales",
        "support",
    ]


def publish_and_delete(root: Path, name: str) -> None:
    """Publish the same files as the other process, and delete them, over and over; the last time they stay."""
    registry = Registry(root / "registry", wait=120)
    for _ in range(TIMES):
        version = registry.publish(name, folders_in(root)[0], "ann")
        assert hash_files(version.path) == version.files
        registry.delete(version.label)
    registry.publish(name, folders_in(root)[0], "ann")

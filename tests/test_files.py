"""Files that others read: written whole or not at all, with the usual permissions; read with suspicion."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from labkit.files import reading, writing


def test_permissions_follow_the_umask_also_where_safetensors_gives_only_the_owners(tmp_path: Path):
    before = os.umask(0o027)
    try:
        with writing.new_folder(tmp_path / "folder") as made:
            save_file({"a": torch.ones(3)}, made / "a.safetensors")
        writing.write_json(tmp_path / "b.json", {"b": 1})
    finally:
        os.umask(before)
    for file in (tmp_path / "folder" / "a.safetensors", tmp_path / "b.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_an_error_in_the_block_changes_nothing(tmp_path: Path):
    writing.write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), writing.new_file(tmp_path / "a") as part:
        part.write_text("new")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    writing.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "real").read_text() == "new"


def test_a_file_where_a_folder_should_be_is_kept(tmp_path: Path):
    (tmp_path / "a").write_text("mine")
    with (
        pytest.raises(writing.CannotWrite, match="there is a file of that name"),
        writing.new_folder(tmp_path / "a"),
    ):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_without_an_exchange_in_one_step_an_old_folder_comes_back_after_a_kill(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(writing, "exchange", lambda one, other: False)
    for text in ("old", "new"):
        with writing.new_folder(tmp_path / "a") as made:
            (made / "text").write_text(text)
    assert (tmp_path / "a" / "text").read_text() == "new"
    left = tmp_path / ".a.0123abcd.part"  # as a kill between the two renames leaves it
    left.mkdir()
    os.replace(tmp_path / "a", left / writing.OLD)
    writing.clear_leftovers(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a" / "text").read_text() == "new"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_that_another_writes_or_takes_away_at_the_last_moment_is_replaced(
    tmp_path: Path, monkeypatch, in_one_step: bool
):
    exchange, replace, others = writing.exchange, os.replace, ["come", "go"]

    def meddle() -> None:
        """What another process does between a look at the place and the move to it."""
        if others and others.pop(0) == "come":
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "text").write_text("another's")
        elif (tmp_path / "a" / "text").exists() and others == []:
            replace(tmp_path / "a", tmp_path / "gone")

    def meddled(act):
        def acted(one, other):
            meddle()
            return act(one, other)

        return acted

    monkeypatch.setattr(writing, "exchange", meddled(exchange) if in_one_step else lambda one, other: False)
    monkeypatch.setattr(os, "replace", meddled(replace))
    with writing.new_folder(tmp_path / "a") as made:
        (made / "text").write_text("mine")
    assert others == [] and (tmp_path / "a" / "text").read_text() == "mine"
    assert (tmp_path / "gone" / "text").read_text() == "another's"


def test_leftovers_of_a_living_writer_and_of_other_names_stay(tmp_path: Path):
    with writing.scratch_beside(tmp_path / "a") as scratch:
        (tmp_path / ".b.0123abcd.part").mkdir()
        writing.clear_leftovers(tmp_path / "a")
        assert scratch.exists() and (tmp_path / ".b.0123abcd.part").exists()


def test_a_writer_whose_new_scratch_folder_another_takes_away_makes_a_new_one(tmp_path: Path, monkeypatch):
    acquire, taken = writing.FileLock.acquire, []

    def too_late(lock, *arguments, **keywords):
        if not taken:  # another writer has cleared the folder, which had no lock yet
            taken.append(Path(lock.lock_file).parent)
            taken[0].rmdir()
            raise FileNotFoundError(lock.lock_file)
        return acquire(lock, *arguments, **keywords)

    monkeypatch.setattr(writing.FileLock, "acquire", too_late)
    with writing.scratch_beside(tmp_path / "a") as scratch:
        assert scratch.exists() and scratch != taken[0]


def test_only_one_at_a_time_may_hold_a_lock(tmp_path: Path):
    with (
        writing.only_one(tmp_path / "lock", "taken"),
        pytest.raises(writing.InUse, match="taken"),
        writing.only_one(tmp_path / "lock", "taken"),
    ):
        pass
    with writing.only_one(tmp_path / "lock", "taken"):
        pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (" " * (reading.MAX_JSON + 1), "at most"),
        ("[" + "[]," * reading.MAX_INSIDE + "[]]", "more than 1,000,000 lists and objects"),
    ],
)
def test_json_that_is_not_read(tmp_path: Path, content: str | bytes, reason: str):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason):
        reading.read_json(path)


def test_pipes_and_devices_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        for read in (reading.read_json, reading.read_tensors):
            with pytest.raises(ValueError, match="not a regular file"):
                read(tmp_path / name)


def test_headers_that_are_not_read(tmp_path: Path):
    save_file({"a": torch.ones(3)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    header = json.dumps(reading.read_header(tmp_path / "good"))
    twice = ('{"a": 0, ' + header.removeprefix("{")).encode()
    bad = {
        "cut": good[:-4],
        "short": good[:5],
        "bomb": (2**60).to_bytes(8, "little") + good[8:],
        "twice": len(twice).to_bytes(8, "little") + twice + good[-12:],
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    assert torch.equal(reading.read_tensors(tmp_path / "good")["a"], torch.ones(3))
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            reading.read_tensors(tmp_path / name)

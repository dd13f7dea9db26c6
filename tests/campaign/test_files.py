"""Kills and a full disk for the two ways in which labkit writes: a file and a folder."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from labkit.files import writing
from tests.campaign.harness import kill_after, moments, rounds, small_disk, start


def rewrite(folder: Path, letter: str) -> None:
    """Replace a file and a folder again and again, each whole of one letter."""
    n = 0
    while True:
        n += 1
        writing.write_text(folder / "file", f"{letter}{n} " * 1000)
        with writing.new_folder(folder / "folder") as made:
            for name in ("one", "two", "three"):
                (made / name).write_text(f"{letter}{n}")


def test_a_kill_leaves_the_old_or_the_new_and_the_next_writer_clears_the_rest(tmp_path: Path):
    writing.write_text(tmp_path / "file", "begin " * 1000)
    with writing.new_folder(tmp_path / "folder") as made:
        for name in ("one", "two", "three"):
            (made / name).write_text("begin")
    leftovers = 0
    for n, moment in enumerate(moments(100, 0.05, seed=0)):
        if n >= rounds(20, 100) and leftovers > 0:
            break  # a slice goes on until a kill has fallen into a write
        assert kill_after(moment, rewrite, tmp_path, "abc"[n % 3])
        assert len(set((tmp_path / "file").read_text().split())) == 1
        assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["one", "three", "two"]
        assert len({(tmp_path / "folder" / name).read_text() for name in ("one", "two", "three")}) == 1
        leftovers += len(list(tmp_path.glob(".*.part")))
    writing.write_text(tmp_path / "file", "end")
    with writing.new_folder(tmp_path / "folder"):
        pass
    assert leftovers > 0, "no kill fell into a write"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_writers_of_one_folder_and_one_who_takes_it_away_do_not_disturb_each_other(tmp_path: Path):
    crowd = [start(write_often, tmp_path, letter) for letter in "ab"] + [start(remove_often, tmp_path)]
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0, 0, 0]
    with writing.new_folder(tmp_path / "folder") as made:
        (made / "one").write_text("end")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def write_often(root: Path, letter: str) -> None:
    for _ in range(rounds(100, 2000)):
        with writing.new_folder(root / "folder") as made:
            (made / "one").write_text(letter)


def remove_often(root: Path) -> None:
    """Take the folder away whenever it is there, in one step, as those who delete do."""
    for n in range(rounds(200, 4000)):
        with suppress(FileNotFoundError):
            os.replace(root / "folder", root / f"gone{n}")
            shutil.rmtree(root / f"gone{n}")
        time.sleep(0.002)


def test_a_full_disk_leaves_the_old_file_and_gives_one_sentence(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        writing.write_text(disk / "file", "old")
        with writing.new_folder(disk / "folder") as made:
            (made / "one").write_text("old")
        with pytest.raises(OSError, match=r"cannot write .*file: the disk is full; what was .* is intact"):
            writing.write_text(disk / "file", "x" * 500_000)
        with pytest.raises(OSError, match="the disk is full"), writing.new_folder(disk / "folder") as made:
            (made / "one").write_text("x" * 500_000)
        assert (disk / "file").read_text() == (disk / "folder" / "one").read_text() == "old"
        assert sorted(os.listdir(disk)) == ["file", "folder"]

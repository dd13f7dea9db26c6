"""Sweeps that are killed, interrupted or run out of disk: no recorded run is lost or doubled, and the rest is done."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from labkit.files.writing import CannotWrite
from labkit.sweeps import grid, processes, records
from tests.campaign.harness import duration, kill_after, moments, rounds, small_disk, start
from tests.sweeps.cases import configs, table

RUNS = 4
JOBS = 2


def small_sweep() -> list:
    return configs(r=[1, 2])


def sweep(path: Path) -> None:
    """The sweep that every round does, in a process of its own."""
    # copies of this process, which has all the modules: else a round would be their import. One thread has no locks
    processes.START_METHOD = "fork"
    torch.set_num_threads(1)
    grid.run_experiment(small_sweep(), path, JOBS, progress=False)


def recorded(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[list[dict], float]:
    """What the sweep records, and the seconds that it takes."""
    path = tmp_path_factory.mktemp("undisturbed") / "r.jsonl"
    seconds = duration(sweep, path)
    return table(records.load(path)), seconds


def check_completed(path: Path, before: bytes, undisturbed: list[dict]) -> None:
    """Complete the sweep, and see that it is the undisturbed one, that what was recorded is still there, and that
    nothing else is.
    """
    assert before.count(b"\n") <= RUNS and (not before or before.endswith(b"\n"))
    start(sweep, path).join()
    results = records.load(path)
    assert not results.problems and table(results) == undisturbed
    assert recorded(path).startswith(before) and recorded(path).count(b"\n") == RUNS
    assert sorted(p.name for p in path.parent.iterdir()) == [f".{path.name}.lock", path.name]


def test_a_sweep_killed_with_all_its_processes_goes_on(tmp_path: Path, undisturbed):
    want, seconds = undisturbed
    in_the_middle = 0
    for n, moment in enumerate(moments(rounds(2, 100), seconds, seed=1)):
        path = tmp_path / str(n) / "r.jsonl"
        path.parent.mkdir()
        kill_after(moment, sweep, path)
        before = recorded(path)
        in_the_middle += 0 < before.count(b"\n") < RUNS
        check_completed(path, before, want)
    assert in_the_middle or rounds(2, 100) < 100


def test_a_sweep_goes_on_by_itself_when_one_of_its_processes_is_killed(tmp_path: Path, undisturbed):
    want, seconds = undisturbed
    hit = 0
    for n, moment in enumerate(moments(40, seconds, seed=2)):
        if hit and n >= rounds(2, 40):
            break  # a slice goes on until a kill has hit a process
        path = tmp_path / str(n) / "r.jsonl"
        path.parent.mkdir()
        parent = start(sweep, path)
        time.sleep(moment)
        with suppress(psutil.NoSuchProcess, IndexError):
            psutil.Process(parent.pid).children()[n % JOBS].kill()
            hit += 1
        parent.join()
        assert parent.exitcode == 0
        check_completed(path, recorded(path), want)
        assert recorded(path).count(b"\n") == RUNS
    assert hit, "no process was there to be killed"


def test_a_sweep_that_is_interrupted_keeps_what_it_has(tmp_path: Path, undisturbed):
    want, seconds = undisturbed
    for n, moment in enumerate(moments(rounds(1, 20), seconds, seed=3)):
        path = tmp_path / str(n) / "r.jsonl"
        path.parent.mkdir()
        parent = start(sweep, path)
        children = psutil.Process(parent.pid)
        time.sleep(moment)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            workers = children.children()
            os.killpg(parent.pid, signal.SIGINT)
            parent.join(30)
            assert not parent.is_alive() and not psutil.wait_procs(workers, timeout=30)[1]
        check_completed(path, recorded(path), want)


def test_a_full_disk_ends_the_sweep_with_a_sentence_and_keeps_what_it_has(
    tmp_path: Path, undisturbed, monkeypatch
):
    want, _ = undisturbed
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        path = disk / "r.jsonl"
        for free in range(1, 1 + rounds(1, 3)):  # pages of the disk that are left for records
            path.unlink(missing_ok=True)
            filler = disk / "filler"
            filler.write_bytes(b"\0" * (64 - 4 * free) * 1024)
            made = grid.run_experiment(small_sweep()[:1], path, 0, progress=False).records
            line = recorded(path)
            path.write_bytes(line * (free * 4096 // len(line)))  # so that the next line does not fit
            before = recorded(path)
            with pytest.raises(CannotWrite, match=r"cannot write .*r\.jsonl: the disk is full; .* is intact"):
                records.append(path, made[0])
            assert recorded(path) == before
            path.write_bytes(line)
            filler.unlink()
        grid.run_experiment(small_sweep(), path, 0, progress=False)
        assert table(records.load(path)) == want

"""A run that is killed, crashes, hangs or finds no model never keeps the others from being run."""

import faulthandler
import os
import signal
import time

import pytest

from labkit.files.writing import CannotWrite
from labkit.models.fetching import ModelUnavailable
from labkit.sweeps import grid, processes, records, runs
from labkit.sweeps.config import RunConfig
from tests.sweeps.cases import QUICK, configs

RESULT = runs.RunResult(None, None, {"bits": 1.0})  # type: ignore[arg-type]


def as_it_ends(monkeypatch, fate):
    """Let `fate(config)` stand for a run, in processes that are copies of this one and so know it."""
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    monkeypatch.setattr(runs, "run", fate)


def killed(config):
    os.kill(os.getpid(), signal.SIGKILL)


def crashed(config):
    faulthandler.disable()  # of pytest: it would print where
    os.kill(os.getpid(), signal.SIGSEGV)


def left(config):
    os._exit(3)


def left_by_exit(config):
    raise SystemExit(4)


def broken(config):
    raise RuntimeError("no kernel image")


def without_memory(config):
    raise MemoryError("of 40 GB")


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        (
            killed,
            "its process ended 2 times before it did: killed by SIGKILL, as the system does when memory is short",
        ),
        (crashed, "its process ended 2 times before it did: killed by SIGSEGV"),
        (left, "its process ended 2 times before it did: exit code 3"),
        (left_by_exit, "its process ended 2 times before it did: exit code 4"),
        (broken, "RuntimeError: no kernel image"),
        (without_memory, "MemoryError: of 40 GB"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_whose_process_ends_is_recorded_as_failed_and_the_others_go_on(
    tmp_path, monkeypatch, fate, message, jobs
):
    as_it_ends(monkeypatch, lambda config: fate(config) if config.r == 2 else RESULT)
    made = configs(r=[1, 2, 4])[::2]
    results = grid.run_experiment(made, tmp_path / "r.jsonl", jobs, progress=False)
    assert [r["status"] for r in results.records] == ["done", "failed", "done"]
    assert results.records[1]["error"] == message and not results.problems
    monkeypatch.setattr(runs, "run", killed)  # all is recorded: nothing is begun again
    assert grid.run_experiment(made, tmp_path / "r.jsonl", jobs, progress=False).records == results.records


def test_a_run_that_was_killed_once_is_tried_again(tmp_path, monkeypatch):
    def once(config):
        if not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            killed(config)
        return RESULT

    as_it_ends(monkeypatch, once)
    results = grid.run_experiment(configs(r=[1, 2]), tmp_path / "r.jsonl", jobs=2, progress=False)
    assert [r["status"] for r in results.records] == ["done"] * 4


def test_a_run_that_hangs_is_stopped_and_the_others_go_on(tmp_path, monkeypatch):
    as_it_ends(monkeypatch, lambda config: time.sleep(1000) if config.r == 1 else RESULT)
    made = configs(r=[1, 2])[::2]
    results = grid.run_experiment(made, tmp_path / "r.jsonl", jobs=1, progress=False, minutes=0.005)
    assert [r["status"] for r in results.records] == ["failed", "done"]
    assert results.records[0]["error"] == "stopped after 0.005 minutes, the limit that was given"
    with pytest.raises(ValueError, match="minutes are counted for runs in processes of their own"):
        grid.run_experiment(made, tmp_path / "r.jsonl", jobs=0, minutes=5)
    with pytest.raises(ValueError, match="minutes=-1 must be a positive number"):
        grid.run_experiment(made, tmp_path / "r.jsonl", jobs=1, minutes=-1)


@pytest.mark.parametrize("jobs", [0, 2])
def test_what_another_day_may_run_is_not_recorded_but_said(tmp_path, monkeypatch, jobs):
    def no_network(config):
        if config.r == 1:
            raise ModelUnavailable("could not get 'a/b' from the hub")
        return RESULT

    as_it_ends(monkeypatch, no_network)
    path = tmp_path / "r.jsonl"
    results = grid.run_experiment(configs(r=[1, 2]), path, jobs, progress=False)
    assert [r["config"]["r"] for r in results.records] == [2, 2]
    assert len(results.problems) == 2
    assert all("could not get 'a/b' from the hub); start again to do it" in p for p in results.problems)
    as_it_ends(monkeypatch, lambda config: RESULT)
    assert len(grid.run_experiment(configs(r=[1, 2]), path, jobs, progress=False).records) == 4


def test_processes_that_do_not_start_end_the_sweep_and_record_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    monkeypatch.setattr(processes, "begin_process", lambda: os._exit(1))
    with pytest.raises(RuntimeError, match=r"do not start \(exit code 1\).*__main__"):
        grid.run_experiment(configs(r=[1]), tmp_path / "r.jsonl", jobs=2, progress=False)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_model_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    toml = tmp_path / "a.toml"
    toml.write_text('[fixed]\ntask="facts"\nexamples=8\n[[grid]]\nmodel=["tiny-llama", "tiny-lama"]\n')
    with pytest.raises(
        ValueError, match=r"a\.toml: 'tiny-lama' is not a known model; did you mean 'tiny-llama'\?"
    ):
        grid.run_experiment(toml, tmp_path / "r.jsonl", jobs=0, progress=False)
    assert not (tmp_path / "r.jsonl").exists()


def test_a_record_that_cannot_be_written_ends_the_sweep_and_keeps_what_there_is(tmp_path, monkeypatch):
    as_it_ends(monkeypatch, lambda config: RESULT)
    path = tmp_path / "r.jsonl"
    grid.run_experiment(configs(r=[1]), path, jobs=0, progress=False)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(
        CannotWrite, match="cannot write .*: the disk is full; what was there before is intact"
    ):
        records.append(path, {"config": {}})
    assert path.read_bytes() == before


def test_nothing_is_written_where_everything_is_recorded(tmp_path, monkeypatch, recorded_file):
    def refuse(*_):
        raise AssertionError("took the lock")

    monkeypatch.setattr(grid, "only_one", refuse)
    assert len(grid.run_experiment(configs(r=[1]), recorded_file, jobs=0, progress=False).records) == 2


def test_a_base_in_a_folder_is_another_one_with_another_tokenizer(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (base / name).write_text("{}")
    monkeypatch.setattr(grid, "local_folder", lambda name: base)
    monkeypatch.setattr(runs, "run", lambda config: RESULT)
    made = [RunConfig(**QUICK, model=str(base))]
    path = tmp_path / "r.jsonl"
    assert len(grid.run_experiment(made, path, jobs=0, progress=False).records) == 1
    assert not records.load(path).problems
    (base / "tokenizer.json").write_text('{"other": 1}')
    runs.settings_hash.cache_clear()
    with pytest.warns(records.SweepWarning, match="line 1 was run with another config or tokenizer of"):
        assert not records.load(path).records

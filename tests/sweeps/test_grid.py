"""A sweep records what it did, never does it twice, survives a kill, and hides nothing that went wrong."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from filelock import FileLock

from labkit import models
from labkit.formats.adapters import load_adapter
from labkit.sweeps import grid, runs
from labkit.sweeps.config import RunConfig
from labkit.sweeps.fitting import fit
from labkit.sweeps.records import summarize
from labkit.sweeps.tasks import TASKS
from tests.sweeps.cases import QUICK, ROOT, configs, table


def test_a_grid_is_the_product_of_its_lists_with_the_seeds_innermost():
    made = configs(r=[1, 2], lr=[1e-3, 1e-2])
    assert [(c.r, c.lr, c.seed) for c in made] == [
        (r, lr, seed) for r in (1, 2) for lr in (1e-3, 1e-2) for seed in (0, 1)
    ]
    assert all(c.task == "facts" and c.examples == 8 for c in made)


def test_a_grid_may_have_seeds_of_its_own():
    made = grid.expand({"seeds": [0], "grid": [{"lr": [1e-3, 1e-2]}, {"lr": [1e-3], "seeds": [1, 2]}]})
    assert [(c.lr, c.seed) for c in made] == [(1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-3, 2)]


@pytest.mark.parametrize(
    "experiment, message",
    [
        ({"grid": [{"r": []}]}, "r is an empty list"),
        ({"seeds": [], "grid": [{"r": [1]}]}, "seed is an empty list"),
        ({"grid": []}, "there are no runs"),
        ({"grid": [{"r": [4]}, {"r": [4]}]}, "runs 1 and 2 are the same"),
        ({"grid": [{"rank": [4]}]}, "rank: no such setting of a run; it has task, model"),
        ({"grids": [{"r": [4]}]}, r"unknown parts \['grids'\]"),
        ({"fixed": {"task": "poetry"}}, "task='poetry' is not known; choose one of"),
        ({"fixed": {"method": "prefixes"}}, "method='prefixes' is not known"),
        ({"fixed": {"method": "subspace"}}, "d goes with method='subspace'"),
        ({"fixed": {"r": 0}}, "rank must be a whole number"),
        ({"fixed": {"lr": -1}}, "must be a positive number"),
        ({"fixed": {"task": "facts"}}, "give examples"),
        ({"fixed": {"examples": 0}}, "must be a whole number of at least 1"),
        ({"grid": [{"targets": [["q_proj"]]}]}, "grid 1: targets=.* must be a text here"),
        ({"seeds": 3}, r"seeds is 3; write seeds = \[0, 1, 2\], a list"),
        ({"seeds": [0, 0.5, 1]}, "seeds: seed=0.5 must be a whole number"),
        ({"seeds": [True]}, "seeds: seed=True must be a whole number"),
        ({"seeds": [1, 1]}, "runs 1 and 2 are the same"),
        ({"grid": [{"r": [4], "seeds": [0.5]}]}, "seeds: seed=0.5 must be a whole number"),
        ({"grid": [{"r": [4], "seeds": []}]}, "seed is an empty list"),
        ({"grid": {"r": [4]}}, r"grid is a table with r; write \[\[grid\]\], in double brackets"),
        ({"grid": [5]}, r"grid is \[5\]; write \[\[grid\]\]"),
        ({"fixed": 5}, r"fixed is 5; write \[fixed\], in single brackets"),
        ({"fixed": [{"r": 4}]}, r"write \[fixed\], in single brackets"),
        ({"about": 5}, "about is 5; write about ="),
        (
            {"fixed": {"lr": [1e-3]}},
            r"lr=\[0.001\] under \[fixed\] is a list; values to try stand under \[\[grid",
        ),
        ({"fixed": {"seed": 3}}, r"seed=3 in \[fixed\]; seeds of all runs stand at the top"),
        ({"grid": [{"r": [1]}, {"seed": [3]}]}, r"seed=\[3\] in grid 2; seeds of all runs"),
        ({"steps": 5}, r"unknown parts \['steps'\].*settings of all runs stand under \[fixed\]"),
        ({"grid": [{"r": [1]}, {"batchsize": [4]}]}, "grid 2: batchsize: .*did you mean 'batch_size'"),
        ({"grid": [{"r": [1]}, {"batch_size": [2.5]}]}, "grid 2: batch_size=2.5 must be a whole number"),
        ({"grid": [{"lr": [float("nan")]}]}, "grid 1: lr=nan must be a positive number"),
        ({"grid": [{"lr": [float("inf")]}]}, "grid 1: lr=inf must be a positive number"),
        ({"fixed": {"model": 5}}, "model=5 must be a name, or a folder"),
        ({"fixed": {"embeddings": "yes"}}, "embeddings='yes' is not known"),
        (
            {"grid": [{"r": list(range(1, 1001)), "steps": list(range(1, 1001))}]},
            "more than 100,000 runs with grid 1",
        ),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(experiment, message):
    with pytest.raises(ValueError, match=message):
        grid.expand({"fixed": {}, **experiment})


def test_a_file_that_is_no_experiment_is_an_error_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.toml: No such file"):
        grid.read_experiment(tmp_path / "missing.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ValueError, match=r"pipe\.toml: is not a regular file"):
        grid.read_experiment(tmp_path / "pipe.toml")
    (tmp_path / "bad.toml").write_text("seeds = [0,")
    with pytest.raises(ValueError, match=r"bad\.toml: Invalid value"):
        grid.read_experiment(tmp_path / "bad.toml")


def test_a_recorded_run_is_not_done_again(tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    first = grid.run_experiment(configs(r=[1, 2]), path, jobs=0, progress=False)
    assert len(first.records) == 4 and {r["status"] for r in first.records} == {"done"}

    def refuse(config):
        raise AssertionError(f"did {config} again")

    monkeypatch.setattr(runs, "run", refuse)
    again = grid.run_experiment(configs(r=[1, 2]), path, jobs=0, progress=False)
    assert table(again) == table(first)
    assert again.to_frame().equals(first.to_frame())


@pytest.mark.slow
def test_processes_beside_each_other_record_what_one_process_records(tmp_path, one_thread):
    alone = grid.run_experiment(configs(r=[1, 2]), tmp_path / "a.jsonl", jobs=0, progress=False)
    beside = grid.run_experiment(configs(r=[1, 2]), tmp_path / "b.jsonl", jobs=2, progress=False)
    assert table(alone) == table(beside)


@pytest.mark.slow
def test_a_killed_sweep_that_is_started_again_gives_the_same_table(tmp_path, one_thread):
    toml = tmp_path / "small.toml"
    toml.write_text(
        'seeds = [0, 1, 2]\n[fixed]\ntask = "facts"\nexamples = 8\nsteps = 3\n[[grid]]\nr = [1, 2]\n'
    )
    path = tmp_path / "small.jsonl"
    command = [sys.executable, "-m", "labkit.sweep", str(toml), "--out", str(path), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    patience = time.monotonic() + 600  # on a busy machine
    while not (path.exists() and path.read_text().count("\n") >= 2) and time.monotonic() < patience:
        time.sleep(0.02)
    worker = next(p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline()))
    process.kill()  # the parent alone; its process must notice
    process.wait()
    worker.wait(timeout=60)
    before = path.read_text()
    assert 2 <= before.count("\n") < 6, "the kill must come in the middle"

    completed = grid.run_experiment(toml, path, jobs=0, progress=False)
    assert path.read_text().startswith(before), "what was recorded stays as it was"
    whole = grid.run_experiment(toml, tmp_path / "whole.jsonl", jobs=0, progress=False)
    assert table(completed) == table(whole)


def test_a_run_that_cannot_run_or_diverges_is_recorded_as_such(tmp_path):
    made = [
        RunConfig(**QUICK | {"r": 200}),
        RunConfig(**QUICK | {"lr": 1e30, "steps": 8}),
        RunConfig(**QUICK),
    ]
    results = grid.run_experiment(made, tmp_path / "r.jsonl", jobs=0, progress=False)
    failed, diverged, done = results.records
    assert failed["status"] == "failed" and "r=200 is above 128" in failed["error"]
    assert (
        diverged["status"] == "diverged"
        and 1 <= diverged["step"] <= 8
        and "Try a lower lr" in diverged["error"]
    )
    assert done["status"] == "done"
    frame = results.to_frame()
    assert list(frame["status"]) == ["failed", "diverged", "done"] and frame["diverged_at"].notna().sum() == 1
    counted = summarize(frame, "task", "bits")
    assert counted["n"].item() == 1 and counted["missing"].item() == 2


def test_an_interrupt_ends_the_sweep_and_half_a_run_is_not_recorded(tmp_path, monkeypatch):
    done = []

    def interrupted(config):
        if done:
            raise KeyboardInterrupt
        done.append(config)
        return runs.RunResult(None, None, {"bits": 1.0})

    monkeypatch.setattr(runs, "run", interrupted)
    results = grid.run_experiment(configs(r=[1, 2]), tmp_path / "r.jsonl", jobs=0, progress=False)
    assert len(results.records) == 1 and "run again to complete" in results.problems[-1]
    assert (tmp_path / "r.jsonl").read_text().count("\n") == 1


def test_two_sweeps_do_not_write_to_one_file(recorded_file):
    lock = FileLock(recorded_file.with_name(f".{recorded_file.name}.lock"))
    with lock, pytest.raises(RuntimeError, match="another sweep is writing"):
        grid.run_experiment(configs(r=[4]), recorded_file, jobs=0, progress=False)


def test_adapters_are_kept_where_they_are_wanted_and_named_in_their_records(tmp_path):
    results = grid.run_experiment(
        configs(lr=1e-3), tmp_path / "runs.jsonl", jobs=0, progress=False, keep=tmp_path / "adapters"
    )
    first, second = (tmp_path / "adapters" / record["adapter"] for record in results.records)
    assert first != second
    again, _, _ = fit(configs(lr=1e-3)[0], TASKS["facts"].records(configs(lr=1e-3)[0]))
    model, _ = models.load("tiny-llama", dtype=torch.float32)
    load_adapter(model, first)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, again.get_parameter(name), msg=name)

"""A sweep records what it did, never does it twice, survives a kill, and hides nothing that went wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from scipy import stats

from labkit.paths import data_folder
from labkit.sweeps import grid, records, runs
from labkit.sweeps.config import RunConfig
from labkit.sweeps.records import mean_interval, summarize

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))
QUICK = {"task": "facts", "examples": 8, "steps": 3, "r": 2}


@pytest.fixture
def one_thread():
    """Runs in this process on one thread, as a sweep's processes have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configs(**axes) -> list[RunConfig]:
    return grid.expand({"seeds": [0, 1], "fixed": QUICK, "grid": [axes]})


def table(results: records.Results) -> list[dict]:
    """What must be equal between two ways to the same sweep: everything but times."""
    rows = []
    for record in sorted(results.records, key=lambda r: json.dumps(r["config"])):
        metrics = {k: v for k, v in record.get("metrics", {}).items() if k != "train_seconds"}
        rows.append({"config": record["config"], "status": record["status"], "metrics": metrics})
    return rows


# --- experiments ---


def test_a_grid_is_the_product_of_its_lists_with_the_seeds_innermost():
    made = configs(r=[1, 2], lr=[1e-3, 1e-2])
    assert [(c.r, c.lr, c.seed) for c in made] == [
        (r, lr, seed) for r in (1, 2) for lr in (1e-3, 1e-2) for seed in (0, 1)
    ]
    assert all(c.task == "facts" and c.examples == 8 for c in made)


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
        ({"fixed": {"targets": ["q_proj"]}}, "must be a text here"),
    ],
)
def test_a_wrong_experiment_is_refused_before_anything_runs(experiment, message):
    with pytest.raises(ValueError, match=message):
        grid.expand({"fixed": {}, **experiment})


def test_a_file_that_is_no_experiment_is_an_error_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.toml: No such file"):
        grid.read_experiment(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("seeds = [0,")
    with pytest.raises(ValueError, match=r"bad\.toml: Invalid value"):
        grid.read_experiment(tmp_path / "bad.toml")


# --- running and recording ---


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


def test_processes_beside_each_other_record_what_one_process_records(tmp_path, one_thread):
    alone = grid.run_experiment(configs(r=[1, 2]), tmp_path / "a.jsonl", jobs=0, progress=False)
    beside = grid.run_experiment(configs(r=[1, 2]), tmp_path / "b.jsonl", jobs=2, progress=False)
    assert table(alone) == table(beside)


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


def test_training_that_was_interrupted_is_no_result(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["labkit.training.loop"], "supervised_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(RunConfig(**QUICK))


# --- damaged files ---


@pytest.fixture
def recorded_file(tmp_path):
    path = tmp_path / "r.jsonl"
    grid.run_experiment(configs(r=[1]), path, jobs=0, progress=False)
    return path


def test_a_half_written_last_line_is_kept_aside_and_its_run_done_again(recorded_file):
    whole = table(records.load(recorded_file))
    text = recorded_file.read_text()
    recorded_file.write_text(text[:-40])
    with pytest.warns(records.SweepWarning, match="cut off; it is kept in r.jsonl.broken"):
        mended = grid.run_experiment(configs(r=[1]), recorded_file, jobs=0, progress=False)
    assert table(mended) == whole
    assert (recorded_file.parent / "r.jsonl.broken").read_text() == text.splitlines()[-1][:-39] + "\n"


def test_results_on_other_data_are_reported_and_left_out_but_not_lost(recorded_file):
    lines = [json.loads(line) for line in recorded_file.read_text().splitlines()]
    lines[0]["data"] = "0123456789abcdef"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    recorded_file.write_text(text)
    with pytest.warns(records.SweepWarning, match="line 1 was run on other data"):
        results = records.load(recorded_file)
    assert len(results.records) == 1
    with pytest.warns(records.SweepWarning):
        completed = grid.run_experiment(configs(r=[1]), recorded_file, jobs=0, progress=False)
    assert len(completed.records) == 2 and recorded_file.read_text().startswith(text)


def test_nonsense_and_repeated_lines_are_reported_with_their_number(recorded_file):
    text = recorded_file.read_text()
    recorded_file.write_text(text + '{"config": {"rank": 1}}\n[]\n' + text.splitlines()[0] + "\n")
    with pytest.warns(records.SweepWarning, match="left out 3 lines"):
        results = records.load(recorded_file)
    assert len(results.records) == 2
    assert [p.split(" ")[1] for p in results.problems] == ["3", "4", "5"]
    assert "no such setting" in results.problems[0] and "repeats a run" in results.problems[2]


def test_two_sweeps_do_not_write_to_one_file(recorded_file):
    lock = grid.FileLock(recorded_file.with_name(f".{recorded_file.name}.lock"))
    with lock, pytest.raises(RuntimeError, match="another sweep is writing"):
        grid.run_experiment(configs(r=[4]), recorded_file, jobs=0, progress=False)


def test_nothing_recorded_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m labkit.sweep experiments/none.toml"):
        records.load(tmp_path / "none.jsonl")


# --- statistics ---


def test_the_interval_is_students():
    values = [3.1, 2.9, 3.4, 3.3]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_summary_counts_runs_without_the_metric():
    frame = pd.DataFrame({"r": [1, 1, 2, 2], "loss": [1.0, 2.0, 3.0, None]})
    made = summarize(frame, "r", "loss").set_index("r")
    assert list(made["mean"]) == [1.5, 3.0] and list(made["n"]) == [2, 1] and list(made["missing"]) == [0, 1]


# --- what comes with the course ---


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_point_of_an_experiment_is_recorded_on_the_data_as_it_is(path, recwarn):
    wanted = grid.read_experiment(path)
    results = records.load(data_folder() / "results" / f"{path.stem}.jsonl")
    assert not results.problems
    known = results.by_config()
    missing = [str(config) for config in wanted if config not in known]
    assert not missing
    tiny = [config for config in wanted if config.model == "tiny-llama" and config.method != "none"]
    assert not tiny or len({config.seed for config in tiny}) >= 3

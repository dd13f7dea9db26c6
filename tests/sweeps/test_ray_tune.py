"""A sweep as trials of Ray Tune: what is said without Ray, and what a trial leaves. Ray itself is tested where it is."""

import importlib.util
import json
import sys
from dataclasses import asdict

import pytest

from labkit.sweeps import grid, ray_tune
from labkit.sweeps.cluster import place_of, take_record
from recipes import killed_worker
from tests.sweeps.cases import configs


def test_without_ray_it_says_what_to_install_and_nothing_has_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"ray is not installed, .*; pip install 'ray\[tune\]'$"):
        grid.run_experiment(configs(r=[1]), tmp_path / "r.jsonl", 1, False, on="ray")
    assert not (tmp_path / "r.jsonl").exists()


def test_minutes_are_refused_because_ray_would_not_keep_them(tmp_path):
    with pytest.raises(ValueError, match=r"^minutes=5 cannot be kept on Ray.*leave minutes out"):
        next(ray_tune.carry_out_on_ray(configs(r=[1]), 1, tmp_path, minutes=5))


def test_a_trial_leaves_a_record_and_is_not_repeated_if_it_has(tmp_path):
    config, *_ = configs(r=[1])
    settings = {"run": asdict(config), "folder": str(tmp_path / "jobs"), "keep": None}
    ray_tune.trial(settings)
    place = place_of(tmp_path / "jobs", config)
    written = place.stat().st_mtime_ns
    ray_tune.trial(settings)
    assert place.stat().st_mtime_ns == written
    assert take_record(tmp_path / "jobs", config)["status"] == "done"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is an optional extra: pip install 'ray[tune]'"
)
def test_each_of_twelve_trials_on_two_workers_of_which_one_is_killed_is_one_record(tmp_path):
    results, watch = killed_worker.sweep("ray", tmp_path, killed_worker.configs())
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert watch.killed is not None and len(lines) == 12 and results.problems == []
    assert len({json.dumps(line["config"]) for line in lines}) == 12
    assert {line["status"] for line in lines} == {"done"}

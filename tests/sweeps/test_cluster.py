"""A sweep as jobs of a cluster, by submitit's executor for this machine, of which one job is killed."""

import json
from collections import Counter

import pytest

from labkit.sweeps import grid
from labkit.sweeps.cluster import carry_out_on, place_of, take_record
from recipes import killed_worker
from tests.sweeps.cases import configs, table

pytest.importorskip("submitit")


@pytest.mark.slow
def test_each_of_six_runs_on_two_workers_of_which_one_is_killed_is_one_record(tmp_path):
    """The recorded sweep has twelve; each is a process that imports PyTorch for seconds."""
    runs = killed_worker.configs()[::2]
    results, watch = killed_worker.sweep("local", tmp_path, runs)
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert watch.killed is not None and len(watch.spans) == len(runs) + 1
    assert len(lines) == len(runs) == 6
    assert max(Counter(json.dumps(line["config"]) for line in lines).values()) == 1
    assert {line["status"] for line in lines} == {"done"} and results.problems == []
    assert not list((tmp_path / ".sweep.jobs").glob("*.json"))
    here = grid.run_experiment(runs[:3], tmp_path / "here.jsonl", jobs=0, progress=False)
    results.records = results.records[:3]
    assert table(results) == table(here)


def test_what_a_killed_submitter_left_is_taken_and_not_run_again(tmp_path):
    first, *_ = runs = configs(r=[1])
    record = {"config": vars(first), "status": "done"}
    place_of(tmp_path, first).write_text(json.dumps(record))
    assert next(carry_out_on(runs, "local", 1, tmp_path))["status"] == "done"
    assert take_record(tmp_path, first) is None


def test_without_slurm_and_with_another_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"on='slurm': .*srun.*; start the sweep on a machine that can submit"
    ):
        next(carry_out_on(configs(r=[1]), "slurm", 1, tmp_path))
    with pytest.raises(ValueError, match="on='slrum' is not known; .*did you mean 'slurm'"):
        grid.run_experiment(configs(r=[1]), tmp_path / "r.jsonl", on="slrum")

"""A sweep as jobs of a cluster, by submitit's executor for this machine, of which one job is killed."""

import json
import threading
import time
from collections import Counter

import psutil
import pytest

from labkit.sweeps import grid
from labkit.sweeps.cluster import carry_out_on, place_of, take_record
from tests.sweeps.cases import configs, table

pytest.importorskip("submitit")


def kill_one_job(killed: list[int]) -> None:
    """Kill the second process of a job that comes up."""
    seen: set[int] = set()
    while not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if "submitit.core._submit" in process.cmdline():
                    seen.add(process.pid)
                    if len(seen) == 2:
                        process.kill()
                        killed.append(process.pid)
                        break
            except psutil.Error:
                continue
        time.sleep(0.02)


@pytest.mark.slow
def test_each_run_on_two_workers_of_which_one_is_killed_is_one_record(tmp_path):
    runs = configs(r=[1, 2])
    killed: list[int] = []
    thread = threading.Thread(target=kill_one_job, args=(killed,), daemon=True)
    thread.start()
    path = tmp_path / "r.jsonl"
    results = grid.run_experiment(runs, path, jobs=2, progress=False, on="local")
    thread.join(5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(killed) == 1 and len(lines) == len(runs) == 4
    assert max(Counter(json.dumps(line["config"]) for line in lines).values()) == 1
    assert {line["status"] for line in lines} == {"done"} and results.problems == []
    assert not list((tmp_path / ".r.jobs").glob("*.json"))
    here = grid.run_experiment(runs[:2], tmp_path / "here.jsonl", jobs=0, progress=False)
    results.records = results.records[:2]
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

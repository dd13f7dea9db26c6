"""Damaged files lose nothing, intervals are Student's, and what comes with the course is complete."""

import json
import re

import pandas as pd
import pytest
from scipy import stats

from labkit.paths import data_folder
from labkit.sweeps import grid, records
from labkit.sweeps.records import mean_interval, paired_interval, summarize
from tests.sweeps.cases import ROOT, configs, table

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.toml"))


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


def test_damage_in_the_middle_costs_its_line_alone_and_its_run_is_done_again(recorded_file):
    first, second = recorded_file.read_bytes().splitlines()
    ends = (
        '"status": "done", "error": "a\u2028b\x85c"'.encode()
    )  # ends of a line elsewhere, not in a file of JSON lines
    third = first.replace(b'"status": "done"', ends).replace(b'"schedule": "linear"', b'"schedule": "cosine"')
    odd = [
        b"\xff\x00\xfe",
        first[: len(first) // 2],
        first.replace(b'"done"', b'"finished"'),
        first.replace(b'"seconds": ', b'"seconds": "long", "was": '),
        re.sub(rb'"metrics": \{', b'"metrics": {"bits": "many", ', first),
        first.replace(b'"r": ', b'"rank_of_a_later_version": 1, "r": '),
        b"[" * 100_000,
    ]
    recorded_file.write_bytes(b"\n".join([*odd, second, b"", third]) + b"\n")
    whole = recorded_file.read_bytes()
    with pytest.warns(records.SweepWarning, match="left out 8 lines"):
        results = records.load(recorded_file)
    assert [record["config"]["schedule"] for record in results.records] == ["linear", "cosine"]
    with pytest.warns(records.SweepWarning):
        again = grid.run_experiment(configs(r=[1]), recorded_file, jobs=0, progress=False)
    assert len(again.records) == 2 and recorded_file.read_bytes().startswith(whole)


def test_nothing_recorded_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m labkit.sweep experiments/none.toml"):
        records.load(tmp_path / "none.jsonl")


def test_the_interval_is_students():
    values = [3.1, 2.9, 3.4, 3.3]
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def run_with(seed, wrong):
    return {"config": {"seed": seed}, "wrong": wrong}


def test_a_paired_difference_is_exact_and_its_interval_is_narrower_than_of_two_samples():
    hard = list(range(40))  # that every method gets wrong
    first = [run_with(seed, hard) for seed in (0, 1, 2)]
    second = [run_with(seed, [*hard, 50 + seed, 60, 61]) for seed in (2, 0, 1)]
    difference, low, high = paired_interval(first, second, 100)
    assert difference == pytest.approx(0.03) and 0 <= low < 0.03 < high < 0.08
    assert paired_interval(second, first, 100)[0] == pytest.approx(-0.03)
    assert paired_interval(first, first, 100) == (0, 0, 0)


def test_runs_are_paired_by_seed_and_need_their_items():
    with pytest.raises(ValueError, match=r"the first method has \[0\], the second \[1\]"):
        paired_interval([run_with(0, [])], [run_with(1, [])], 10)
    with pytest.raises(ValueError, match="no items were kept"):
        paired_interval([run_with(0, [])], [{"config": {"seed": 0}}], 10)


def test_summary_counts_runs_without_the_metric():
    frame = pd.DataFrame({"r": [1, 1, 2, 2], "loss": [1.0, 2.0, 3.0, None]})
    made = summarize(frame, "r", "loss").set_index("r")
    assert list(made["mean"]) == [1.5, 3.0] and list(made["n"]) == [2, 1] and list(made["missing"]) == [0, 1]


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

"""The recorded figures of rollouts say what the lesson says, and the recipe makes them again."""

import pytest

from labkit.paths import data_folder
from recipes import jsonl
from recipes.rollout_figures import verdicts

LINES = jsonl.read(data_folder() / "results" / "rollout.jsonl")
BY_NAME = {line["figure"]: line for line in LINES if "verdicts" in line}


@pytest.mark.parametrize("name", ["poisoned", "worse", "shuffled labels"])
def test_a_worse_version_is_rolled_back_with_every_seed(name):
    line = BY_NAME[name]
    assert line["seeds"] >= 50 and line["verdicts"] == {"roll back": line["seeds"]}
    assert line["share"] == 0.2 and line["requests"]["median"] < 500


def test_equal_versions_are_rolled_back_in_less_than_five_percent_and_by_a_z_test_far_more_often():
    equal = [line for line in LINES if line["figure"] == "equal"]
    assert len(equal) == 3
    for line in equal:
        assert line["rolled_back"]["high"] < 0.05 and line["promoted"]["high"] < 0.05
        assert line["z_rolled_back"]["low"] > 0.3


def test_the_customary_thresholds_of_the_index_depend_on_the_size_of_the_window():
    drift = {line["window"]: line for line in LINES if line["figure"] == "drift"}
    assert drift[50]["psi_above_0.1"]["low"] > 0.9 and drift[1000]["psi_above_0.1"]["high"] < 0.01
    for line in drift.values():
        for feature in ("lengths", "first_tokens", "psi"):
            assert line[feature]["low"] <= line["alpha"] <= 2 * line[feature]["high"]


def test_the_recipe_makes_a_figure_again():
    line = BY_NAME["poisoned"]
    assert verdicts("poisoned", line["seeds"], [line["control"]], [line["candidate"]], line["share"]) == line

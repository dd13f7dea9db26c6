"""Three engines on one registry: the tables and the figure of what was recorded, and what the record says."""

import json

import pytest

from labkit.lab.figures import engines

SPEED = [
    {"kind": "speed", "engine": engine, "n": n, "lap": lap, "requests": 16, "tokens": 100, "seconds": seconds}
    for engine, times in {"labkit": (1.0, 2.0, 4.0), "vLLM": (2.0, 2.0, 2.0)}.items()
    for n in (1, 16)
    for lap, seconds in enumerate(times)
]


def test_rates_are_compared_within_a_lap():
    table = engines.rate_table(SPEED)
    assert list(table.index) == [1, 16]
    assert table.loc[1, "labkit, tokens/s"] == 50 and table.loc[16, "vLLM, tokens/s"] == 50
    assert table.loc[1, "labkit : vLLM"] == "1.00 (0.50–2.00)"
    assert "llama.cpp, tokens/s" not in table


def test_the_figure_draws_the_medians_of_engines_that_were_timed():
    drawn = engines.engine_speeds(SPEED)
    assert set(drawn["engine"]) == {"labkit", "vLLM"} and set(drawn["rate"]) == {50.0}


def test_a_case_tried_twice_shows_the_worse_outcome_and_keeps_settings_apart():
    lines = [
        {"engine": "labkit", "case": "unknown name", "outcome": "refused", "status": 404, "words": "none"},
        {
            "engine": "vLLM",
            "case": "mixed batch",
            "outcome": "right",
            "status": 200,
            "words": "a",
            "max_loras": 3,
        },
        {
            "engine": "vLLM",
            "case": "mixed batch",
            "outcome": "wrong",
            "status": 200,
            "words": "b",
            "max_loras": 2,
        },
        {
            "engine": "vLLM",
            "case": "mixed batch",
            "outcome": "right",
            "status": 200,
            "words": "c",
            "max_loras": 2,
        },
    ]
    table = engines.behaviour_table(lines)
    assert table.loc["unknown name"].to_list() == ["refused (404)", "–"]
    assert table.loc["mixed batch, max_loras=2", "vLLM"] == "wrong"
    assert table.loc["mixed batch, max_loras=3", "vLLM"] == "right"
    assert engines.words_of(lines, "unknown name") == {"labkit": "none"}
    with pytest.raises(ValueError, match="cases: unknown name"):
        engines.words_of(lines, "unknown")


def test_a_file_without_lines_of_a_kind_says_which_it_has(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(SPEED[0]) + "\n")
    assert engines.engine_records("speed", path) == SPEED[:1]
    with pytest.raises(ValueError, match="it has: speed"):
        engines.engine_records("behaviour", path)
    with pytest.raises(FileNotFoundError):
        engines.engine_records("speed", tmp_path / "none.jsonl")

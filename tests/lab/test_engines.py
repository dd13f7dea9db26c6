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


def test_in_the_record_all_engines_agree_with_peft_on_every_adapter():
    lines = engines.engine_records("agreement")
    table = engines.agreement_table(lines)
    assert list(table.index) == ["the base", "tickets", "sql", "prose", "random-01"]
    assert list(table) == ["labkit", "llama.cpp", "vLLM"]
    assert all(line["same_token"] and line["compared"] == 5 for line in lines)
    assert table[["labkit", "vLLM"]].max().max() < 1e-4 and table["llama.cpp"].max() < 1e-3


def test_in_the_record_adapters_of_others_change_nothing_of_the_base_in_labkit():
    own = [line for line in engines.engine_records("agreement") if line["engine"] == "labkit"]
    bases = [line for line in own if line["adapter"] is None]
    assert len(bases) == 4 and all(line["base_apart"] == 0 for line in bases)
    assert max(line["alone_relative"] for line in bases) < 2e-5
    rows = [line for line in engines.engine_records("behaviour") if line["engine"] == "labkit"]
    mixed = [line for line in rows if line["case"].startswith("mixed batch")]
    assert len(mixed) == 3 and all(line["outcome"] == "right" and not line["changed"] for line in mixed)
    assert not [line for line in rows if line["outcome"] == "wrong"]


def test_in_the_record_the_base_is_somebody_elses_adapter_in_vllm_unless_a_slot_is_empty():
    rows = [line for line in engines.engine_records("behaviour") if line["engine"] == "vLLM"]
    bases = {line["max_loras"]: line for line in rows if line["case"] == "mixed batch, the base"}
    assert bases[2]["outcome"] == "wrong" and bases[2]["changed"] == bases[2]["tries"]
    assert bases[3]["outcome"] == "right" and bases[3]["apart"] < 1e-4


def test_in_the_record_labkit_is_fastest_from_four_adapters_on_and_llama_cpp_with_one():
    rates = engines.engine_rates(engines.engine_records("speed"))
    assert set(rates["n"]) == {1, 4, 16}
    several = rates[(rates["n"] > 1) & (rates["engine"] != "labkit")]
    assert several["ratio"].min() > 1
    alone = rates[(rates["n"] == 1) & (rates["engine"] == "llama.cpp")]
    assert alone["ratio"].max() < 1

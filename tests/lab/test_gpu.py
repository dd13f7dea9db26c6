"""What a GPU has shown, beside a formula: in tables, and in the verdicts of claims."""

import pytest

from labkit.lab import gpu
from labkit.memory.formulas import plan
from tests.lab.gpu_records import write


def double(row):
    return 2 * row["n"]


def test_without_a_record_a_table_and_a_claim_say_so(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        comparison = gpu.recorded("ledger", folder).beside(double, "n", "×")
        assert str(comparison) == (
            "ledger: no record of this on a GPU yet: `make gpu` on a machine with one makes it (docs/gpu.md)"
        )
        assert comparison.sentence() == "Planned, not measured on a GPU yet."
        assert comparison.sentence("Not timed.") == "Not timed." and comparison.values("n") == {}


def test_a_measured_number_stands_beside_the_formula_with_the_error_of_the_formula(tmp_path):
    rows = {"a": {"n": 4.0, "bytes_of_it": 1}, "b": {"n": 0}, "c": {"m": 1}, "d": {"n": None}}
    write(tmp_path, "steps", rows, "imaginary", ["e"])
    comparison = gpu.recorded("steps", tmp_path).beside(
        lambda row: 0.9 * row["n"], "n", "×", ("counted", "timed"), ("m",)
    )
    where, heads, a, b, e = str(comparison).splitlines()
    assert where == (
        "recorded on a GPU: NVIDIA Imaginary 1, 80 GiB, driver 580.95.05, torch 2.11.0+cu130, 2027-01-02 (make gpu)"
    )
    assert heads.split() == ["counted", "timed", "difference", "m"]
    assert a.split() == ["a", "3.60×", "4.00×", "-10.0%", "–"] and b.split() == [
        "b",
        "0.00×",
        "0.00×",
        "–",
        "–",
    ]
    assert e.strip() == "not measured there: e (skipped: it needs 80.1 GB)"
    assert comparison.sentence() == (
        "Measured on a GPU, NVIDIA Imaginary 1 (2027-01-02, make gpu): "
        "a: timed 4.00× (counted 3.60×, -10.0%); b: timed 0.00× (counted 0.00×, –)."
    )


def test_of_several_gpus_complete_records_come_first_then_the_newest(tmp_path):
    write(tmp_path, "steps", {"a": {"n": 1}}, "x", date="2027-03-01", complete=False)
    write(tmp_path, "steps", {"a": {"n": 2}}, "y", date="2027-01-01")
    write(tmp_path, "steps", {"a": {"n": 3}, "b": {"n": 4}}, "z", date="2027-02-01")
    found = gpu.recorded("steps", tmp_path)
    assert [record.date for record in found.records] == ["2027-02-01", "2027-01-01", "2027-03-01"]
    comparison = found.beside(double, "n", "×")
    assert comparison.values("n") == {3: 3, 4: 4, 2: 2, 1: 1}
    assert comparison.select(n=4).values("n", "m") == {(4, None): 4}
    assert str(comparison).count("recorded on a GPU") == 3 and comparison.sentence().count("Measured on") == 3
    assert str(comparison.select(n=4)).count("nothing of this was measured there") == 2


def test_the_settings_of_a_plan_are_names_in_a_row_and_cannot_hide_its_numbers(tmp_path):
    write(tmp_path, "ledger", {"a": {"n": 1, "settings": {"r": 32, "n": 7}}})
    comparison = gpu.recorded("ledger", tmp_path).beside(double, "n", "GB")
    assert comparison.select(r=32).values("n") == {1: 1}


def test_a_rehearsal_is_never_read(tmp_path):
    write(tmp_path, "ledger", {"a": {"n": 1}}, rehearsal=True)
    found = gpu.recorded("ledger", tmp_path)
    assert found.records == () and "a rehearsal on a CPU" in found.problems[0]
    assert not gpu.recorded("ledger").records or all(
        record.hardware["device"] != "CPU" for record in gpu.recorded("ledger").records
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 1}',
        '{"schema": 1, "schema": 1}',
        "[" * 100_000,
        b"\xff\xfe",
        {"schema": 9},
        {"section": "steps"},
        {"hardware": None},
        {"hardware": {"device": "x", "memory_bytes": "many"}},
        {"hardware": {"device": 7, "memory_bytes": 1}},
        {"versions": {}},
        {"date": 20270102},
        {"rows": None},
        {"rows": [1]},
        {"rows": [{"key": "a"}]},
        {"rows": [{"key": "a", "outcome": "measured", "numbers": 3}]},
        {"rows": [{"key": "a", "outcome": "measured", "numbers": {"settings": 3}}]},
        {"rows": [{"key": ["a"], "outcome": "measured", "numbers": {}}]},
        {"rows": [{"key": 7, "outcome": "measured", "numbers": {}}]},
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_damaged_record_costs_one_sentence_and_the_others_are_read(tmp_path, text):
    write(tmp_path, "ledger", {"a": {"n": 1}}, "good")
    path = write(tmp_path, "ledger", {"a": {"n": 1}}, "bad", **(text if isinstance(text, dict) else {}))
    if not isinstance(text, dict):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = gpu.recorded("ledger", tmp_path)
    assert len(found.records) == 1 and len(found.problems) == 1
    assert (
        found.problems[0].startswith("bad/ledger.json is not read: ")
        and str(tmp_path) not in found.problems[0]
    )
    assert found.problems[0] in str(found.beside(double, "n", "×"))


def test_a_row_that_a_formula_cannot_read_costs_a_sentence_too(tmp_path):
    rows = {"a": {"n": 1}, "b": {"n": 2, "model": "nobody/knows"}, "c": {"n": 3, "model": "llama-2-7b"}}
    write(tmp_path, "ledger", rows | {"d": {"n": float("nan")}, "e": {"n": "many"}, "f": {"n": [1]}})
    comparison = gpu.recorded("ledger", tmp_path).beside(lambda row: plan(row["model"]).peak, "n", "GB")
    assert [pair.key for pair in comparison.pairs] == ["c"]
    assert "a: no formula for it (KeyError: 'model')" in str(comparison) and "b: no formula for it" in str(
        comparison
    )


def test_rows_whose_values_are_lists_do_not_stop_a_lesson(tmp_path):
    write(tmp_path, "ledger", {"a": {"n": 1, "model": ["x"]}, "b": {"n": 2, "model": "x"}})
    comparison = gpu.recorded("ledger", tmp_path).beside(double, "n", "×", also=("model",))
    assert comparison.values("model") == {"x": 2} and "–" in str(comparison)


def test_a_verdict_follows_what_was_measured_where_it_was():
    def near(key, value):
        return abs(value - 10) < 1

    assert gpu.settle(near, {"a": 10, "b": 10.5}, {}) == "confirmed"
    assert gpu.settle(near, {"a": 10, "b": 20}, {}) == "depends"
    assert gpu.settle(near, {"a": 10, "b": 20}, {"a": 20}) == "refuted"
    assert gpu.settle(near, {"a": 10, "b": 20}, {"b": 10}) == "confirmed"
    assert gpu.settle(near, {"a": 10}, {"c": 20}) == "depends" == gpu.settle(near, {}, {})


def valve_of(folder, **numbers):
    rows = {
        "the valve": {"plain_died_at_length": 1024, "paged_reached_length": 4096, "losses_equal": True}
        | numbers
    }
    write(folder, "paging", rows)
    return gpu.valve_opened(gpu.recorded("paging", folder))


def test_the_valve_opened_if_the_paged_run_got_past_where_the_plain_one_died_with_the_same_losses(tmp_path):
    assert gpu.valve_opened(gpu.recorded("paging", tmp_path)) is None
    assert valve_of(tmp_path) is True and valve_of(tmp_path, paged_reached_length=1024) is True
    assert (
        valve_of(tmp_path, paged_reached_length=512) is False
        and valve_of(tmp_path, losses_equal=False) is False
    )
    assert valve_of(tmp_path, plain_died_at_length=None) is None, "a cap that nobody met shows nothing"

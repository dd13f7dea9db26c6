"""Broken files: each fault is reported once, with its kind and line, and nothing of a faulty line becomes a record.

In the files of tests/fixtures/broken_records, what must never be trained on says BROKEN, and the answers that must be
read begin with "sound".
"""

import json
import re
import tracemalloc
from pathlib import Path

import pytest

from labkit.data import read_jsonl, read_records
from labkit.data.own.findings import KINDS
from labkit.data.own.lines import MAX_LINE
from labkit.data.own.report import FaultyData

FILES = Path(__file__).resolve().parents[2] / "fixtures" / "broken_records"

FOUND = [  # file, sound records, findings in the order of the report: faults by line, then warnings by line
    ("assistant_first.jsonl", 2, [("wrong order", 2), ("wrong order", 3)]),
    ("blank_lines.jsonl", 0, [("empty file", 0)]),
    ("bom.jsonl", 2, []),
    ("bom_alone.jsonl", 0, [("empty file", 0)]),
    ("bom_crlf_quotes.csv", 2, []),
    ("bom_inside.jsonl", 2, [("not JSON", 2)]),
    ("column_twice.csv", 0, [("duplicate column", 1)]),
    ("comma_after_lines.jsonl", 1, [("trailing comma", 1), ("trailing comma", 2)]),
    ("content_of_parts.jsonl", 2, [("wrong type", 2), ("wrong type", 3), ("wrong type", 4)]),
    (
        "control_characters.jsonl",
        4,
        [("control character", 2), ("control character", 3), ("control character", 4)],
    ),
    ("conversations.jsonl", 0, [("unknown fields", 1)]),
    ("cr_alone.csv", 0, [("broken quotes", 1)]),
    ("cr_alone.jsonl", 0, [("not JSON", 1)]),
    ("crlf.jsonl", 2, []),
    ("csv_in_jsonl.jsonl", 0, [("not JSON", 1), ("not JSON", 2)]),
    ("cut_off.jsonl", 2, [("not JSON", 3)]),
    ("damaged_text.jsonl", 4, [("damaged text", 2), ("damaged text", 3), ("damaged text", 4)]),
    ("duplicate_key.jsonl", 2, [("duplicate key", 2)]),
    ("duplicate_key_inside.jsonl", 2, [("duplicate key", 2)]),
    ("duplicates.jsonl", 5, [("duplicate", 3), ("duplicate", 4), ("two answers", 5)]),
    ("empty.jsonl", 0, [("empty file", 0)]),
    ("empty_answer.jsonl", 2, [("empty completion", 2), ("empty completion", 3)]),
    ("empty_completion.csv", 1, [("empty completion", 3), ("empty completion", 4)]),
    ("empty_completion.jsonl", 2, [("empty completion", 2), ("empty completion", 3)]),
    ("empty_prompt.jsonl", 3, [("empty prompt", 2), ("empty prompt", 3)]),
    ("empty_text.jsonl", 1, [("empty completion", 2), ("empty completion", 3)]),
    ("gzip.jsonl", 0, [("not text", 0)]),
    ("half_a_character.jsonl", 2, [("not UTF-8", 2)]),
    ("header_alone.csv", 0, [("empty file", 0)]),
    ("json_in_csv.csv", 0, [("missing column", 1)]),
    ("latin_1.jsonl", 2, [("not UTF-8", 2)]),
    ("list.json", 2, []),
    ("list_and_more.json", 1, [("not JSON", 2)]),
    ("list_cut_off.json", 2, [("not JSON", 4)]),
    ("list_of_texts.json", 0, [("not an object", 1), ("not an object", 2)]),
    ("list_on_one_line.jsonl", 2, []),
    ("list_with_comma_too_many.json", 2, [("trailing comma", 4)]),
    ("list_with_faults.json", 2, [("duplicate key", 3), ("not an object", 4)]),
    ("list_without_commas.json", 1, [("not JSON", 3)]),
    ("lone_surrogate.jsonl", 2, [("lone surrogate", 2)]),
    ("missing_column.csv", 0, [("missing column", 1)]),
    ("missing_field.jsonl", 2, [("missing field", 2), ("missing field", 3), ("missing field", 4)]),
    ("mixed_forms.jsonl", 2, [("mixed forms", 2), ("mixed forms", 4)]),
    ("nested_too_deeply.jsonl", 2, [("not JSON", 2)]),
    ("no_answer.jsonl", 2, [("wrong order", 2), ("wrong order", 3), ("wrong order", 4)]),
    ("no_header.csv", 0, [("missing column", 1)]),
    (
        "no_objects.jsonl",
        2,
        [("not an object", 2), ("not an object", 3), ("not an object", 4), ("not an object", 5)],
    ),
    ("not_a_number.jsonl", 2, [("not a number", 2), ("not a number", 3)]),
    ("no_value.jsonl", 2, [("not JSON", 2)]),
    ("nul_bytes.csv", 2, [("NUL byte", 3)]),
    ("nul_bytes.jsonl", 2, [("NUL byte", 2)]),
    ("nul_escaped.jsonl", 2, [("NUL byte", 2)]),
    ("number_too_long.jsonl", 2, [("not JSON", 2)]),
    ("other_fields.jsonl", 0, [("unknown fields", 1), ("unknown fields", 2)]),
    ("over_several_lines.jsonl", 2, [("not JSON", 2), ("not JSON", 3), ("not JSON", 4), ("not JSON", 5)]),
    ("parquet.jsonl", 0, [("not text", 0)]),
    ("quote_in_the_middle.csv", 1, [("broken quotes", 3)]),
    ("quote_not_closed.csv", 1, [("broken quotes", 3)]),
    ("ragged.csv", 2, [("ragged row", 3), ("ragged row", 4)]),
    ("semicolons.csv", 0, [("wrong delimiter", 1)]),
    ("single_quotes.jsonl", 2, [("not JSON", 2)]),
    ("spreadsheet.csv", 0, [("not text", 0)]),
    ("system_in_the_middle.jsonl", 2, [("wrong order", 2)]),
    ("tab_in_a_text.jsonl", 2, [("not JSON", 2)]),
    ("tabs.csv", 0, [("wrong delimiter", 1)]),
    ("trailing_comma.jsonl", 2, [("trailing comma", 2)]),
    ("two_forms.jsonl", 2, [("two forms", 2), ("two forms", 3)]),
    ("two_on_a_line.jsonl", 2, [("not JSON", 2)]),
    ("two_users.jsonl", 2, [("same role twice", 2)]),
    ("utf_16.jsonl", 0, [("not UTF-8", 0)]),
    ("utf_16_without_bom.csv", 0, [("not UTF-8", 0)]),
    ("windows_1252_header.csv", 0, [("not UTF-8", 1)]),
    ("windows_1252_quotes.csv", 2, [("not UTF-8", 3)]),
    ("wrong_calls.jsonl", 2, [("wrong calls", 2), ("wrong calls", 3), ("wrong calls", 4), ("wrong type", 5)]),
    (
        "wrong_messages.jsonl",
        2,
        [
            ("wrong messages", 2),
            ("wrong messages", 3),
            ("wrong messages", 4),
            ("wrong messages", 5),
            ("wrong messages", 6),
        ],
    ),
    ("wrong_role.jsonl", 2, [("wrong role", 2), ("wrong role", 3)]),
    ("wrong_types.jsonl", 2, [("wrong type", 2), ("wrong type", 3), ("wrong type", 4), ("wrong type", 5)]),
]


@pytest.mark.parametrize(("name", "n_sound", "found"), FOUND, ids=[row[0] for row in FOUND])
def test_a_broken_file_is_reported_fault_by_fault_and_only_its_sound_records_are_returned(
    name, n_sound, found
):
    records, report = read_records(FILES / name, faulty="leave out")
    assert [(one.kind, one.line) for one in report.faults + report.warnings] == found
    assert "BROKEN" not in json.dumps(records)
    assert len(records) == len(report.lines) == report.n_records == n_sound
    answers = [r["messages"][-1]["content"] if "messages" in r else r["completion"] for r in records]
    assert all(answer.startswith("sound") for answer in answers)
    for one in report.faults + report.warnings:
        assert one.found and one.allowed and one.advice and one.path == str(FILES / name)
        assert f"{one.kind} (" in str(report) and (f"line {one.line} of" in str(one)) == (one.line > 0)


@pytest.mark.parametrize("name", sorted({name for name, _, found in FOUND if found}))
def test_a_faulty_file_raises_unless_its_faults_are_left_out_on_purpose(name):
    _, report = read_records(FILES / name, faulty="leave out")
    if not report.faults:
        assert read_records(FILES / name)[1].warnings == report.warnings
        return
    with pytest.raises(FaultyData, match=re.escape(report.faults[0].found)) as caught:
        read_records(FILES / name)
    assert caught.value.report.faults == report.faults
    with pytest.raises(ValueError, match=f"has {report.n_faults} faults?\n"):
        report.check()


def test_every_broken_file_is_in_the_table():
    assert sorted(path.name for path in FILES.iterdir()) == sorted(row[0] for row in FOUND)


def test_every_kind_of_finding_about_one_file_is_found_in_some_file():
    of_the_reader = {"line too long", "too long", "cannot be encoded"}  # below, and in test_reading
    of_two_files = {"leak", "near leak", "class in one split"}  # in test_leaks
    assert {kind for row in FOUND for kind, _ in row[2]} == KINDS.keys() - of_the_reader - of_two_files


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gzip.jsonl", "gunzip"),
        ("spreadsheet.csv", "export the sheet as CSV"),
        ("utf_16.jsonl", "iconv -f UTF-16 "),
        ("latin_1.jsonl", "if 'ü' is meant, .* iconv -f WINDOWS-1252"),
        ("windows_1252_quotes.csv", "if '’' is meant"),
        ("other_fields.jsonl", r"columns=\('instruction', 'output'\)"),
        ("conversations.jsonl", "rename 'conversations' to 'messages'"),
        ("wrong_role.jsonl", "rename it to 'user'"),
        ("missing_column.csv", r"columns=\('Prompt', 'completion'\)"),
        ("json_in_csv.csv", "named .jsonl"),
        ("csv_in_jsonl.jsonl", "named .csv"),
        ("cr_alone.csv", "LF or CRLF"),
        ("tab_in_a_text.jsonl", r"write a tab as \\t"),
        ("wrong_types.jsonl", "convert it to a text"),
    ],
)
def test_the_advice_fits_what_was_probably_done(name, advice):
    assert re.search(advice, read_records(FILES / name, faulty="leave out")[1].faults[0].advice)


def test_what_is_not_read_behind_a_fault_is_said():
    for name, message in (
        ("quote_in_the_middle.csv", r"what stands after line 3 is not read \(1 line\)"),
        ("list_without_commas.json", "what stands behind it is not read"),
        ("list_cut_off.json", "what stands behind it is not read"),
    ):
        (fault,) = read_records(FILES / name, faulty="leave out")[1].faults
        assert re.search(message, fault.found)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_of_100_mb_is_named_and_never_held_as_a_whole(tmp_path, suffix):
    path = tmp_path / f"long{suffix}"
    first, last = {
        ".jsonl": ('{"prompt": "a", "completion": "sound"}\n{"prompt": "', '", "completion": "b"}\n'),
        ".csv": ("prompt,completion\na,sound\n", ",b\n"),
    }[suffix]
    with open(path, "w", encoding="utf-8") as file:
        file.write(first)
        for _ in range(100):
            file.write("BROKEN " * 142_858)
        file.write(last)
        file.write(
            '{"prompt": "a b", "completion": "sound too"}\n' if suffix == ".jsonl" else "a b,sound too\n"
        )
    tracemalloc.start()
    try:
        records, report = read_records(path, faulty="leave out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    long, *others = report.faults
    assert (long.kind, long.line) == ("line too long", 2 if suffix == ".jsonl" else 3)
    assert "has 100,000,6" in long.found
    if suffix == ".jsonl":
        assert [r["completion"] for r in records] == ["sound", "sound too"] and not others
    else:  # a quote may have been opened in it
        assert [r["completion"] for r in records] == ["sound"]
        assert [one.found for one in others] == ["is too long; what stands after line 3 is not read (1 line)"]
    assert peak < 4 * MAX_LINE


def test_of_a_thousand_faults_few_are_shown_and_all_are_counted(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + "BROKEN\n" * 2500, "utf-8")
    _, report = read_records(path, faulty="leave out")
    assert report.n_faults == report.counts["not JSON"] == 2500 and len(report.faults) == 1000
    assert (
        "not JSON (2,500):" in str(report) and "… and 2,497 more" in str(report) and len(str(report)) < 1000
    )


def test_read_jsonl_reads_by_the_same_lines_and_refuses_the_first_bad_one():
    for name, message in (
        ("trailing_comma.jsonl", "line 2 of .* has a comma too many"),
        ("duplicate_key.jsonl", "line 2 of .* has the key 'completion' twice"),
        ("not_a_number.jsonl", "line 2 of .* has the value NaN"),
        ("latin_1.jsonl", "line 2 of .* has the byte 0xfc"),
    ):
        with pytest.raises(ValueError, match=message):
            read_jsonl(FILES / name)
    assert (
        read_jsonl(FILES / "bom.jsonl")
        == read_jsonl(FILES / "crlf.jsonl")
        == read_records(FILES / "bom.jsonl")[0]
    )

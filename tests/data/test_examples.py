"""The example files that are not tickets: as the datasheets say, verbatim, each once, and nothing across a split."""

import collections
import csv
import json
import re

import pytest

from labkit.data import read_records
from labkit.data.own.leaks import find_leaks, hold_out
from labkit.data.own.shingles import asked_and_answered
from labkit.data.splits import read_jsonl
from labkit.paths import data_folder
from tests.data.overlap import words

FIELDS = ("quantity", "unit", "ingredient", "preparation")


@pytest.fixture(scope="module")
def lines():
    return {
        split: read_jsonl(data_folder() / "ingredients" / f"{split}.jsonl") for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def reports():
    with (data_folder() / "trails" / "reports.csv").open(newline="", encoding="utf-8") as file:
        return [(row["report"], row["notice"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def messages():
    return read_jsonl(data_folder() / "library" / "twenty.jsonl")


def label(record):
    return json.loads(record["completion"])


def test_there_are_as_many_as_the_datasheets_say(lines, reports, messages):
    for name, file, n in (
        ("ingredients", "train.jsonl", len(lines["train"])),
        ("ingredients", "test.jsonl", len(lines["test"])),
        ("trails", "reports.csv", len(reports)),
        ("library", "twenty.jsonl", len(messages)),
    ):
        assert f"| `{file}` | {n} |" in (data_folder() / name / "README.md").read_text(encoding="utf-8")
    assert (
        len(lines["train"]) >= 150 <= 0.8 * len(reports) and len(lines["test"]) >= 40 and len(messages) == 20
    )


def test_completions_of_ingredient_lines_are_compact_json_with_the_same_fields(lines):
    for record in lines["train"] + lines["test"]:
        found = label(record)
        assert tuple(found) == FIELDS and found["ingredient"], record
        assert record["completion"] == json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        assert all(
            value is None or (isinstance(value, str) and value.strip() == value) for value in found.values()
        )
        assert record["prompt"].endswith("\n") and record["prompt"].count("\n") == 1


def test_ingredient_and_preparation_stand_in_their_line(lines):
    for record in lines["train"] + lines["test"]:
        line, found = record["prompt"].casefold(), label(record)
        parts = [found["ingredient"], *(found["preparation"] or "").split(", ")]
        assert [part for part in parts if part.casefold() not in line] == [], record


def test_quantities_are_numbers_and_those_in_digits_stand_in_their_line(lines):
    number = r"\d+( \d/\d|/\d|\.\d+)?(-\d+)?"
    signs = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3"}
    for record in lines["train"] + lines["test"]:
        quantity, line = label(record)["quantity"], record["prompt"]
        if quantity is None:
            continue
        assert re.fullmatch(number, quantity), record
        for sign, digits in signs.items():
            line = line.replace(sign, digits)
        is_pack = label(record)["unit"] in ("tin", "tub", "sachet") or "dozen" in line  # "a 7g sachet" is one
        if re.match(r"\s*\d", line) and not is_pack:
            assert quantity in " ".join(line.split()), record


def test_no_ingredient_of_test_is_one_of_train(lines):
    train, test = ({label(record)["ingredient"].casefold() for record in lines[split]} for split in lines)
    assert not train & test and len(test) == len(lines["test"])


def test_no_line_report_or_message_occurs_twice_or_nearly(lines, reports, messages):
    for texts in (
        [record["prompt"] for split in lines.values() for record in split],
        [report for report, _ in reports],
        [notice for _, notice in reports],
        [asked_and_answered(record)[0] for record in messages],
    ):
        assert len({" ".join(re.findall(r"\w+", text.lower())) for text in texts}) == len(texts)
        runs = [words(text, 3) for text in texts]
        near = [
            (texts[i], texts[j])
            for i in range(len(texts))
            for j in range(i)
            if runs[i] and len(runs[i] & runs[j]) > 0.5 * len(runs[i] | runs[j])
        ]
        assert near == []


def test_reports_are_written_and_not_filled_into_templates(lines, reports):
    beginnings = collections.Counter(" ".join(report.lower().split()[:3]) for report, _ in reports)
    assert beginnings.most_common(1)[0][1] == 1
    assert len({len(report.split()) for report, _ in reports}) > 20
    done = [label(record)["preparation"] for record in lines["train"] + lines["test"]]
    done = [preparation for preparation in done if preparation]
    assert len(set(done)) > 0.85 * len(done)


def test_a_message_does_not_name_its_desk(messages):
    answers = collections.Counter()
    for record in messages:
        asked, answer = asked_and_answered(record)
        answers[answer] += 1
        assert answer.rstrip("s") not in asked.lower()
    assert answers == {"loans": 7, "events": 7, "building": 6}


@pytest.mark.parametrize(
    "file, test, columns, form",
    [
        ("ingredients/train.jsonl", "ingredients/test.jsonl", None, "prompt/completion"),
        ("trails/reports.csv", None, ("report", "notice"), "prompt/completion"),
        ("library/twenty.jsonl", None, None, "messages"),
    ],
    ids=["ingredients", "trails", "library"],
)
def test_read_records_finds_no_fault_no_leak_and_no_duplicate(tokenizer, file, test, columns, form):
    records, report = read_records(
        data_folder() / file, tokenizer, test=test and data_folder() / test, columns=columns
    )
    assert report.form == form and report.n_faults == 0 and report.n_too_long == 0
    assert not {"leak", "near leak", "duplicate", "two answers", "damaged text"} & set(report.counts)
    train, held_out = (records, report.test_records) if test else hold_out(records)
    assert find_leaks(train, held_out) == [] and len(held_out) >= 4

"""No lesson says in its text what its own outputs contradict."""

import json
from pathlib import Path

import pytest

from labkit.lab.prose import ProseNumber, contradictions, prose_numbers

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))
# lessons whose text quotes results; the others leave all numbers to what a cell prints
QUOTING = {f"{n:02}" for n in range(1, 19)} | {"08b"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_marked_numbers_agree_with_the_outputs_beside_them(path):
    assert contradictions(path) == []


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.name.split("_")[0] in QUOTING], ids=lambda path: path.stem
)
def test_lessons_that_quote_results_mark_them(path):
    assert len(list(prose_numbers(json.loads(path.read_text(encoding="utf-8"))["cells"])))


def lesson(folder: Path, prose: str, output: str) -> Path:
    path = folder / "lesson.ipynb"
    stream = {"output_type": "stream", "name": "stdout", "text": output}
    cells = [
        {"cell_type": "code", "id": "run", "source": "", "outputs": [stream]},
        {"cell_type": "markdown", "id": "notice", "source": prose},
    ]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("prose", "output"),
    [
        ("4.13<!--= run--> bits", "at 4.127 bits"),
        ("4,149,504<!--= run--> numbers", "n = 4149504"),
        ("4.1<!--= run--> million", "4,149,504"),
        ("38<!--= run--> %", "share 0.381"),
        ("38<!--= run--> %", "38%"),
        ("**−0.01<!--= run-->** nats", "-0.011 ± 0.054"),
        ('0.5<!--= run "loss of B"--> nats', "loss of A 0.7\nloss of B 0.52"),
        ("5e-6<!--= run-->", "off by 5e-06"),
        ("no mark: 17", "nothing"),
    ],
)
def test_a_number_that_agrees_is_not_reported(tmp_path, prose, output):
    assert contradictions(lesson(tmp_path, prose, output)) == []


@pytest.mark.parametrize(
    ("prose", "output", "message"),
    [
        ("4.13<!--= run--> bits", "at 4.21 bits", "says 4.13; the output of run has no such number"),
        ("38<!--= run--> %", "0.391", "says 38"),
        ("38<!--= run--> nats", "0.38", "says 38"),
        ('0.7<!--= run "loss of B"-->', "loss of A 0.7\nloss of B 0.52", "after “loss of B” 0.52"),
        ('0.7<!--= run "loss of C"-->', "loss of A 0.7", "has no “loss of C”"),
        ("1.5<!--= walk-->", "1.5", "no cell of code"),
    ],
)
def test_a_number_that_contradicts_is_named_with_its_cell(tmp_path, prose, output, message):
    (found,) = contradictions(lesson(tmp_path, prose, output))
    assert "notice" in found and message in found


def test_a_mark_that_is_spoilt_is_an_error_and_not_skipped(tmp_path):
    for prose in ("4.13 <!--= run--> bits", "4.13<!--= -->", '4.13<!--= run "open-->'):
        with pytest.raises(ValueError, match="a mark stands right after a number"):
            contradictions(lesson(tmp_path, prose, "4.13"))


def test_fewer_digits_in_the_output_than_in_the_text_do_not_agree_by_chance():
    assert ProseNumber("a", "4.13", "b").agrees(4.1349) and not ProseNumber("a", "4.13", "b").agrees(4.1)

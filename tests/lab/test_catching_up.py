"""Beginning in the middle of a lesson: what a section needs is found, run, and played from tape where that is slow."""

import inspect
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

from labkit.files import sha256
from labkit.lab import catching_up, tapes
from labkit.lab.catching_up import Cell, catch_up, find_lesson, find_section, read_lesson
from labkit.lab.slicing import needed_cells, uses_of
from labkit.paths import data_folder
from labkit.training import evaluate
from labkit.training.history import History

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
LINE = re.compile(r'^# lab\.catch_up\("(\w+)", "([^"]+)"\)')


def test_a_section_needs_the_cells_that_bind_or_change_what_it_reads_and_no_others():
    above = [
        "import math",
        "a = 1",
        "b = math.pi",
        "unused = b",
        "runs = []",
        "runs.append(a)",
        "runs[0] = 2",
    ]
    assert needed_cells(above, ["print(runs)"]) == [0, 1, 4, 5, 6]
    assert needed_cells(above, ["print(b)"]) == [0, 2]


def test_what_is_bound_anew_is_not_wanted_above():
    assert needed_cells(["import math", "x = slow()", "x = 2"], ["print(x)"]) == [0, 2]
    assert needed_cells(["import math", "x = 1", "x = x + 1"], ["print(x)"]) == [0, 1, 2]


@pytest.mark.parametrize(
    "source",
    [
        "[x for x in ()]",
        "for x in ():\n    print(x)",
        "def f(x):\n    return x",
        "lambda x: x",
        "with open('f') as x:\n    print(x)",
        "try:\n    pass\nexcept ValueError as x:\n    print(x)",
    ],
)
def test_names_that_code_brings_itself_are_not_needed(source):
    assert "x" not in uses_of(source).needs


def test_what_a_function_reads_is_needed_where_it_is_defined():
    assert uses_of("def f():\n    return [y + z for y in w]").needs == {"z", "w"}


def test_training_changes_the_model_that_it_is_given():
    cells = ["import labkit", "model = load()", "history = labkit.train(model)", "labkit.merge(model)"]
    assert needed_cells(cells, ["model(1)"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_line_that_catches_up_stands_in_its_section(path: Path):
    cells = read_lesson(path)
    given = nbformat.read(path, 4).cells
    for n, cell in enumerate(given):
        if found := LINE.match(cell.source if cell.cell_type == "code" else ""):
            assert find_lesson(found[1]) == path
            first, last = find_section(cells, found[2], path.stem)
            following = next(c for c in given[n + 1 :] if c.cell_type == "code")
            assert following.id in {c.name for c in cells[first:last]}


def test_a_lesson_or_a_section_that_is_not_there_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="there are: 00_start_here, 01_why_peft"):
        catch_up("99", "1")
    with pytest.raises(ValueError, match="its sections are: Cold open"):
        catch_up("02", "77")
    assert find_lesson("08").stem == "08_qlora_finetune" and find_lesson("08b").stem == "08b_your_data"


def test_asserts_checks_and_answers_of_the_lesson_are_left_out():
    source = "assert False\nlab.check.f(f)\ncheck.g(g)\nprediction.reveal('a', 'b')\nx = 1"
    namespace: dict = {}
    assert not catching_up.run(Cell("c", source, "1"), "lesson", namespace) and namespace["x"] == 1


def test_functions_that_it_made_have_their_source():
    namespace: dict = {}
    catching_up.run(Cell("c", "assert True\n\n\ndef f():\n    return 1\n", "1"), "lesson", namespace)
    assert inspect.getsource(namespace["f"]) == "def f():\n    return 1\n"


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A tape of a cell that trains twice and generates; the weights of the second run were too large to keep."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    recorder = tapes.Recorder()
    train = recorder.make("train", lambda model: History(stopped="finished"))
    small, large = nn.Linear(2, 2), nn.Linear(64, 64)
    train(small)
    train(large)
    recorder.make("generate", lambda: ["a text"])()
    recorder.write(tmp_path / "catch_up" / "lesson" / "cell.json", "the source", at_most=100)
    return small


def test_a_tape_gives_back_histories_texts_and_weights_and_nan_for_what_it_lacks(recorded):
    tape = tapes.find_tape("lesson", "cell", "the source\n")
    fresh, other = nn.Linear(2, 2), nn.Linear(64, 64)
    assert tape.play("train", (fresh,)) == History(stopped="finished")
    assert torch.equal(fresh.weight, recorded.weight.half().float())
    tape.play("train", (other,))
    assert other.weight.isnan().all()
    assert tape.play("generate", ()) == ["a text"]
    with pytest.raises(LookupError, match="make catch-up"):
        tape.play("generate", ())


def test_a_tape_plays_for_the_source_that_it_was_made_from_and_for_the_same_shapes(recorded):
    assert tapes.find_tape("lesson", "cell", "another source") is None
    assert tapes.find_tape("lesson", "other", "the source") is None
    with pytest.raises(LookupError, match="other shapes"):
        tapes.find_tape("lesson", "cell", "the source").play("train", (nn.Linear(3, 3),))


def test_slow_calls_are_themselves_again_after_a_cell_whatever_happens():
    namespace = {"generate": evaluate.generate}
    fake = tapes.in_place_of_slow_calls(namespace, lambda name, function: lambda *_: name)
    with pytest.raises(ZeroDivisionError), fake:
        assert namespace["generate"]() == evaluate.generate() == "generate"
        exec("from labkit.training.evaluate import generate as imported_here", namespace)
        1 / 0  # noqa: B018
    assert namespace["generate"] is evaluate.generate is tapes.SLOW["generate"]
    assert namespace["imported_here"] is evaluate.generate


def test_committed_recordings_are_small_and_are_what_their_checksums_say():
    folder = data_folder() / "catch_up"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {
        p.relative_to(folder).as_posix(): p
        for p in folder.rglob("*")
        if p.suffix in (".json", ".safetensors")
    }
    assert {name: sha256(path) for name, path in files.items()} == listed
    assert sum(path.stat().st_size for path in files.values()) < 6e6


def run_section(lesson: str, section: str) -> str:
    """From nothing: the first cell, the line that catches up, and the cells of the section."""
    cells = read_lesson(find_lesson(lesson))
    first, last = find_section(cells, section, lesson)
    namespace: dict = {"__name__": "__main__"}
    exec(cells[0].source, namespace)
    catch_up(lesson, section, namespace)
    for cell in cells[first:last]:
        exec(compile(cell.source, cell.name, "exec"), namespace)
    return cells[first].section


@pytest.mark.slow
@pytest.mark.parametrize(("lesson", "section"), [("04", "7"), ("09", "7"), ("15", "5"), ("18", "6")])
def test_a_section_runs_on_what_it_caught_up_with(lesson, section, monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_STATIC", "1")
    title = run_section(lesson, section)
    assert f"{title}: " in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_fresh_kernel_one_line_is_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_STATIC", "1")
    cells = read_lesson(find_lesson("02"))
    first, last = find_section(cells, "8", "02")
    sources = [cells[0].source, 'lab.catch_up("02", "8")', *(cell.source for cell in cells[first:last])]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (said,) = notebook.cells[1].outputs
    assert re.search(r"\d+ of \d+ cells above it have run, in \d+ s", said["text"])

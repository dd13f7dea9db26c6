"""Copies of the lessons for students and teachers, and assignments for nbgrader: made of every lesson as it is."""

import ast
import copy as copying
import functools
import runpy
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from labkit import lab
from labkit.lab import check
from labkit.lab.check.compare import GRADING
from tests.short_lesson import time_a_step_once

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
classroom = runpy.run_path(str(ROOT / "scripts" / "make_classroom.py"))

from classroom import assignments, copies, exercises  # scripts/ is on the path now  # noqa: E402

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@functools.cache
def read_once(path: Path):
    return nbformat.read(path, 4)


def read(path: Path):
    """The lesson, to be changed at will."""
    return copying.deepcopy(read_once(path))


def code_of(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def solved(lesson) -> list:
    """The exercises with a check."""
    found = [exercises.read_exercise(cell) for cell in lesson.cells if exercises.has_exercise(cell)]
    return [exercise for exercise in found if exercise.check]


@every_lesson
def test_an_assignment_runs_without_its_lesson_and_its_own_solutions_pass(path: Path, capsys):
    lesson = read(path)
    assignment = assignments.make_assignment(lesson)
    kinds = [c.metadata.get("nbgrader", {}) for c in code_of(assignment)]
    least = 2 if path.stem.startswith("18") else 3  # the capstone joins what others taught
    assert len(solved(lesson)) == sum(k["solution"] for k in kinds) == sum(k["grade"] for k in kinds) >= least
    names = [kind["grade_id"] for kind in kinds]
    assert len(set(names)) == len(names)
    namespace: dict = {}
    for cell in code_of(assignment):
        exec(cell.source, namespace)


@every_lesson
def test_a_students_copy_parses_and_holds_no_solution_no_output_and_no_open_answer(path: Path):
    lesson = read(path)
    copy = copies.student_copy(lesson, "../../notebooks")
    nbformat.validate(copy)
    for cell in code_of(copy):
        ast.parse(cell.source)
        assert not cell.outputs and cell.execution_count is None and "SOLUTION" not in cell.source
        if ".reveal(" in cell.source:
            assert cell.metadata["jupyter"]["source_hidden"], cell.id
    stubs = [cell for cell in code_of(copy) if exercises.STUB in cell.source]
    assert len(stubs) == len(solved(lesson))
    for cell, exercise in zip(stubs, solved(lesson)):
        assert cell.metadata["tags"] == ["raises-exception"]  # Run All goes on
        lines = {line.strip() for line in cell.source.splitlines()}
        stays = {line.strip() for line in exercise.stub.splitlines() + exercise.rest.splitlines()}
        assert not [line for line in exercise.solution_lines if line in lines - stays]
    for cell in copy.cells:
        if cell.cell_type == "markdown" and "**Quiz.**" in cell.source:
            answers = cell.source.count("<details><summary>Answer")
            assert answers >= 3 and answers == cell.source.count("</details>")


@every_lesson
def test_only_order_folds_and_stubs_tell_a_students_code_from_the_lessons(path: Path):
    lesson = read(path)
    copy = copies.student_copy(lesson)

    def lines(notebook, leave_out=()):
        source = "\n".join(c.source for c in code_of(notebook) if not c.id.endswith("-go-on"))
        return sorted(line for line in source.splitlines() if line.strip() and line.strip() not in leave_out)

    for cell in lesson.cells:
        if exercises.has_exercise(cell):
            cell.source = cell.source.replace((found := exercises.read_exercise(cell)).solution, found.stub)
    assert lines(copy) == lines(lesson)


@every_lesson
def test_a_lesson_goes_on_below_an_exercise_that_is_not_solved(path: Path, capsys, monkeypatch):
    def stub(*_):
        raise NotImplementedError("your code here")

    for cell in code_of(copies.student_copy(read(path))):
        if cell.id.endswith("-go-on"):
            checker = getattr(check, cell.source.split("lab.check.")[1].split(",")[0])
            with pytest.raises(check.NotYet, match="has the stub been filled in"):
                checker(stub)
            ours = lab.yours_or_ours(checker, stub)
            assert "yours does not pass yet" in capsys.readouterr().out
            checker(ours)
            assert lab.yours_or_ours(checker, ours) is ours
            monkeypatch.setenv(GRADING, "yes")
            assert lab.yours_or_ours(checker, stub) is stub, "in grading there is nothing to borrow"
            monkeypatch.delenv(GRADING)


@every_lesson
def test_a_teachers_copy_has_solutions_outputs_minutes_and_the_mistakes_that_checks_name(path: Path):
    lesson = read(path)
    copy = copies.teacher_copy(lesson)
    nbformat.validate(copy)
    assert [c.source for c in code_of(copy)] == [c.source for c in code_of(lesson)]
    assert [c.outputs for c in code_of(copy)] == [c.outputs for c in code_of(lesson)]
    text = "\n".join(cell.source for cell in copy.cells if cell.cell_type == "markdown")
    assert text.count("What `") == len(solved(lesson)) and "**Minutes by section**" in text
    for cell in copy.cells:
        if "What `" in cell.source:
            assert cell.source.count("\n- ") >= 2, cell.source
    if path.stem.startswith("02"):
        assert text.count("Ask for hands") == text.count("← right") > 3


def test_links_lead_to_the_same_files_from_another_folder(tmp_path: Path):
    assert copies.relink("[a](../docs/x.md) [b](https://c.org) [d](#e)", "../../notebooks") == (
        "[a](../../docs/x.md) [b](https://c.org) [d](#e)"
    )
    folder = tmp_path / "deep" / "student"
    copies.write_copies("student", [ROOT / "notebooks" / "16_production_pipeline.ipynb"], folder)
    text = (folder / "16_production_pipeline.ipynb").read_text()
    links = [part.split(")")[0] for part in text.split("docs/interview.md](")[1:]]
    assert links and all((folder / link).resolve() == ROOT / "docs" / "interview.md" for link in links)


def test_what_a_student_has_written_is_never_written_over(tmp_path: Path):
    copies.write_copies("student", LESSONS[:2], tmp_path)
    theirs = tmp_path / LESSONS[0].name
    theirs.write_text("my work")
    (tmp_path / LESSONS[1].name).unlink()
    assert copies.write_copies("student", LESSONS[:2], tmp_path) == [tmp_path / LESSONS[1].name]
    assert theirs.read_text() == "my work"


def test_an_exercise_with_a_missing_mark_or_without_a_check_is_an_error_that_names_the_cell():
    def cell(source):
        return nbformat.v4.new_code_cell(source, id="the-cell")

    with pytest.raises(ValueError, match=r"the-cell has a ### BEGIN"):
        exercises.read_exercise(cell("def f():\n    ### BEGIN SOLUTION\n    return 1\n\n\nlab.check.f(f)"))
    with pytest.raises(ValueError, match=r"the-cell has no call of lab\.check"):
        exercises.read_exercise(cell("def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"))


@pytest.mark.slow
def test_a_students_copy_runs_to_its_end_and_stops_only_at_stubs(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LABKIT_STATIC", "1")
    copies.write_copies("student", [ROOT / "notebooks" / "00_start_here.ipynb"], tmp_path)
    copy = time_a_step_once(nbformat.read(tmp_path / "00_start_here.ipynb", 4))
    NotebookClient(copy, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in code_of(copy):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if exercises.STUB in cell.source:
            (error,) = errors
            assert error.ename == "NotYet" and error.traceback == [f"Not yet. {error.evalue}"]
            assert "has the stub been filled in" in error.evalue
        else:
            assert not errors


def test_make_student_and_make_teacher_name_a_script_that_is_there(tmp_path: Path, capsys):
    makefile = (ROOT / "Makefile").read_text()
    for kind, place in (("student", "student"), ("teacher", "teacher"), ("nbgrader", "classroom")):
        assert f"scripts/make_classroom.py {kind} build/{place}" in makefile
    classroom["main"]("student", tmp_path / "copies")
    assert f"{len(LESSONS)} notebooks written" in capsys.readouterr().out
    classroom["main"]("student", tmp_path / "copies")
    assert f"0 notebooks written; {len(LESSONS)} were there" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "copies")

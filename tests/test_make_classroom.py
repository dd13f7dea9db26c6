"""Assignments for nbgrader: made of every lesson, complete in themselves, accepted by nbgrader where it is installed."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
classroom = runpy.run_path(str(ROOT / "scripts" / "make_classroom.py"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_an_assignment_runs_without_its_lesson_and_its_own_solutions_pass(path: Path, capsys):
    lesson = nbformat.read(path, 4)
    assignment = classroom["make_assignment"](lesson)
    exercises = sum("### BEGIN SOLUTION" in cell.source for cell in lesson.cells)
    kinds = [c.metadata.get("nbgrader", {}) for c in assignment.cells if c.cell_type == "code"]
    assert exercises == sum(kind["solution"] for kind in kinds) == sum(kind["grade"] for kind in kinds) >= 3
    names = [kind["grade_id"] for kind in kinds]
    assert len(set(names)) == len(names)
    namespace: dict = {}
    for cell in assignment.cells:
        if cell.cell_type == "code":
            exec(cell.source, namespace)


@pytest.mark.slow
def test_nbgrader_makes_student_copies_without_a_solution(tmp_path: Path):
    if importlib.util.find_spec("nbgrader") is None:
        pytest.skip("nbgrader is not installed; `make classroom` installs it")
    classroom["main"](tmp_path)
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    }  # it calls alembic by name
    for lesson in ("02_lora_from_scratch", "10_memory_breakdown"):
        command = [shutil.which("nbgrader", path=str(bin_folder)), "generate_assignment", lesson]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        student = nbformat.read(tmp_path / "release" / lesson / f"{lesson}.ipynb", 4)
        assert sum("raise NotImplementedError()" in cell.source for cell in student.cells) == 5
        assert not any("SOLUTION" in cell.source for cell in student.cells)

"""nbgrader's assignments: of each lesson its exercises, and nothing else, because grading runs all of it for everybody.

An exercise of a lesson is one cell. nbgrader wants two: a *solution cell*, which students fill, and a locked *test
cell*, which gives the points.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from classroom.exercises import STUB, has_exercise, read_exercise

KERNEL = "labkit-grading"
SETTINGS = f'''"""Settings of this course for nbgrader; `docs/teach/classroom.md` of the lab says what they protect from."""

import os
from pathlib import Path

here = Path(__file__).resolve().parent
os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(here), os.environ.get("JUPYTER_PATH")]))

c = get_config()
c.CourseDirectory.course_id = "labkit"
c.ClearSolutions.code_stub = {{"python": {STUB!r}}}
# grading runs what students wrote in a kernel of its own, with limits: `python -m labkit.lab.grading` explains
if "autograde" in __import__("sys").argv:
    c.ExecutePreprocessor.kernel_name = "{KERNEL}"
c.ExecutePreprocessor.timeout = 60  # seconds a cell; then it is interrupted, and the next one runs
c.ExecutePreprocessor.interrupt_on_timeout = True
c.ExecutePreprocessor.startup_timeout = 300  # a busy machine takes its time to load PyTorch
'''


def mark(name: str, **what: bool | int) -> dict:
    """nbgrader's metadata of a cell."""
    usual = {"grade": False, "solution": False, "locked": False, "task": False}
    return {"nbgrader": {"schema_version": 3, "grade_id": name, **usual, **what}}


def split_exercise(cell: NotebookNode) -> list[NotebookNode]:
    """The solution cell and the test cell of an exercise; what comes after the check needs the lesson, and goes.

    Raises:
        ValueError: there is no call of `lab.check` after the solution.
    """
    exercise = read_exercise(cell)
    test = mark(f"{exercise.check}-check", grade=True, locked=True, points=1)
    return [
        nbformat.v4.new_code_cell(exercise.solution, metadata=mark(exercise.check, solution=True)),
        nbformat.v4.new_code_cell(exercise.call, metadata=test),
    ]


def make_assignment(lesson: NotebookNode) -> NotebookNode:
    """The exercises of a lesson, each with the text before it, after the cell with the imports."""
    cells = lesson.cells
    imports = [
        line for c in cells if c.cell_type == "code" for line in c.source.splitlines() if is_import(line)
    ]
    made = [
        nbformat.v4.new_markdown_cell(f"{cells[0].source.splitlines()[0]}: exercises"),
        nbformat.v4.new_code_cell("\n".join(dict.fromkeys(imports)), metadata=mark("imports", locked=True)),
    ]
    for before, cell in itertools.pairwise(cells):
        if has_exercise(cell) and read_exercise(cell).check:  # an open experiment has no points
            if before.cell_type == "markdown":
                made.append(nbformat.v4.new_markdown_cell(before.source))
            made += split_exercise(cell)
    return nbformat.v4.new_notebook(cells=made, metadata=lesson.metadata)


def is_import(line: str) -> bool:
    """Is the line a whole import statement?"""
    return bool(re.match(r"(import \S|from \S+ import [^(])", line))


def write_course(lessons: list[Path], folder: Path) -> None:
    """Lay out a course folder for nbgrader: a source for each lesson, the settings, and the kernel that grades."""
    for path in lessons:
        place = folder / "source" / path.stem
        place.mkdir(parents=True, exist_ok=True)
        nbformat.write(make_assignment(nbformat.read(path, 4)), place / path.name)
    (folder / "nbgrader_config.py").write_text(SETTINGS, encoding="utf-8")
    kernel = folder / "kernels" / KERNEL
    kernel.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "labkit.lab.grading", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "grading", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")

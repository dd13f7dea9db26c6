"""nbgrader's assignments: of each lesson its exercises, and nothing else, because grading runs all of it for everybody.

An exercise of a lesson is one cell. nbgrader wants two: a *solution cell*, which students fill, and a locked *test
cell*, which gives the points.
"""

import ast
import itertools
import json
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from classroom.exercises import STUB, has_exercise, read_exercise
from labkit.lab.slicing import uses_of

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
    imports = [line for c in cells if c.cell_type == "code" for line in import_lines(c.source)]
    made = [
        nbformat.v4.new_markdown_cell(f"{cells[0].source.splitlines()[0]}: exercises"),
        nbformat.v4.new_code_cell("\n".join(dict.fromkeys(imports)), metadata=mark("imports", locked=True)),
    ]
    given: dict[str, str] = {}
    for before, cell in itertools.pairwise(cells):
        if has_exercise(cell) and read_exercise(cell).check:  # an open experiment has no points
            if before.cell_type == "markdown":
                made.append(nbformat.v4.new_markdown_cell(before.source))
            given |= (new := {n: text for n, text in definitions_for(cell, cells).items() if n not in given})
            made += [
                nbformat.v4.new_code_cell(text, metadata=mark(n, locked=True)) for n, text in new.items()
            ]
            made += split_exercise(cell)
    return nbformat.v4.new_notebook(cells=made, metadata=lesson.metadata)


def definitions_for(exercise: NotebookNode, cells: list[NotebookNode]) -> dict[str, str]:
    """{name: source} of what a solution takes from cells above it: functions and classes that are no exercise."""
    defined: dict[str, str] = {}
    for cell in cells[: cells.index(exercise)]:
        if cell.cell_type == "code" and not has_exercise(cell):
            for node in statements(cell.source):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    defined[node.name] = ast.get_source_segment(cell.source, node) or ""
    used = uses_of(read_exercise(exercise).solution).needs
    return {name: text for name, text in defined.items() if name in used}


def statements(source: str) -> list[ast.stmt]:
    """The statements of a cell; none of one with a magic in it, such as %matplotlib."""
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


def import_lines(source: str) -> list[str]:
    """The whole import statements of a cell, a line each; what stands in a string is none."""
    return [
        ast.unparse(node) for node in statements(source) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]


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

"""Lay out a course for nbgrader: for each lesson, its exercises as an assignment.

    python scripts/make_classroom.py build/classroom      # or: make classroom

An exercise of a lesson is one cell: a function with a solution region, and the call that checks it. nbgrader wants
two: a *solution cell*, which students fill, and a locked *test cell*, which gives the points. An assignment holds
the exercises and what they import, not the lesson, because grading executes all of it for each student.
"""

import itertools
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
CHECK = re.compile(r"^(?:lab\.)?check\.(\w+)\(.*\)$", re.M)
SETTINGS = """c = get_config()
c.CourseDirectory.course_id = "labkit"
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError()"}
c.ExecutePreprocessor.timeout = 120
"""


def mark(name: str, **what: bool | int) -> dict:
    """nbgrader's metadata of a cell."""
    usual = {"grade": False, "solution": False, "locked": False, "task": False}
    return {"nbgrader": {"schema_version": 3, "grade_id": name, **usual, **what}}


def split_exercise(cell: NotebookNode) -> list[NotebookNode]:
    """The solution cell and the test cell of an exercise; what comes after the check needs the lesson, and goes.

    Raises:
        ValueError: there is no call of `lab.check` after the solution.
    """
    _, _end, after = cell.source.partition("### END SOLUTION")
    check = CHECK.search(after)
    if not check:
        raise ValueError(f"the exercise in cell {cell.id} has no call of lab.check after its solution")
    name = check[1]
    solution = cell.source[: len(cell.source) - len(after) + check.start()].rstrip()
    return [
        nbformat.v4.new_code_cell(solution, metadata=mark(name, solution=True)),
        nbformat.v4.new_code_cell(
            check[0], metadata=mark(f"{name}-check", grade=True, locked=True, points=1)
        ),
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
        if cell.cell_type == "code" and "### BEGIN SOLUTION" in cell.source:
            if before.cell_type == "markdown":
                made.append(nbformat.v4.new_markdown_cell(before.source))
            made += split_exercise(cell)
    return nbformat.v4.new_notebook(cells=made, metadata=lesson.metadata)


def is_import(line: str) -> bool:
    """Is the line a whole import statement?"""
    return bool(re.match(r"(import \S|from \S+ import [^(])", line))


def main(folder: Path) -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        place = folder / "source" / path.stem
        place.mkdir(parents=True, exist_ok=True)
        nbformat.write(make_assignment(nbformat.read(path, 4)), place / path.name)
    (folder / "nbgrader_config.py").write_text(SETTINGS)
    print(f"{folder}: now run `nbgrader generate_assignment 02_lora_from_scratch` there, or any other lesson")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

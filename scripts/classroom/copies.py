"""A student's and a teacher's copy of a lesson.

A student's copy has stubs for solutions, no outputs, and folds what gives an answer away. Whoever leaves an exercise
for later can go on: its cell says *Not yet* and does not stop *Run All*, what stands below the check is moved above it
unless it calls the stub, and a function that a later section calls is, until it passes, the course's own.

A teacher's copy keeps all and adds minutes, the choices of each prediction, and the wrong answers that a check names.
"""

import ast
import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from classroom import guide
from classroom.exercises import Exercise, apart, has_exercise, names_in, read_exercise, statements

HIDDEN = {"jupyter": {"source_hidden": True}}
LINK = re.compile(r"(\]\(|\b(?:src|href)=\")(?![a-z]+:|#|/)([^)\s\"]+)")
QUESTION = re.compile(r"(?=\([a-e]\) )")
ANSWER = re.compile(r"\s\*(?!\*)(.+)\*$", re.S)  # in italics, to the end
FOLDED = r"\n\n<details><summary>Answer</summary>\n\n\1\n\n</details>"
FOR_STUDENTS = """

> **Your copy.** Solutions are stubs, and answers are folded: click the bar at the left of a folded cell to open it, after you have chosen.
> An exercise that is not solved says *Not yet* and the lesson goes on without it. {kept}"""
KEPT = "This file is written once; what you write in it stays."
FOR_TEACHERS = "\n\n> **Teacher's copy**, with solutions. Students get the one that `make student` writes."


def student_copy(lesson: NotebookNode, links: str = "") -> NotebookNode:
    """The lesson as a student gets it.

    Args:
        lesson: as committed.
        links: what leads from the copy's folder to the lesson's, for links in the text.
    """
    cells = []
    for number, cell in enumerate(lesson.cells):
        if cell.cell_type != "code":
            cells.append(markdown(fold_quiz(relink(cell.source, links)), cell.id))
        elif has_exercise(cell):
            cells += stub_cells(cell, lesson.cells[number + 1 :])
        else:
            cells += fold_answer(cell)
    cells[0].source += FOR_STUDENTS.format(kept=KEPT)
    return nbformat.v4.new_notebook(cells=cells, metadata=lesson.metadata)


def fold_quiz(text: str) -> str:
    """A quiz that runs on, `(a) Question? *Answer.* (b) …`, with each answer folded."""
    blocks = text.split("\n\n")
    for number, block in enumerate(blocks):
        if block.startswith("**Quiz"):
            head, *asked = QUESTION.split(block)
            if asked and all(ANSWER.search(one.strip()) for one in asked):
                folded = [ANSWER.sub(FOLDED, one.strip()) for one in asked]
                blocks[number] = "\n\n".join([head.strip(), *folded])
    return "\n\n".join(blocks)


def stub_cells(cell: NotebookNode, later: list[NotebookNode]) -> list[NotebookNode]:
    """An exercise without its solution, such that the lesson below it runs."""
    exercise = read_exercise(cell)
    if not exercise.check:
        return [code(exercise.stub, cell.id, {"tags": ["raises-exception"]})]
    free, needs = apart(exercise.rest, exercise.given)
    wanted = set().union(*(words(c.source) for c in later if c.cell_type == "code"))
    bound = set().union(*(names_in(node, ast.Store) for node, _ in statements(free)))
    if not bound & wanted:
        free, needs = "", exercise.rest  # nothing below wants it: leave the order as it is
    call = f"{exercise.call}\n{needs}" if needs else exercise.call
    source = "\n\n\n".join(part for part in (exercise.stub, free, call) if part)
    made = [code(source, cell.id, {"tags": ["raises-exception"]})]
    if is_called(exercise, later):
        name = exercise.given
        made.append(
            code(
                f"{name} = lab.yours_or_ours(lab.check.{exercise.check}, {name})", f"{cell.id}-go-on", HIDDEN
            )
        )
    return made


def is_called(exercise: Exercise, later: list[NotebookNode]) -> bool:
    """Does a cell below use the student's function before it binds the name anew?"""
    for cell in later:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        if exercise.given in names_in(tree, ast.Load):
            return exercise.given not in names_in(tree, ast.Store)
        if exercise.given in names_in(tree, ast.Store):
            return False
    return False


def fold_answer(cell: NotebookNode) -> list[NotebookNode]:
    """The cell without outputs; from the statement on that reveals a prediction's answer, folded."""
    kept = {key: value for key, value in cell.metadata.items() if key in ("jupyter", "tags")}
    parts = statements(cell.source) if ".reveal(" in cell.source else []
    first = next((n for n, (node, _) in enumerate(parts) if reveals(node)), None)
    if first is None:
        return [code(cell.source, cell.id, kept)]
    # what only that statement needs (its reasons, a share to print) gives the answer away as well
    while first and isinstance(parts[first - 1][0], ast.Assign):
        first -= 1
    shown, folded = ("\n".join(text for _, text in part) for part in (parts[:first], parts[first:]))
    answer = code(folded.strip("\n"), f"{cell.id}-answer" if shown else cell.id, HIDDEN)
    return [code(shown, cell.id, kept), answer] if shown else [answer]


def reveals(node: ast.AST) -> bool:
    """Does the statement call `.reveal(…)`?"""
    return any(
        isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "reveal"
        for n in ast.walk(node)
    )


def teacher_copy(lesson: NotebookNode, links: str = "") -> NotebookNode:
    """The lesson with its outputs and solutions, and what a teacher wants beside them."""
    cells = []
    for cell in lesson.cells:
        copied = nbformat.from_dict(cell)
        if cell.cell_type == "markdown":
            copied.source = relink(cell.source, links)
        cells.append(copied)
        note = guide.of_exercise(cell) if has_exercise(cell) else guide.of_prediction(cell, lesson.cells)
        if note:
            cells.append(markdown(note, f"{cell.id}-teacher"))
    cells[0].source += FOR_TEACHERS
    cells.insert(1, markdown(guide.minutes_table(lesson), "teacher-minutes"))
    return nbformat.v4.new_notebook(cells=cells, metadata=lesson.metadata)


def relink(text: str, links: str) -> str:
    """Relative links in `text` as they must be from a folder from which `links` leads to the lesson's."""
    return (
        LINK.sub(lambda found: found[1] + os.path.normpath(os.path.join(links, found[2])), text)
        if links
        else text
    )


def words(source: str) -> set[str]:
    return set(re.findall(r"\w+", source))


def code(source: str, name: str, metadata: dict) -> NotebookNode:
    return nbformat.v4.new_code_cell(source, id=name[:64], metadata=metadata)


def markdown(source: str, name: str) -> NotebookNode:
    return nbformat.v4.new_markdown_cell(source, id=name[:64])


def write_copies(kind: str, lessons: list[Path], folder: Path) -> list[Path]:
    """Write the copies of `lessons` to `folder`; a student's file that is there already stays as it is.

    Args:
        kind: "student" or "teacher".
    """
    make = {"student": student_copy, "teacher": teacher_copy}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in lessons:
        place = folder / path.name
        if kind == "student" and place.exists():
            continue
        links = os.path.relpath(path.parent, folder)
        part = place.with_suffix(".part")
        nbformat.write(make(nbformat.read(path, 4), links), part)
        os.replace(part, place)
        written.append(place)
    return written

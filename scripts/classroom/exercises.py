"""The exercises of a lesson: a stub between two marks, then the call of a check.

    def merged_weight(W, A, B, alpha, r):
        ### BEGIN SOLUTION
        …
        ### END SOLUTION


    lab.check.merged_weight(merged_weight)

All copies are made from what `read_exercise` finds in such a cell.
"""

import ast
import re
from dataclasses import dataclass

from nbformat import NotebookNode

STUB = 'raise NotImplementedError("your code here")'
OPEN = "...  # your code here"  # of an open experiment, which has no function and no check
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
REGION = re.compile(rf"^([ \t]*){BEGIN}[ \t]*\n(.*?)^[ \t]*{END}[ \t]*$", re.M | re.S)
CHECK = re.compile(r"^(?:lab\.)?check\.(\w+)\((.*)\)$", re.M)


@dataclass(frozen=True)
class Exercise:
    """One exercise cell, in its parts.

    Attributes:
        check: the name in `lab.check`; empty for an open experiment, which is all `solution`.
        given: what is handed to the check, the name of the student's function.
        solution: the source up to the check, with the marks.
        call: the line of the check.
        rest: what comes after it in the cell.
    """

    check: str
    given: str
    solution: str
    call: str
    rest: str

    @property
    def stub(self) -> str:
        """The source up to the check, the solution taken out."""
        return REGION.sub(lambda found: found[1] + STUB if self.check else found[1] + OPEN, self.solution)

    @property
    def solution_lines(self) -> list[str]:
        """The lines of the solution that say something, without indentation."""
        lines = [line.strip() for found in REGION.finditer(self.solution) for line in found[2].splitlines()]
        return [line for line in lines if line]


def has_exercise(cell: NotebookNode) -> bool:
    """Is it a code cell with a solution in it?"""
    return cell.cell_type == "code" and BEGIN in cell.source


def read_exercise(cell: NotebookNode) -> Exercise:
    """The parts of an exercise cell.

    Raises:
        ValueError: the marks do not match, or no call of `lab.check` follows them.
    """
    if not cell.source.count(BEGIN) == cell.source.count(END) == len(REGION.findall(cell.source)):
        raise ValueError(f"the exercise in cell {cell.id} has a {BEGIN} without its {END}, or the reverse")
    before, _, after = cell.source.rpartition(END)
    found = CHECK.search(after)
    if not found and all(not match[1] for match in REGION.finditer(cell.source)):
        return Exercise("", "", cell.source, "", "")
    if not found:
        raise ValueError(f"the exercise in cell {cell.id} has no call of lab.check after its solution")
    solution = before + END + after[: found.start()].rstrip()
    return Exercise(found[1], found[2], solution, found[0], after[found.end() :].strip("\n"))


def names_in(node: ast.AST, context: type) -> set[str]:
    """The names that `node` reads (`ast.Load`) or binds (`ast.Store`, which includes defs and imports)."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}
    if context is ast.Store:
        found |= {
            n.name
            for n in ast.walk(node)
            if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
        }
        found |= {(n.asname or n.name).split(".")[0] for n in ast.walk(node) if isinstance(n, ast.alias)}
    return found


def statements(source: str) -> list[tuple[ast.stmt, str]]:
    """The top-level statements, each with its text and the comment lines above it."""
    lines, made, begin = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        made.append((node, "\n".join(lines[begin : node.end_lineno]).strip("\n")))
        begin = node.end_lineno
    return made


def apart(rest: str, given: str) -> tuple[str, str]:
    """What follows a check, as (what runs without the student's function, what needs it)."""
    needing, free, needs = {given}, [], []
    for node, text in statements(rest):
        if names_in(node, ast.Load) & needing:
            needing |= names_in(node, ast.Store)
            needs.append(text)
        else:
            free.append(text)
    return "\n".join(free), "\n".join(needs)

"""`lab.catch_up("08", "7")`: what section 7 of lesson 08 needs from the cells above it, in one line.

For whoever comes late, whose kernel died, or who wants one section only. It runs the cells that the section needs
(`labkit.lab.slicing`) in the notebook's own names, without their figures and asserts, and plays slow calls from tape
(`labkit.lab.tapes`) where there is one.
"""

import ast
import contextlib
import io
import json
import linecache
import time
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from labkit.checks import nearest
from labkit.lab.interactive import running_kernel
from labkit.lab.slicing import needed_cells
from labkit.lab.tapes import find_tape, playing
from labkit.paths import CHECKOUT


@dataclass(frozen=True)
class Cell:
    """A code cell: its name, its source, and the section (a heading of the second level) that it stands in."""

    name: str
    source: str
    section: str


def catch_up(lesson: str, section: str, namespace: dict[str, Any] | None = None) -> None:
    """Make what a section needs from the cells above it.

    Args:
        lesson: its number, "08", or its name.
        section: how its heading begins, "7" or "Explore".
        namespace: where to; the notebook's own names if it is None.

    Raises:
        ValueError: no such lesson or section; the message lists those that there are.
    """
    shell = getattr(running_kernel(), "shell", None)
    if namespace is None:
        namespace = shell.user_ns if shell else {}
    path = find_lesson(lesson)
    cells = read_lesson(path)
    first, last = find_section(cells, section, path.stem)
    above = cells[:first]
    chosen = needed_cells([c.source for c in above], [c.source for c in cells[first:last]])
    started, taped = time.monotonic(), 0
    for number in chosen:
        taped += run(above[number], path.stem, namespace)
    told = f"; {taped} from recorded results (data/catch_up)" if taped else ""
    print(
        f"{cells[first].section}: {len(chosen)} of {len(above)} cells above it have run, in "
        f"{time.monotonic() - started:.0f} s{told}. Go on below."
    )


def run(cell: Cell, lesson: str, namespace: dict[str, Any]) -> bool:
    """Run a cell without what it shows and asserts; True if slow calls came from tape."""
    tape = find_tape(lesson, cell.name, cell.source)
    with quietly(), playing(namespace, tape) if tape else contextlib.nullcontext():
        exec(code_of(cell, lesson), namespace)
    return tape is not None


def code_of(cell: Cell, lesson: str) -> CodeType:
    """The cell, compiled, without what is about the lesson's own numbers, or the reader's."""
    name = f"<{lesson}, {cell.name}>"
    tree = ast.fix_missing_locations(WithoutChecks().visit(ast.parse(cell.source)))
    # for inspect.getsource: lesson 17 writes functions of its cells to a file, for its ranks
    linecache.cache[name] = len(cell.source), None, cell.source.splitlines(keepends=True), name
    return compile(tree, name, "exec")


class WithoutChecks(ast.NodeTransformer):
    """Asserts are about the lesson's own numbers, which recorded ones only resemble; checks and answers are the reader's."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        function = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        theirs = function.startswith(("lab.check.", "check.")) or function.endswith(".reveal")
        return ast.copy_location(ast.Pass(), node) if theirs else node


@contextlib.contextmanager
def quietly():
    """No text, no figures."""
    import matplotlib.pyplot as plt

    before = set(plt.get_fignums())
    if running_kernel() is not None:
        from IPython.utils.capture import capture_output

        silence: Any = capture_output()
    else:
        silence = contextlib.redirect_stdout(io.StringIO())
    with silence:
        yield
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def find_lesson(lesson: str) -> Path:
    """The notebook of a lesson."""
    paths = {path.stem: path for path in sorted((CHECKOUT / "notebooks").glob("*.ipynb"))}
    found = [path for stem, path in paths.items() if stem == lesson or stem.split("_")[0] == str(lesson)]
    if not found:
        raise ValueError(
            f"lesson={lesson!r} is not here{nearest(str(lesson), paths)}; there are: {', '.join(paths)}"
        )
    return found[0]


def read_lesson(path: Path) -> list[Cell]:
    """The code cells of a lesson, without lines that catch up, and without empty ones."""
    cells, section = [], "Beginning"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            section = next(
                (line[3:] for line in source.splitlines()[::-1] if line.startswith("## ")), section
            )
        elif ast.parse(source).body:
            cells.append(Cell(cell["id"], source, section))
    return cells


def find_section(cells: list[Cell], section: str, lesson: str) -> tuple[int, int]:
    """The first code cell of a section, and the one after its last."""
    names = list(dict.fromkeys(cell.section for cell in cells[1:]))
    found = [name for name in names if name == section or name.startswith((f"{section} ", f"{section}:"))]
    if not found:
        raise ValueError(f"section={section!r} is not in {lesson}; its sections are: {'; '.join(names)}")
    numbers = [n for n, cell in enumerate(cells) if cell.section == found[0]]
    return max(1, numbers[0]), numbers[-1] + 1

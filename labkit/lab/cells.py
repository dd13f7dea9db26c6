"""When a cell needs another that has not run, say which one.

Somebody who opens a lesson in the middle, or runs cells out of order, gets Python's `NameError` or
`KeyError`, which names a variable and not a place. In a notebook, `watch` adds one sentence to it: the cells
above that have not run and that make what is missing, by their headings.
"""

import ast
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NAMED_CELLS = 3


@dataclass(frozen=True)
class CodeCell:
    """A code cell: its source, and the last heading above it."""

    source: str
    heading: str

    def makes(self, name: str | None, key: object = None) -> bool:
        """Does the cell bind `name`, or mention the constant `key`?"""
        try:
            nodes = list(ast.walk(ast.parse(self.source)))
        except SyntaxError:  # a magic, such as %time
            return False
        return (name is not None and name in bound_names(nodes)) or (
            key is not None and any(isinstance(node, ast.Constant) and node.value == key for node in nodes)
        )

    def __str__(self) -> str:
        first = next(line for line in self.source.splitlines() if line.strip())
        return f"under “{self.heading}”, the cell that begins with `{first.strip()[:60]}`"


def bound_names(nodes: list[ast.AST]) -> set[str]:
    """The names that code binds: by assignment, loop, `with`, import, `def`, `class`."""
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return names | {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}


def read_cells(notebook: Path) -> list[CodeCell]:
    """The code cells of a notebook, in order."""
    cells, heading = [], "the title"
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.strip():
            cells.append(CodeCell(source.strip(), heading))
        elif cell["cell_type"] == "markdown":
            headings = [line.lstrip("# ") for line in source.splitlines() if line.startswith("#")]
            heading = headings[-1] if headings else heading
    return cells


def find_notebook(namespace: dict[str, Any]) -> Path | None:
    """The file of the notebook that runs, where the front end tells: JupyterLab, Notebook, VS Code."""
    given = namespace.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    path = Path(given) if given else None
    if path is not None and not path.is_file():
        path = Path.cwd() / path.name  # a kernel's folder is the notebook's
    return path if path is not None and path.suffix == ".ipynb" and path.is_file() else None


def missing_from(error: BaseException) -> tuple[str | None, object]:
    """The name, or the key, that was not there."""
    if isinstance(error, NameError):
        return error.name, None
    return None, error.args[0] if error.args else None


def sentence(error: BaseException, cell: str, done: list[str], cells: list[CodeCell]) -> str | None:
    """Which cells to run before `cell`, or None if the error has another reason.

    Args:
        error: a `NameError` or `KeyError` that `cell` raised.
        cell: the source of the cell.
        done: the sources of the cells that have run.
        cells: those of the notebook; [] if it is not known.
    """
    if not cells:
        return "Has each cell above this one run? If not: Run ▸ Run All Above Selected Cell."
    ran = {source.strip() for source in done}
    sources = [one.source for one in cells]
    above = cells[: sources.index(cell.strip())] if cell.strip() in sources else cells
    left = [one for one in above if one.source not in ran]
    if not left:
        return None
    name, key = missing_from(error)
    wanted = [one for one in left if one.makes(name, key)] or left
    shown = "; ".join(str(one) for one in wanted[:NAMED_CELLS])
    more = f" (and {len(wanted) - NAMED_CELLS} more)" if len(wanted) > NAMED_CELLS else ""
    return (
        f"This cell needs another that has not run: {shown}{more}. "
        "Run that first, or all: Run ▸ Run All Above Selected Cell."
    )


def watch() -> None:
    """In a notebook: from now on, add that sentence to a `NameError` or `KeyError` of a cell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return

    def explain(
        shell: Any, kind: type, error: BaseException, trace: TracebackType, tb_offset: int | None = None
    ):
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        last = trace
        while last.tb_next is not None:
            last = last.tb_next
        history = shell.user_ns.get("In", [""])
        if last.tb_frame.f_globals is shell.user_ns:  # the cell itself, not a library below it
            notebook = find_notebook(shell.user_ns)
            text = sentence(error, history[-1], history[:-1], read_cells(notebook) if notebook else [])
            if text:
                print(text, file=sys.stderr)

    shell.set_custom_exc((NameError, KeyError), explain)

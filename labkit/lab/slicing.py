"""Which cells of a lesson does a section need? Found from the names that cells read, bind and change.

Walk up from the section. A cell belongs to what it needs if it binds a name that is still wanted, or changes the
object behind one: `results["x"] = …`, `runs.append(…)`, `labkit.merge(model)`. What that cell reads is wanted then.
A name that a cell binds without reading it is no longer wanted above.

This is a guess where an object changes behind a name that no line shows. `tests/lab/test_catching_up.py` runs
sections on what is found here.
"""

import ast
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field

CHANGES = {  # calls that change an argument even where their result is used
    "train",
    "merge",
    "unmerge",
    "add_lora",
    "add_qlora",
    "add_adapter",
    "quantize_model",
    "load_adapter",
    "attach_paging",
    "untie_embeddings",
}


@dataclass
class Uses:
    """The names that a piece of code needs from above, binds, and changes the objects of."""

    needs: set[str] = field(default_factory=set)
    binds: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)  # of what it binds, what it imports


def uses_of(source: str) -> Uses:
    """Of a cell: statement by statement, so that `x = 1; print(x)` needs no x."""
    found = Uses()
    add_block(ast.parse(source).body, found)
    return found


def add_block(block: list[ast.stmt], found: Uses) -> None:
    """Add what statements use, in the order in which they run."""
    for node in block:
        if isinstance(node, (ast.For, ast.While, ast.If, ast.With, ast.Try)):
            heads: list[ast.expr] = [getattr(node, name) for name in ("iter", "test") if hasattr(node, name)]
            heads += [item.context_expr for item in getattr(node, "items", [])]
            for head in heads:
                add(ast.Expr(head), found)
            bound = [
                getattr(node, "target", None),
                *(item.optional_vars for item in getattr(node, "items", [])),
            ]
            found.binds |= {n.id for t in bound if t for n in ast.walk(t) if isinstance(n, ast.Name)}
            add_block(node.body, found)
            for handler in getattr(node, "handlers", []):
                found.binds |= {handler.name} if handler.name else set()
                add_block(handler.body, found)
            add_block([*getattr(node, "orelse", []), *getattr(node, "finalbody", [])], found)
        else:
            add(node, found)


def add(node: ast.stmt, found: Uses) -> None:
    """Add what one simple statement uses."""
    reads, binds = names_of(node)
    changes = set(changed_by(node))
    found.needs |= (reads | changes) - found.binds
    found.binds |= binds
    found.changes |= changes
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        found.modules |= binds


def names_of(node: ast.stmt) -> tuple[set[str], set[str]]:
    """The outer names that a statement reads, also inside its functions and comprehensions, and those that it binds."""
    top = symtable.symtable(ast.unparse(node), "cell", "exec")
    binds = {
        s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()
    }
    reads = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    inner = list(top.get_children())
    while inner:
        table = inner.pop()
        reads |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        inner += table.get_children()
    return reads, binds


def changed_by(node: ast.AST) -> Iterator[str]:
    """The names whose objects a statement changes, as far as its lines show."""
    for inner in outside_functions(node):
        targets: list[ast.AST] = []
        if isinstance(inner, (ast.Assign, ast.Delete)):
            targets = [t for t in inner.targets if isinstance(t, (ast.Subscript, ast.Attribute))]
        elif isinstance(inner, ast.AugAssign):
            targets = [inner.target]
        elif isinstance(inner, ast.Call) and last_name(inner.func) in CHANGES:
            targets = list(inner.args)
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            targets = [inner.value.func] if isinstance(inner.value.func, ast.Attribute) else []
        yield from (name for target in targets if (name := first_name(target)))


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is in it, but for the bodies of functions: they run when they are called."""
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from outside_functions(child)


def first_name(node: ast.AST) -> str | None:
    """`model` of `model.layers[0].weight`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def last_name(node: ast.AST) -> str:
    """`train` of `labkit.train`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def needed_cells(above: list[str], section: list[str]) -> list[int]:
    """Which of the cells `above`, by number, the cells of a section need; those of the first cell are imports.

    Args:
        above, section: sources of code cells, in order.
    """
    each = [uses_of(source) for source in above]
    modules = set().union(*(uses.modules for uses in each))  # plots.finish(…) changes no module
    wanted: set[str] = set()
    bound: set[str] = set()
    for uses in map(uses_of, section):
        wanted |= uses.needs - bound
        bound |= uses.binds
    chosen = []
    for number in range(len(above) - 1, -1, -1):
        uses = each[number]
        if number == 0 or (wanted - modules) & (uses.binds | uses.changes):
            chosen.append(number)
            wanted = (wanted - (uses.binds - uses.needs)) | uses.needs
    return chosen[::-1]

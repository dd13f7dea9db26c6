"""Functions of a notebook, as a file that other processes can import.

A rank is a process of its own and starts with nothing of the notebook's. So the functions that it is to run are
written to a file, with the imports and the constants that they use, and the file is imported here as well: what you
see in the cell is what the ranks run. `torchrun` can be given the same file.
"""

import ast
import dis
import hashlib
import importlib
import inspect
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)
_folder: tempfile.TemporaryDirectory | None = None


def for_ranks(*functions: Callable) -> ModuleType:
    """A module with these functions, and those of the notebook that they call; other processes can import it.

    Args:
        functions: of cells; what they use of the notebook may be imports, functions, and constants such as numbers,
            text and lists of them. What else they need is passed to them.

    Returns:
        The module, `scale.start(module.function, 2)`; its `__file__` is where it was written.

    Raises:
        ValueError: a function uses something that no other process can have.
    """
    global _folder
    parts: dict[str, str] = {}
    for function in functions:
        write_out(function, parts)
    head = sorted(part for part in parts.values() if part.startswith(("import ", "from ")))
    text = "\n".join([*head, "", *(part for part in parts.values() if part not in head), ""])
    name = f"rank_code_{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    if _folder is None or not Path(_folder.name).is_dir():
        _folder = tempfile.TemporaryDirectory(prefix="labkit-ranks-")
        sys.path.append(_folder.name)
    path = Path(_folder.name) / f"{name}.py"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
    return importlib.import_module(name)


def write_out(function: Callable, parts: dict[str, str]) -> None:
    """Add the source of a function to `parts`, after all that it uses: {name: source, import or assignment}."""
    if not isinstance(function, FunctionType) or "<" in function.__qualname__:
        raise ValueError(
            f"{getattr(function, '__name__', function)} is no function that stands by itself in a cell; define it with def"
        )
    if function.__name__ in parts:
        return
    parts[function.__name__] = ""  # it may call itself
    source = textwrap.dedent(inspect.getsource(function))
    for name in names_in(function, source):
        if name in function.__globals__ and name not in parts and not name.startswith("__"):
            add(name, function.__globals__[name], function, parts)
    parts[function.__name__] = parts.pop(function.__name__) or f"\n\n{source}"


def names_in(function: FunctionType, source: str) -> Iterator[str]:
    """The global names that a function uses: in its body, and where it is defined."""
    codes: list[CodeType] = [function.__code__]
    for code in codes:  # grows while it is read
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield from (
            one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        )
    definition: Any = ast.parse(source).body[0]
    arguments = definition.args
    outside = [*definition.decorator_list, *arguments.defaults, *filter(None, arguments.kw_defaults)]
    outside += [one.annotation for one in (*arguments.args, *arguments.kwonlyargs) if one.annotation]
    outside += [definition.returns] if definition.returns else []
    for node in outside:
        yield from (inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


def add(name: str, value: Any, user: FunctionType, parts: dict[str, str]) -> None:
    """Add what makes `name` mean `value` in the file."""
    home = getattr(value, "__module__", None)
    if isinstance(value, ModuleType):
        parts[name] = f"import {value.__name__} as {name}"
    elif isinstance(value, FunctionType) and home == user.__module__:
        write_out(value, parts)
    elif isinstance(value, PLAIN) or is_plain(value):
        parts[name] = (
            f"{name} = {value!r}" if not isinstance(value, torch.dtype) else f"import torch\n{name} = {value}"
        )
    elif isinstance(value, Path):
        parts[name] = f"{name} = __import__('pathlib').Path({str(value)!r})"
    elif (
        home in sys.modules
        and getattr(sys.modules[home], getattr(value, "__name__", ""), None) is value
        and home != "__main__"
    ):
        parts[name] = f"from {home} import {value.__name__} as {name}"
    else:
        raise ValueError(
            f"{user.__name__} uses {name}, a {type(value).__name__} that lives in this notebook only; another process "
            f"cannot have it: pass what it needs as an argument, or make it inside the function"
        )


def is_plain(value: Any) -> bool:
    """Is it made of numbers and text, so that its `repr` makes it again?"""
    if isinstance(value, dict):
        return all(is_plain(one) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN) and not isinstance(value, torch.dtype)

"""How long a lesson takes is counted, its box says so, and its core stands without the rest."""

import ast
import builtins
import json
import re
from pathlib import Path

import pytest

from labkit.lab.reading import STATED, core_code, reading_time, with_minutes

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("[0-9]*.ipynb"))
FIRST_AFTERNOON = ("00", "01", "02", "08")  # from nothing to a trained model
lessons = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cell(kind: str, source: str, **metadata) -> dict:
    return {"cell_type": kind, "source": source, "metadata": metadata, "outputs": []}


def notebook_of(folder: Path, *cells: dict) -> Path:
    path = folder / "lesson.ipynb"
    path.write_text(json.dumps({"cells": list(cells)}), encoding="utf-8")
    return path


@lessons
def test_the_box_at_the_head_states_what_is_counted(path):
    stated = STATED.search("".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]))
    assert stated, "the box says: read 53, the core 31 · exercises 31, the core ones 17 · run about 2"
    counted = reading_time(path)
    reading, core = int(stated[1]), int(stated[2] or stated[1])
    exercises, ones = int(stated[3] or 0), int(stated[4] or stated[3] or 0)
    hint = f"python scripts/reading_time.py --write {path.name.split('_')[0]}"
    for said, true in ((reading, counted.reading), (core, counted.core)):
        assert abs(said - true) <= max(3, 0.05 * true), f"{said} minutes stated, {true} counted: {hint}"
    assert (exercises, ones) == (counted.exercises, counted.core_exercises), hint


def test_the_first_afternoon_takes_three_hours_at_most():
    times = {p.stem: reading_time(p).whole_core for p in NOTEBOOKS if p.name.split("_")[0] in FIRST_AFTERNOON}
    assert len(times) == len(FIRST_AFTERNOON) and sum(times.values()) <= 180, times


@lessons
def test_the_core_uses_no_name_that_only_an_optional_section_defines(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    known = set(dir(builtins)) | {"display", "get_ipython"}
    for one, is_kept in zip(cells, core_code(cells)):
        if is_kept:
            used, made = names_of("".join(one["source"]))
            assert not used - made - known, f"cell {one['id']} of the core uses {sorted(used - made - known)}"
            known |= made


def names_of(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell reads, and those that it gives, at whatever depth."""
    tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    made = {n.id for n in nodes if not isinstance(n.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return {n.id for n in nodes if isinstance(n.ctx, ast.Load)}, made


def test_words_lines_and_exercises_are_counted(tmp_path):
    path = notebook_of(
        tmp_path,
        cell("markdown", "# T\n| **Minutes** | read 9 · run 2 to 3 |"),
        cell("markdown", "## 1 · A (core)\n" + "word " * 400),
        cell("code", "x = 1\n\ny = 2\nz = 3"),
        cell("code", "plots = 1\n" * 50, jupyter={"source_hidden": True}),
        cell("markdown", "**1.1** (core, easy, 4 minutes). Do it.\n\n**1.2** (hard, 8 minutes). And that."),
        cell("code", "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"),
    )
    time = reading_time(path)
    assert time.lines == 3 and 400 < time.words < 440
    assert (time.exercises, time.core_exercises, time.run) == (12, 4, 3.0)
    assert time.reading == time.core == 4  # 2 of text and a bit, 1 of code


@pytest.mark.parametrize(
    ("headings", "is_core"),
    [
        (["## 1 · A (core)"], True),
        (["## 1 · A (optional)"], False),
        (["## 1 · A (optional)", "### Sub"], False),
        (["## 1 · A (optional)", "### Sub (core)"], True),
        (["## 1 · A (core)", "### Sub (optional)", "### Next"], True),
        (["## 7 · Appendix: more", "### Sub", "#### Deeper"], False),
        (["## 7 · Appendices", "## Recap"], True),
    ],
)
def test_a_cell_is_where_its_headings_put_it(tmp_path, headings, is_core):
    path = notebook_of(tmp_path, *(cell("markdown", h) for h in headings), cell("code", "x = 1"))
    assert reading_time(path).core_lines == int(is_core)


def test_a_module_that_is_printed_is_read_too(tmp_path):
    shown = cell("code", "print(inspect.getsource(f))")
    shown["outputs"] = [{"output_type": "stream", "text": ["def f():\n", "    return 1\n"]}]
    assert reading_time(notebook_of(tmp_path, shown)).lines == 3


def test_the_minutes_are_written_into_the_box_and_nowhere_else(tmp_path):
    path = notebook_of(
        tmp_path,
        cell("markdown", "# T\n| **Minutes** | read 99, the core 9 · exercises 5 · run about 1 |"),
        cell("markdown", "**1** (easy, 4 minutes). read 99 of them\n\n" + "word " * 600),
    )
    first, second = json.loads(with_minutes(path))["cells"]
    assert (
        "".join(first["source"]).endswith("| read 4 · exercises 4 · run about 1 |")
        and "read 99" in second["source"]
    )


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    with pytest.raises(ValueError, match=r"a\.ipynb is not a notebook"):
        reading_time(tmp_path / "a.ipynb")

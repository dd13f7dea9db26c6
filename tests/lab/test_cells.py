"""A cell that needs another one says which, in a real kernel and from any lesson."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from labkit.lab.cells import CodeCell, find_notebook, read_cells, sentence

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
CELLS = [
    CodeCell("import math", "the title"),
    CodeCell("trained = {}", "Train"),
    CodeCell('trained["LoRA"] = train("LoRA")', "Train"),
    CodeCell("%time other = 1", "Time"),
    CodeCell('print(trained["LoRA"], math.pi)', "Compare"),
]


def raised(error: type, text: str, **namespace) -> BaseException:
    with pytest.raises(error) as caught:
        exec(text, namespace)
    return caught.value


def test_a_missing_name_leads_to_the_cell_that_binds_it():
    said = sentence(raised(NameError, "trained"), CELLS[4].source, ["import math"], CELLS)
    assert said.startswith(
        "This cell needs another that has not run: under “Train”, the cell that begins with `trained = {}`"
    )


def test_a_missing_key_leads_to_the_cell_that_fills_it():
    done = [CELLS[0].source, CELLS[1].source]
    said = sentence(raised(KeyError, 'trained["LoRA"]', trained={}), CELLS[4].source, done, CELLS)
    assert 'begins with `trained["LoRA"] = train("LoRA")`' in said and "more" not in said


def test_an_error_with_another_reason_gets_no_sentence():
    done = [cell.source for cell in CELLS[:4]]
    assert sentence(raised(KeyError, 'trained["LoRA"]', trained={}), CELLS[4].source, done, CELLS) is None


def test_without_the_notebooks_file_there_is_a_hint():
    assert "Run All Above" in sentence(raised(NameError, "trained"), "trained", [], [])


def test_the_notebook_is_found_where_the_front_end_tells(tmp_path: Path, monkeypatch):
    (tmp_path / "a.ipynb").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert find_notebook({}) is None
    assert find_notebook({"__vsc_ipynb_file__": str(tmp_path / "a.ipynb")}) == tmp_path / "a.ipynb"
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/a.ipynb")  # from the server's folder, not the kernel's
    assert find_notebook({}) == tmp_path / "a.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_of_a_lesson_is_found_in_a_cell_of_it(path: Path):
    cells = read_cells(path)
    assert len(cells) > 10 and all(cell.heading != "the title" for cell in cells[2:])
    for number, cell in enumerate(cells[1:], 1):
        said = sentence(raised(NameError, "profile"), cell.source, [], cells)
        assert ("profile" in cells[0].source) == (f"`{cells[0].source.splitlines()[0][:60]}" in said), number


@pytest.mark.slow
def test_in_a_kernel_the_sentence_follows_the_error(tmp_path: Path, monkeypatch):
    path = tmp_path / "lesson.ipynb"
    cells = [nbformat.v4.new_code_cell(f"from labkit import lab\n{CELLS[0].source}")]
    cells += [
        c
        for cell in CELLS[1:]
        for c in (nbformat.v4.new_markdown_cell(f"## {cell.heading}"), nbformat.v4.new_code_cell(cell.source))
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    monkeypatch.setenv("JPY_SESSION_NAME", str(path))
    begun = nbformat.v4.new_notebook(cells=[cells[0], nbformat.v4.new_code_cell(CELLS[4].source)])
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(begun, timeout=120, resources=place, allow_errors=True).execute()
    outputs = begun.cells[1].outputs
    assert any(o.output_type == "error" and o.ename == "NameError" for o in outputs)
    assert any(
        "under “Train”, the cell that begins with `trained = {}`" in o.get("text", "") for o in outputs
    )

"""scripts/refresh_notebooks.py: what it keeps of a notebook, and what it removes as noise."""

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "refresh_notebooks.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("refresh_notebooks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def notebook(tmp_path):
    """A notebook of two cells, with more metadata than it should be committed with."""
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("print(1)")]
    cells[1].metadata = {
        "collapsed": False,
        "execution": {"iopub.execute_input": "2026"},
        "jupyter": {"source_hidden": True},
        "nbgrader": {"solution": True},
        "tags": ["slow"],
    }
    path = tmp_path / "a.ipynb"
    nbformat.write(v4.new_notebook(cells=cells, metadata={"widgets": {"state": {}}}), path)
    return path


def run_with(monkeypatch, script, outputs):
    """Let a run of a notebook have these outputs; what runs it is nbclient's business."""

    def execute(client):
        client.nb.cells[1].outputs = outputs

    monkeypatch.setattr(script.NotebookClient, "execute", execute)


def test_collapsed_cells_tags_and_nbgrader_stay_and_other_metadata_goes(monkeypatch, script, notebook):
    run_with(monkeypatch, script, [])
    script.refresh(notebook)
    refreshed = nbformat.read(notebook, as_version=4)
    assert refreshed.cells[1].metadata == {
        "jupyter": {"source_hidden": True},
        "nbgrader": {"solution": True},
        "tags": ["slow"],
    }
    assert set(refreshed.metadata) == {"kernelspec", "language_info"}


def test_progress_bars_and_widget_views_go_and_other_outputs_stay(monkeypatch, script, notebook):
    said = v4.new_output("stream", name="stdout", text="1\n")
    bar = v4.new_output("stream", name="stderr", text="100 %")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}
    figure = v4.new_output("display_data", data={"image/png": "AAAA"})
    run_with(monkeypatch, script, [bar, said, v4.new_output("display_data", data=view), figure])
    script.refresh(notebook)
    assert nbformat.read(notebook, as_version=4).cells[1].outputs == [said, figure]


def test_a_notebook_that_fails_is_left_as_it_was(monkeypatch, script, notebook):
    before = notebook.read_bytes()

    def fail(client):
        raise RuntimeError("a cell failed")

    monkeypatch.setattr(script.NotebookClient, "execute", fail)
    with pytest.raises(RuntimeError, match="a cell failed"):
        script.refresh(notebook)
    assert notebook.read_bytes() == before and list(notebook.parent.iterdir()) == [notebook]

"""Run notebooks in place, headless and from a cold kernel, and leave them as they should be committed.

    .venv/bin/python scripts/refresh_notebooks.py notebooks/08_qlora_finetune.ipynb

Outputs are kept, because people read them on GitHub. Noise is removed: progress bars (stderr), widget views
and their state, execution times. A notebook that fails is left as it was. Numbers in the text that the new
outputs contradict are listed (`labkit.lab.prose`).
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from labkit.lab.prose import contradictions

KEPT_CELL_METADATA = ("jupyter", "nbgrader", "tags")  # "jupyter" says which cells are collapsed
KEPT_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def is_noise(output: dict) -> bool:
    """Is this output a progress bar or a widget view?"""
    if output["output_type"] == "stream":
        return output["name"] == "stderr"
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def refresh(path: Path) -> None:
    """Execute the notebook at `path` and write it back, cleaned."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    notebook.metadata = KEPT_METADATA
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT_CELL_METADATA}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_noise(output)]
    part = path.with_suffix(".part")
    nbformat.write(notebook, part)
    os.replace(part, path)


if __name__ == "__main__":
    os.environ["LABKIT_STATIC"] = "1"
    for name in sys.argv[1:] or sys.exit("usage: refresh_notebooks.py NOTEBOOK [NOTEBOOK …]"):
        refresh(Path(name))
        print(f"{name}: run and cleaned, {Path(name).stat().st_size / 1e3:.0f} kB")
        for line in contradictions(name):
            print(f"  mend the text: {line}")

"""The cell of README.md for notebook services: enough for a lesson, and PyTorch stays as it was.

No notebook service can be had in a test, so one is made: a bare virtual environment with ipykernel, with the installed
PyTorch and numpy linked into it file by file under other version numbers, and with a transformers that is too old. The
course pins neither of those versions, and no index has that of PyTorch. All else that a lesson needs, the cell must bring.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

from labkit.paths import cache_folder
from tests.short_lesson import time_a_step_once

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "data",
    "labkit",
    "notebooks",
    "scripts",
    "LICENSE",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
)
LESSON = "00_start_here"
ELSEWHERE = {"torch": "2.12.0+elsewhere", "numpy": "2.3.5"}
EVIDENCE = """
import json, sys
import numpy, torch, labkit
print(json.dumps({
    "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    "labkit": labkit.__file__,
    "files": sorted({m.__file__ for m in list(sys.modules.values()) if isinstance(getattr(m, "__file__", None), str)}),
}))
"""


def readme_cell(source) -> str:
    """The cell as README.md gives it, but for where the repository is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (cell,) = re.findall(r'```python\n(SOURCE = "lora-lab.zip" .*?)```', text, re.DOTALL)
    return cell.replace('"lora-lab.zip"', repr(str(source)), 1)


# ---- the cell, with a repository that holds nothing but an installer


@pytest.fixture
def small(tmp_path):
    """A folder that stands for the repository."""
    folder = tmp_path / "repository"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "install_here.py").write_text("print('installer ran')")
    return folder


def run_cell(source, folder: Path, before: str = "") -> subprocess.CompletedProcess:
    """The cell in plain Python, in a folder of its own."""
    folder.mkdir()
    command = [sys.executable, "-c", f"{before}\n{readme_cell(source)}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_cell_takes_a_folder_an_archive_of_either_layout_or_an_address(small, tmp_path):
    flat = shutil.make_archive(str(tmp_path / "flat"), "zip", small)
    below = shutil.make_archive(str(tmp_path / "below"), "gztar", tmp_path, "repository")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(small)]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *words], check=True)
    for n, source in enumerate([flat, below, small, small.as_uri()]):
        done = run_cell(source, tmp_path / f"content{n}")
        assert done.stdout == "installer ran\n", (source, done.stderr)


def test_the_cell_says_so_if_there_is_nothing_and_goes_on_where_unpacking_was_stopped(small, tmp_path):
    done = run_cell("no-such.zip", tmp_path / "nothing")
    assert done.stderr.splitlines()[-1].startswith("AssertionError: no-such.zip holds no such repository")
    half = "import os; os.makedirs('lora-lab/scripts')"
    assert run_cell(small, tmp_path / "half", half).stdout == "installer ran\n"


# ---- a runtime that others have set up


def with_needs(*names: str) -> set[str]:
    """Installed packages, and all that they need, by their own metadata."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needs = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
            left += [
                one.name.lower() for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def link_package(name: str, target: Path) -> None:
    """Link the files of an installed package into another folder for packages."""
    for file in importlib.metadata.distribution(name).files:
        source = Path(file.locate())
        place = target / file
        spare = {"..", "include"} & set(file.parts)  # commands, and thousands of C++ headers
        if not spare and source.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source.resolve())


def call_it(name: str, version: str, target: Path) -> None:
    """Let a linked package be of another version."""
    true = importlib.metadata.version(name)
    for file in (target / name / "version.py", target / f"{name}-{true}.dist-info" / "METADATA"):
        text = file.read_text(encoding="utf-8")
        assert true in text
        file.unlink()
        file.write_text(text.replace(true, version), encoding="utf-8")
    (target / f"{name}-{true}.dist-info").rename(target / f"{name}-{version}.dist-info")


def add_old_transformers(target: Path) -> None:
    """What pip takes for a transformers that is too old."""
    about = target / "transformers-4.57.1.dist-info"
    for file, text in {
        target / "transformers" / "__init__.py": "raise ImportError('too old')\n",
        about / "METADATA": "Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n",
        about / "INSTALLER": "pip\n",
        about / "RECORD": "".join(
            f"transformers{end},,\n" for end in ("/__init__.py", "-4.57.1.dist-info/METADATA")
        ),
    }.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def state_of(folder: Path) -> dict[str, str | bytes]:
    """Where each file is linked to, or its content, but for what Python compiles."""
    files = [file for file in folder.rglob("*") if "__pycache__" not in file.parts and not file.is_dir()]
    return {str(file): os.readlink(file) if file.is_symlink() else file.read_bytes() for file in files}


def run_cells(python: Path, folder: Path, cells: list) -> list:
    """Run cells in a new kernel of `python`, in `folder`; returns them with their outputs."""
    about = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
    }
    kernel = folder.parent / "jupyter" / "kernels" / "elsewhere" / "kernel.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    kernel.write_text(json.dumps(about | {"display_name": "elsewhere"}))
    notebook, where = new_notebook(cells=cells), {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernel.parents[2]))
        NotebookClient(notebook, kernel_name="elsewhere", timeout=600, resources=where).execute()
    return notebook.cells


def printed(cell) -> str:
    return "".join(
        out["text"] for out in cell.outputs if out.output_type == "stream" and out.name == "stdout"
    )


@pytest.fixture
def clean_environment(monkeypatch):
    """Nothing leads from the new environment to this one, but for the model's folder."""
    for name in [
        name for name in os.environ if name.startswith(("LABKIT_", "PYTHON", "VIRTUAL_ENV", "CONDA"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LABKIT_CACHE", str(cache_folder()))
    monkeypatch.setenv("LABKIT_STATIC", "1")
    monkeypatch.setenv("PIP_NO_COMPILE", "1")  # the kernel compiles what it imports; all would take minutes


@pytest.fixture
def runtime(tmp_path, clean_environment):
    """(python, packages) of the environment that a notebook service is played by."""
    place = tmp_path / "runtime"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    for name in with_needs("pip", "ipykernel", *ELSEWHERE):
        link_package(name, packages)
    for name, version in ELSEWHERE.items():
        call_it(name, version, packages)
    add_old_transformers(packages)
    reached = subprocess.run(
        [
            str(python),
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries",
            "0",
            "--dest",
            str(tmp_path),
            "gguf",
        ],
        capture_output=True,
    )
    if reached.returncode:
        pytest.skip("NO PACKAGE INDEX: whether the cell of README.md is enough was not tested")
    yield python, packages
    shutil.rmtree(place)  # half a gigabyte


@pytest.fixture
def archive(tmp_path):
    """The repository as hosts pack it: below a folder that is named after it."""
    packed = tmp_path / "packed"
    for name in SHIPPED:
        source, target = ROOT / name, packed / "lora-lab-main" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, target)
    return Path(shutil.make_archive(str(tmp_path / "uploaded"), "zip", packed))


@pytest.mark.slow
def test_the_cell_of_the_readme_is_enough_for_a_lesson_and_leaves_pytorch_as_it_was(
    runtime, archive, tmp_path
):
    python, packages = runtime
    before = {name: state_of(packages / name) for name in ELSEWHERE}
    empty = tmp_path / "content"
    empty.mkdir()
    cell = readme_cell(archive)

    cells = ["import numpy", cell, cell, EVIDENCE]  # a kernel may have imported numpy before the first cell
    _, first, again, evidence = run_cells(python, empty, [new_code_cell(source) for source in cells])
    assert "transformers==" in printed(first) and "torch stays 2.12.0+elsewhere" in printed(first)
    assert "Ready" in printed(again) and "Installing" not in printed(again)

    found = json.loads(printed(evidence))
    assert found["versions"] == ELSEWHERE
    assert {name: state_of(packages / name) for name in ELSEWHERE} == before
    assert Path(found["labkit"]).is_relative_to(empty / "lora-lab")
    allowed = (python.parent.parent, sys.base_prefix, empty)
    assert [
        file
        for file in found["files"]
        if not any(Path(file).is_relative_to(one) for one in allowed) and os.path.isabs(file)
    ] == []

    lesson = time_a_step_once(nbformat.read(ROOT / "notebooks" / f"{LESSON}.ipynb", as_version=4))
    ran = run_cells(python, empty, [new_code_cell(cell), *lesson.cells])  # after a restart
    assert "Ready" in printed(ran[0]) and "Installing" not in printed(ran[0])

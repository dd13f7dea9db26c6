"""The set-up: pins that agree, commands that exist, clean notebooks, and one sentence when something is
wrong.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def pins(text):
    """{name: version}; of a package with markers, the last."""
    pattern = r"^[\s-]*([\w.-]+)==([\w.]+)(?: ;.*)?\s*$"
    return {name.lower(): version for name, version in re.findall(pattern, text, re.M)}


def locked(*names):
    """The entries of locks: {(name, version): (marker, hashes)}."""
    text = "".join((ROOT / "requirements" / f"{name}.lock").read_text() for name in names)
    entries = re.findall(r"^([\w.-]+)==([\w.+]+)(?: ; (.*?))? \\\n((?: +--hash=.*\n)+)", text, re.M)
    assert len(entries) == len(re.findall(r"^[\w.-]+==", text, re.M)) > 0, "an entry without a hash"
    return {
        (name.lower(), version): (marker, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", hashes))
        for name, version, marker, hashes in entries
    }


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def constraints():
    return pins((ROOT / "constraints.txt").read_text())


def test_every_direct_dependency_is_pinned(project, constraints):
    extras = project["optional-dependencies"]
    assert set(extras) == {
        "notebook",
        "lab",
        "test",
        "bench",
        "peers",
        "ray",
        "classroom",
        "cluster",
        "docs",
        "serve",
    }
    direct = [Requirement(line) for lines in [project["dependencies"], *extras.values()] for line in lines]
    assert [one.name for one in direct if constraints.get(one.name.lower()) not in one.specifier] == []
    assert constraints["torch"] == "2.13.0"


def test_what_is_locked_is_what_is_pinned_and_every_entry_has_hashes(constraints):
    entries = locked("all", "torch", "bench", "classroom", "peers")
    versions = {name.replace("_", "-"): version for name, version in constraints.items()}
    assert all(hashes for _, hashes in entries.values())
    by_hand = {"uv", "ray"}  # nobody needs them to run the course
    assert set(entries) - {("soupsieve", "2.10")} >= {i for i in versions.items() if i[0] not in by_hand}
    assert {n: v for n, v in entries if versions.get(n, v) != v} == {
        "soupsieve": "2.10"
    }  # Python 3.11.0 to 3.11.4
    assert [version for _, version in locked("torch-cpu")] == [constraints["torch"] + "+cpu"]


def test_the_build_of_the_course_itself_is_pinned(constraints):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == [f"setuptools=={constraints['setuptools']}"]


def test_conda_environment_has_the_same_pins(project, constraints):
    conda = pins((ROOT / "environment.yml").read_text())
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["notebook"], *extras["lab"], *extras["test"], *extras["serve"]]
    assert set(conda) == {Requirement(line).name.lower() for line in lines}
    assert conda == {name: constraints[name] for name in conda}


def test_what_is_installed_is_what_is_pinned(constraints):
    done = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True)
    installed = pins(done.stdout.replace("+cpu", ""))
    assert len(installed) > 50
    assert {n: v for n, v in installed.items() if constraints.get(n, v) != v} == {}


def make(*arguments, cwd=ROOT):
    return subprocess.run(["make", "-s", *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_lists_every_command():
    listed = make("help").stdout
    commands = (
        "help setup model lab test test-fast campaign run bench gpu lint docs site slides bundle room student teacher "
        "classroom catch-up lock clean"
    )
    assert re.findall(r"^ *make ([\w-]+)", listed, re.M) == commands.split()


def test_the_checks_before_a_commit_are_those_of_make_lint():
    lint = re.findall(r"bin/(?:python -m )?(.+)$", make("-n", "lint").stdout, re.M)
    hooks = re.findall(r"entry: .venv/bin/(.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.M)
    assert hooks == ["ruff check .", "ruff format --check .", "lint-imports", "mypy"] and lint == hooks


def test_run_without_a_notebook_says_how():
    done = make("run", "NB=nothing.ipynb")
    assert done.returncode and "error: NB='nothing.ipynb' is not a file" in done.stdout


def setup_env(tmp_path, prelude):
    """Run scripts/setup_env.py after `prelude`, from a copy, so nothing real is touched."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/setup_env.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    lines = [
        "import runpy, shutil, subprocess, sys",
        prelude,
        "sys.argv = ['setup_env.py', '.venv']",
        "runpy.run_path('scripts/setup_env.py', run_name='__main__')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("prelude", "sentence"),
    [
        ("sys.version_info = (3, 9, 1)", "Python 3.9 is too old; install Python 3.11 or newer"),
        ("shutil.disk_usage = lambda _: type('U', (), {'free': 10**8})", "0.1 GB free on the disk"),
        ("subprocess.call = lambda command, **_: 1", "could not create the virtual environment"),
        ("subprocess.call = lambda command, **_: int('pip' in command)", "could not install the packages"),
        (
            "def stop(*_, **__): raise KeyboardInterrupt\nsubprocess.call = stop",
            "interrupted; run make again",
        ),
        ("import os\nos.makedirs = lambda *_, **__: open('/proc/nothing', 'w')", "cannot set up .venv: "),
    ],
)
def test_a_failed_setup_is_one_sentence_and_leaves_no_stamp(tmp_path, prelude, sentence):
    done = setup_env(tmp_path, prelude)
    assert done.returncode == 1
    assert sentence in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv" / ".labkit-ready").exists()


def test_lab_opens_on_localhost_with_a_token_and_without_a_browser_where_there_is_no_display(
    monkeypatch, capsys
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    command = runpy.run_path(ROOT / "scripts" / "open_lab.py")["command"]
    line = command("notebooks/00_start_here.ipynb")
    assert "--no-browser" in line and "--ServerApp.ip=127.0.0.1" in line
    assert not any("token" in option for option in line)
    assert "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb" in line
    # the modules are in sight, and the URL is relative to it
    assert f"--ServerApp.root_dir={os.getcwd()}" in line
    assert "open the URL" in capsys.readouterr().out
    monkeypatch.setenv("DISPLAY", ":0")
    assert "--no-browser" not in command("x.ipynb")


def test_importing_labkit_touches_neither_network_nor_cache_and_is_quick_beside_torch():
    code = (
        "import torch, sys; before = set(sys.modules); import labkit; new = set(sys.modules) - before;"
        "heavy = {'transformers', 'numba', 'matplotlib', 'IPython', 'pandas', 'gguf', 'requests', 'huggingface_hub'};"
        "print(sorted(heavy & new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_in_the_package_imports_the_furniture():
    for path in (ROOT / "labkit").rglob("*.py"):
        if ROOT / "labkit" / "lab" not in path.parents:
            assert "labkit.lab" not in path.read_text(), path


def notebooks():
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_committed_notebooks_are_clean(path):
    """Run once from top to bottom; figures, but no errors, warnings, paths, widget state or progress bars."""
    notebook = json.loads(path.read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([c["outputs"] for c in code])
    assert '"output_type": "error"' not in outputs and "Warning" not in outputs
    assert "widgets" not in notebook["metadata"]
    assert not re.search(r"/(root|home|Users|tmp|work)/", outputs) and not re.search(r"[\d?]it/s", outputs)
    assert "image/png" in outputs
    images = [v for c in code for o in c["outputs"] for k, v in o.get("data", {}).items() if k == "image/png"]
    assert max(len(i) * 3 / 4 for i in images) < 80_000


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert notebooks() and all(path.stem in readme for path in notebooks())
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "make test" in (ROOT / ".ci" / "run").read_text()

"""The check of a room: a line for each thing, on a Python that has nothing installed, and an exit status to loop over."""

import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def room():
    return runpy.run_path(str(ROOT / "scripts" / "check_room.py"))


@pytest.fixture
def bare(tmp_path):
    """A checkout in which nothing is installed, and a Python without site-packages."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(folder):
    command = [sys.executable, "-I", "-S", str(folder / "scripts" / "check_room.py")]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})


def test_a_bare_machine_gets_a_line_for_each_thing_and_a_summary(bare):
    done = run(bare)
    *lines, summary = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr
    assert [re.match(r"(OK|WARNING|PROBLEM) +(\w+)", line)[2] for line in lines] == (
        ["Python", "packages", "model", "bundle", "disk", "memory", "cores", "port", "folder", "speed"]
    )
    assert "not installed  ->  run `make model`" in done.stdout
    assert summary.startswith(f"{socket.gethostname()}: ready; look at ") and "packages" in summary
    assert not list(bare.rglob("__pycache__"))


def test_every_line_that_is_not_fine_says_what_to_do(room):
    lines = [
        room["python_line"]((3, 9, 1)),
        room["memory_line"](3e9, None),
        room["memory_line"](16e9, 1e9),
        room["memory_line"](None, None),
        room["cores_line"](1),
        room["speed_line"](11.0, "cpu"),
    ]
    assert all(state != "OK" and advice for _, state, _, advice in lines)
    assert "3.11 or newer" in lines[0][3]


def test_a_port_that_is_taken_is_a_warning(room):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        what, state, found, advice = room["port_line"](other.getsockname()[1])
    assert (what, state) == ("port", "WARNING") and "is taken" in found and "the link" in advice


def test_a_full_disk_is_a_problem_and_the_exit_status_says_so(room, monkeypatch, capsys):
    full = ("disk", "PROBLEM", "1.0 GB free", "free space")
    monkeypatch.setitem(room["main"].__globals__, "check", lambda *_: [full])
    assert room["main"]([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{socket.gethostname()}: not ready: disk"


def test_a_bundle_for_other_machines_is_named_with_what_it_is_for(room, tmp_path):
    shutil.copy(ROOT / "scripts" / "bundle" / "start.py", tmp_path)
    (tmp_path / "packages" / "plan9-mips-py3.11").mkdir(parents=True)
    _, state, _, advice = room["bundle_line"]([str(tmp_path)])
    assert state == "WARNING" and "plan9-mips-py3.11" in advice

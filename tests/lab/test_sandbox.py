"""The limits for what students wrote hold in a process of its own, and tell where the system lacks them."""

import subprocess
import sys
from pathlib import Path

import pytest

from labkit.lab import sandbox

needs_landlock = pytest.mark.skipif(
    not sandbox.landlock_version(), reason="no Landlock here: limits on files were NOT tested"
)
SYSTEM = ["/usr", "/lib", "/lib64", "/etc", "/opt", sys.prefix, sys.base_prefix, *filter(None, sys.path)]


def run(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code in a new process that has `sandbox`, its functions, and `folder`."""
    head = f"import runpy; sandbox = runpy.run_path({sandbox.__file__!r}); folder = {str(folder)!r}\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=120)


@needs_landlock
def test_a_confined_process_reads_and_writes_only_where_it_may(tmp_path: Path):
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "there").write_text("text")
    done = run(
        tmp_path,
        f"""
assert sandbox["confine"]({SYSTEM!r}, [folder + "/open", folder + "/missing"])
open(folder + "/open/new", "w").write("x")
print(open(folder + "/open/there").read())
import os, socket, subprocess, sys
def attempt(what):
    try:
        what()
        print("done")
    except OSError as error:
        print(type(error).__name__)
attempt(lambda: open(folder + "/shut/there"))
attempt(lambda: open(folder + "/shut/new", "w"))
attempt(lambda: os.listdir(folder + "/shut"))
attempt(lambda: os.rename(folder + "/open/new", folder + "/shut/new"))
attempt(lambda: os.symlink(folder + "/shut/there", folder + "/open/link") or open(folder + "/open/link"))
child = "open(" + repr(folder + "/shut/there") + ")"
print(subprocess.run([sys.executable, "-c", child], capture_output=True).returncode)
""",
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[0] == "text" and set(said[1:6]) <= {"PermissionError", "OSError"} and said[6] == "1"
    assert [p.name for p in (tmp_path / "shut").iterdir()] == ["there"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_memory_and_files_beyond_a_limit_are_errors_and_the_process_lives(tmp_path: Path):
    done = run(
        tmp_path,
        """
sandbox["limit"](memory=256 * 2**20, seconds=60, file_bytes=2**20)
bytearray(100 * 2**20)
try:
    bytearray(2 * 2**30)
except MemoryError:
    print("memory")
try:
    with open(folder + "/large", "wb") as file:
        file.write(bytes(2**21))
except OSError:
    print("file")
print("alive")
""",
    )
    assert done.stdout.split() == ["memory", "file", "alive"], done.stderr


def test_without_landlock_confining_says_that_nothing_changed(monkeypatch):
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    assert sandbox.confine(["/usr"], ["/tmp"]) is False

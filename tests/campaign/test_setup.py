"""The set-up is killed at random moments, with real environments and a real pip, and the next call recovers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from tests.campaign.harness import moments, rounds

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8  # that a set-up takes on a laptop
FILES = 400  # of the package: enough that a kill falls into the middle of it


def make_wheel(folder: Path, name: str, version: str, files: int) -> str:
    """A wheel of many small modules that import each other; its sha256."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    parts = {f"{name}/__init__.py": "".join(f"from {name} import part{i}\n" for i in range(files))}
    parts |= {f"{name}/part{i}.py": f"value = {i}\n" * 200 for i in range(files)}
    parts |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for part, text in parts.items():
            wheel.writestr(part, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{part},,\n" for part in [*parts, f"{info}/RECORD"]))
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A course of one module and two packages, with the real set-up."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (tmp_path / "requirements").mkdir()
    for lock, name, files in (
        ("all", "many_files", FILES),
        ("torch", "torch", 1),
        ("torch-cpu", "absent", 1),
    ):
        entry = f"{name}==1.0 --hash=sha256:{make_wheel(wheels, name, '1.0', files)}\n"
        (tmp_path / "requirements" / f"{lock}.lock").write_text(entry)
    (wheels / "absent-1.0-py3-none-any.whl").unlink()
    backend = (
        "import zipfile\n"
        "def build_editable(folder, config_settings=None, metadata_directory=None):\n"
        "    name, info = 'course-1.0-py3-none-any.whl', 'course-1.0.dist-info'\n"
        "    with zipfile.ZipFile(f'{folder}/{name}', 'w') as wheel:\n"
        "        wheel.writestr('course.py', '')\n"
        "        wheel.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\\nName: course\\nVersion: 1.0\\n')\n"
        "        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "        wheel.writestr(f'{info}/RECORD', '')\n"
        "    return name\n"
    )
    (tmp_path / "backend.py").write_text(backend)
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "pyproject.toml").write_text(project + '[project]\nname = "course"\nversion = "1.0"\n')
    return tmp_path


def set_up(course: Path) -> subprocess.Popen:
    """Begin the set-up in a process group of its own, away from any network."""
    environment = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(course / "wheels"),
        "PIP_CONFIG_FILE": os.devnull,
    }
    environment.pop("PIP_EXTRA_INDEX_URL", None)
    command = [sys._base_executable, "scripts/setup_env.py", ".venv"]
    return subprocess.Popen(
        command, cwd=course, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )


def check(course: Path) -> None:
    """Everything is installed and whole."""
    program = "import course, many_files, torch, json; print(json.dumps(len(vars(many_files))))"
    done = subprocess.run(
        [course / ".venv/bin/python", "-c", program], cwd=course / "wheels", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) >= FILES
    assert not (course / ".venv" / ".labkit-under-way").exists()


@pytest.mark.slow
def test_a_killed_set_up_recovers_and_a_file_with_another_hash_is_not_installed(course: Path):
    signals = (signal.SIGKILL, signal.SIGINT) * 10
    for moment, which in zip(moments(rounds(1, 20), SECONDS, seed=0), signals):
        shutil.rmtree(course / ".venv", ignore_errors=True)
        process = set_up(course)
        time.sleep(moment)
        os.killpg(process.pid, which)
        process.wait()
        assert set_up(course).wait() == 0
        check(course)
    make_wheel(course / "wheels", "torch", "1.0", 2)
    (course / ".venv" / ".labkit-ready").unlink()
    for installed in list((course / ".venv").rglob("torch*")):
        shutil.rmtree(installed)
    assert set_up(course).wait() != 0
    assert not (course / ".venv" / ".labkit-ready").exists()

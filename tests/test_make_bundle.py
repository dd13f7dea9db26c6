"""The bundle for a room without a network: whole, or one sentence and nothing installed."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import make_bundle  # noqa: E402
import start  # noqa: E402

# in place of setting up for minutes: what each of the course's three steps was called with
STAND_IN = "import os, sys, pathlib\nprint('ran', pathlib.Path(__file__).name, *sys.argv[1:], os.environ['PIP_FIND_LINKS'])\n"


@pytest.fixture
def bundle(tmp_path):
    """A small bundle: the real start.py and checksums, a stand-in for a wheel and for the course."""
    folder = tmp_path / "stick"
    packages = folder / "packages" / start.this_platform()
    packages.mkdir(parents=True)
    (packages / "torch-2.13.0-py3-none-any.whl").write_bytes(b"\0" * 4096)
    for name, text in {
        "scripts/setup_env.py": STAND_IN
        + (
            "venv = pathlib.Path(sys.argv[1]); (venv / 'bin').mkdir(parents=True)\n"
            "os.symlink(sys.executable, venv / 'bin' / 'python'); (venv / '.labkit-ready').touch()\n"
        ),
        "scripts/open_lab.py": STAND_IN,
        "labkit/__init__.py": "",
        "labkit/models/__init__.py": "",
        "labkit/models/__main__.py": STAND_IN,
        "notebooks/00_start_here.ipynb": "{}",
    }.items():
        (folder / "course" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "course" / name).write_text(text)
    for path in make_bundle.HANDED_OUT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    make_bundle.write_sums(folder)
    return folder


def run(bundle, *arguments):
    home = bundle.parent / "home"
    home.mkdir(exist_ok=True)
    variables = {"HOME": str(home), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-B", str(bundle / "start.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    return done, home / "lora-lab"


def test_a_start_sets_up_fetches_the_model_and_opens_the_first_lesson_with_packages_from_the_bundle_alone(
    bundle,
):
    done, place = run(bundle)
    packages = bundle / "packages" / start.this_platform()
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
        f"ran setup_env.py .venv {packages}",
        f"ran __main__.py fetch smollm2-135m {packages}",
        f"ran open_lab.py notebooks/00_start_here.ipynb {packages}",
    ]
    assert (place / "notebooks" / "00_start_here.ipynb").exists()


def test_a_second_start_keeps_what_a_reader_wrote(bundle):
    _, place = run(bundle)
    (place / "notebooks" / "00_start_here.ipynb").write_text("my answers")
    done, _ = run(bundle, "--no-lab")
    assert "Checking" not in done.stdout
    assert (place / "notebooks" / "00_start_here.ipynb").read_text() == "my answers"


def test_a_read_only_bundle_gives_a_course_that_can_be_written_to(bundle):
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    done, place = run(bundle, "--no-lab")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
    copied = [p for p in [place, *place.rglob("*")] if ".venv" not in p.parts]
    assert all(path.stat().st_mode & stat.S_IWUSR for path in copied)
    for path in [bundle, *bundle.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda b: flip(next(b.rglob("*.whl"))), "whl is damaged: copy the whole folder again"),
        (lambda b: next(b.rglob("*.whl")).unlink(), "whl is missing: copy the whole folder again"),
        (lambda b: flip(b / "course" / "labkit" / "models" / "__main__.py"), "__main__.py is damaged"),
        (lambda b: (b / "SHA256SUMS").unlink(), "SHA256SUMS is missing or damaged"),
        (lambda b: (b / "SHA256SUMS").write_text("nonsense"), "SHA256SUMS is missing or damaged"),
        (
            lambda b: (b / "packages" / start.this_platform()).rename(b / "packages" / "darwin-arm64-py3.12"),
            "the packages here are for darwin-arm64-py3.12, and this machine is",
        ),
    ],
    ids=[
        "a flipped byte",
        "a missing wheel",
        "a flipped byte in the course",
        "no sums",
        "no sums in it",
        "another platform",
    ],
)
def test_a_bundle_that_is_not_whole_is_one_sentence_and_nothing_is_installed(bundle, harm, sentence):
    harm(bundle)
    done, place = run(bundle)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr and "Nothing was installed" in done.stderr
    assert not place.exists() and not list(place.parent.iterdir())


def test_packages_for_another_machine_need_not_be_whole_here(bundle):
    other = bundle / "packages" / "darwin-arm64-py3.12"
    other.mkdir()
    (other / "torch.whl").write_bytes(b"\0")
    make_bundle.write_sums(bundle)
    (other / "torch.whl").unlink()
    assert run(bundle, "--check")[0].returncode == 0


def test_somebody_elses_folder_is_left_alone(bundle):
    place = bundle.parent / "home" / "lora-lab"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    done, _ = run(bundle)
    assert done.returncode == 1 and "move it away, or set LORA_LAB" in done.stderr
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(not shutil.which("sh"), reason="no shell")
def test_the_shell_script_finds_a_python_and_says_so_if_there_is_none(bundle, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in ("sh", "dirname"):
        (bin / tool).symlink_to(shutil.which(tool))
    script = ["sh", str(bundle / "start.sh"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, env={"PATH": str(bin)})
    assert done.returncode == 1 and done.stderr.startswith("error: no Python here")
    (bin / "python3").symlink_to(sys.executable)
    done = subprocess.run(script, capture_output=True, text=True, env={"PATH": str(bin)})
    assert done.returncode == 0 and "Every file is as it was made." in done.stdout


def test_the_scripts_for_macos_and_windows_start_the_same_program():
    command, batch = (make_bundle.HANDED_OUT / name for name in ("start.command", "start.bat"))
    assert "start.sh" in command.read_text() and os.access(command, os.X_OK)
    lines = batch.read_bytes()
    assert lines.count(b"\r\n") == lines.count(b"\n") and lines.count(b"start.py") == 2


def test_a_bundle_serves_every_patch_version_of_its_python():
    """Found the hard way: made with 3.11.7, the bundle lacked what pip wants with Debian's 3.11.2."""
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    here, other = "python_full_version >= '3.0'", f"python_full_version < '{minor}.1'"
    lock = f"""# a comment
both==1.0 \\
    --hash=sha256:00
soup==2.0 ; {here} \\
    --hash=sha256:11
soup==1.0 ; {other} \\
    --hash=sha256:22 \\
    --hash=sha256:33
windows==1.0 ; sys_platform == 'plan9' \\
    --hash=sha256:44
"""
    entries = make_bundle.for_other_patches(lock)
    expected = (
        [] if sys.version_info[2] == 0 else ["soup==1.0 \\\n    --hash=sha256:22 \\\n    --hash=sha256:33"]
    )
    assert entries == expected


def test_wheels_of_an_earlier_lock_are_dropped(tmp_path):
    (tmp_path / "numpy-1.0-py3-none-any.whl").write_bytes(b"old")
    make_bundle.drop_outdated(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_course_in_a_bundle_is_what_is_committed(tmp_path):
    """And not a file that somebody has half written: such a bundle could not even import labkit."""
    number = make_bundle.copy_course(tmp_path)
    course = tmp_path / "course"
    names = {path.relative_to(course).as_posix() for path in course.rglob("*") if path.is_file()}
    wanted = "Makefile scripts/setup_env.py requirements/all.lock notebooks/02_lora_from_scratch.ipynb labkit/__init__.py"
    assert set(wanted.split()) <= names and number == len(names)
    assert not [name for name in names if name.startswith((".venv", "build/", ".git/"))]
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "-z", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0:
        assert names == {name for name in listed.stdout.split("\0") if name}

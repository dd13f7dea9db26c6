"""A process in which some packages are not installed, and which has no network: see `sitecustomize.py`."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def environment(
    folder: Path, packages: Iterable[str] = (), root: Path = ROOT, **variables: str
) -> dict[str, str]:
    """The environment of a process from which `packages` are hidden, and labkit's own installation.

    Connections that it tries are noted in `folder / "attempts"`.
    """
    paths = [str(Path(__file__).parent), str(root)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HIDDEN_PACKAGES": " ".join(packages),
        "HIDDEN_DISTRIBUTIONS": "labkit",  # a checkout that nobody installed
        "NETWORK_ATTEMPTS": str(folder / "attempts"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(
    arguments: Iterable[str],
    folder: Path,
    packages: Iterable[str] = (),
    root: Path = ROOT,
    before: Iterable[str] = (),
    **variables: str,
) -> subprocess.CompletedProcess:
    """Run Python in the checkout at `root`, in such an environment; `before` is a command that starts it."""
    return subprocess.run(
        [*before, sys.executable, *arguments],
        cwd=root,
        env=environment(folder, packages, root, **variables),
        capture_output=True,
        text=True,
    )

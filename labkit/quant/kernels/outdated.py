"""Forget compiled kernels that are older than their sources.

numba keeps what it has compiled beside the package, and compiles again when the file that holds a kernel has
changed. It does not know that the kernel calls functions of other files: after an update of only those, the
old kernels would still run.
"""

from contextlib import suppress
from pathlib import Path


def forget_outdated(folder: Path) -> None:
    """Remove what numba has kept of the files in `folder`, if one of them has changed since."""
    changed = max(source.stat().st_mtime for source in folder.glob("*.py"))
    with suppress(OSError):  # not allowed, since installed for all users; or another process was faster
        for kept in (folder / "__pycache__").glob("*.nb[ic]"):
            if kept.stat().st_mtime < changed:
                kept.unlink(missing_ok=True)

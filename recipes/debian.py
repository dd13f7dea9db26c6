"""Text from Debian packages: fetched with `apt-get download`, unpacked with `dpkg-deb -x`, and never
installed.

A licence file and a checksum come with every package.
"""

import hashlib
import subprocess
from pathlib import Path


def unpack(package: str, work: Path, debs: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Fetch a Debian package into `work`, unless it is there already or in `debs`, and unpack it.

    Returns:
        the folder `work`/`package` with its files; and of the package its `file` name, with the version, and
        `sha256`.

    Raises:
        RuntimeError: apt-get or dpkg-deb failed, or the package is not in `debs`.
    """
    if debs is None and not any(work.glob(f"{package}_*.deb")):
        run(["apt-get", "download", package], cwd=work)
    files = sorted((debs or work).glob(f"{package}_*.deb"))
    if not files:
        raise RuntimeError(f"{debs or work} has no {package}_*.deb; get it with: apt-get download {package}")
    run(["dpkg-deb", "-x", str(files[-1].resolve()), package], cwd=work)
    return work / package, {
        "file": files[-1].name,
        "sha256": hashlib.sha256(files[-1].read_bytes()).hexdigest(),
    }


def run(command: list[str], cwd: Path) -> str:
    """Run a program and return what it prints.

    Raises:
        RuntimeError: the program is missing or fails; says what to do.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise RuntimeError(
            f"{command[0]} is missing: this step needs Debian 12 on x86-64. Elsewhere, fetch and unpack the "
            "packages there and pass the folder of .deb files with --debs"
        ) from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout

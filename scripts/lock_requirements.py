"""Write requirements/*.lock: every package that `make setup` installs, with its hashes.

The versions are those of constraints.txt; uv adds what other platforms and Python versions need, and the sha256 of
every file of each version.

    all.lock          what the lessons and the tests need, but for PyTorch
    bench.lock        what `make bench` needs besides; classroom.lock: what a classroom with nbgrader does
    peers.lock        llama.cpp, which `make test` holds exported files against
    interpreter.lock  Triton, in whose interpreter `make test` runs the GPU's kernels; torch.lock has it on Linux
    torch.lock        PyTorch as PyPI has it, and on Linux the CUDA libraries that it needs there
    torch-cpu.lock    its CPU builds, which PyTorch's own index has under versions such as 2.13.0+cpu

    python scripts/lock_requirements.py
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("notebook", "lab", "test", "docs", "serve")  # of pyproject.toml, for everyone
BESIDES = ("bench", "classroom", "peers")  # each in a lock of its own
WITH_TORCH = ("torch==", "cuda-", "nvidia-", "triton==")
CPU_BUILDS = (
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
)  # CPython 3.11, Linux x86-64


def resolve(extras: Iterable[str]) -> list[str]:
    """The entries that uv makes of pyproject.toml with these extras and constraints.txt, for all platforms."""
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder) / "build.in"
        build.write_text("setuptools\n")  # builds labkit itself
        out = Path(folder) / "lock"
        command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--universal"]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "--python-version", "3.11"]
        command += ["--constraint", "constraints.txt", "--output-file", str(out)]
        command += [word for extra in extras for word in ("--extra", extra)]
        subprocess.run([*command, "pyproject.toml", str(build)], cwd=ROOT, check=True)
        return re.split(r"\n(?=\S)", out.read_text().strip())


def main() -> None:
    entries = resolve(EXTRAS)
    torch = [entry for entry in entries if entry.startswith(WITH_TORCH)]
    version = next(entry.split()[0] for entry in torch if entry.startswith("torch=="))
    locks = {
        "all": [entry for entry in entries if entry not in torch],
        "torch": torch,
        "interpreter": [entry for entry in torch if entry.startswith("triton==")],
        "torch-cpu": [f"{version}+cpu" + "".join(f" \\\n    --hash=sha256:{one}" for one in CPU_BUILDS)],
    }
    for extra in BESIDES:
        locks[extra] = [entry for entry in resolve([*EXTRAS, extra]) if entry not in entries]
    (ROOT / "requirements").mkdir(exist_ok=True)
    for name, packages in locks.items():
        head = "# Made by `make lock` from constraints.txt; pip checks every file against these hashes.\n"
        (ROOT / "requirements" / f"{name}.lock").write_text(head + "".join(f"{one}\n" for one in packages))
        print(f"requirements/{name}.lock: {len(packages)} packages")


if __name__ == "__main__":
    main()

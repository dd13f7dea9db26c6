"""The one way in which labkit writes files that others read: whole or not at all.

A file (`new_file`) or a whole folder (`new_folder`) is made in a scratch folder beside its place,
`.NAME.1a2b3c4d.part`, brought to the disk, given the permissions that the umask allows, and then put in its place
by one rename. Whoever looks, and whatever is killed, sees the old one or the new one. The scratch folder holds a
lock while its writer lives; the next writer to the same place takes away those whose writer does not
(`clear_leftovers`), so that a kill leaves nothing for ever.
"""

import ctypes
import errno
import glob
import json
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

LOCK, OLD = ".lock", ".old"  # inside a scratch folder
IN_THE_WAY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "writing there is not permitted",
    errno.EPERM: "writing there is not permitted",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EIO: "the disk reports an error",
    errno.EBUSY: "it is the root of a disk, or in use; name a folder inside it",
    errno.EXDEV: "it is the root of another disk; name a folder inside it",
}
MOVED_MEANWHILE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)  # put there, or taken away, by another


class CannotWrite(OSError):
    """A file or folder could not be written; the message says which, why, and that the old one is intact."""


class InUse(RuntimeError):
    """Another process is using what only one may use at a time."""


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; at the end of the block the file replaces the one at `path`.

    Nothing changes at `path` if the block raises.

    Raises:
        CannotWrite: no space, no permission; the old file is intact.
    """
    place = Path(os.path.realpath(path))  # where a link leads
    with explained(path), scratch_beside(place) as scratch:
        made = scratch / place.name
        yield made
        settle(made, scratch)
        os.replace(made, place)
        bring_to_disk(place.parent)


@contextmanager
def new_folder(path: str | Path, take_along: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """Give an empty temporary folder to fill; at the end of the block it replaces the one at `path`.

    On Linux and macOS the two change places in one step. Elsewhere there is an instant between two renames in
    which there is nothing at `path`; if the process is killed right then, `clear_leftovers` puts the old one
    back.

    Args:
        path: of the folder.
        take_along: what is to stay of the old folder: called with it and the new one before they change places,
            and once more after, for what has come in between.

    Raises:
        CannotWrite: no space, no permission, or a file at `path`; what was there is intact.
    """
    place = Path(os.path.realpath(path))
    with explained(path), scratch_beside(place) as scratch:
        made = scratch / place.name
        made.mkdir()
        yield made
        for file in [f for f in made.rglob("*") if f.is_file() and not f.is_symlink()]:
            settle(file, scratch)
        if place.exists() and not place.is_dir():
            raise CannotWrite(
                f"cannot write the folder {path}: there is a file of that name; give another name"
            )
        if take_along is not None and place.exists():
            take_along(place, made)
        bring_to_disk(made)
        put_in_place(made, place, scratch / OLD)
        old = next((folder for folder in (scratch / OLD, made) if folder.exists()), None)
        if take_along is not None and old is not None:
            take_along(old, place)  # what has come since
        bring_to_disk(place.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) by way of `new_file`."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object, indent: int | None = 2) -> None:
    """Write JSON by way of `new_file`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def only_one(path: str | Path, taken: str, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `path` during the block.

    Args:
        path: of the lock file, which stays.
        taken: what to say if another process holds it.
        wait: seconds to wait for it; -1 for as long as it takes.

    Raises:
        InUse: with `taken` as its message.
        CannotWrite: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        with explained(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=wait)
    except Timeout:
        raise InUse(taken) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def scratch_beside(place: Path) -> Iterator[Path]:
    """A locked temporary folder beside `place`, gone at the end, after those of killed writers are cleared."""
    place.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(place)
    while True:
        scratch = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.part"
        scratch.mkdir()
        lock = FileLock(scratch / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):
            continue  # another writer took it for a leftover, between mkdir and here, and holds it or has taken it away
        except OSError:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if (scratch / LOCK).exists():
            break
        lock.release()
    try:
        yield scratch
    finally:
        lock.release()
        shutil.rmtree(scratch, ignore_errors=True)


def clear_leftovers(place: Path) -> None:
    """Take away what killed writers to `place` left beside it; put back what one had just moved out of the way."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.????????.part"):
        lock = FileLock(left / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue  # its writer lives, or it is another user's
        if (left / OLD).exists() and not place.exists():
            os.replace(left / OLD, place)
        lock.release()
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say in one sentence why `path` cannot be written, where the system has a reason that a user can mend."""
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else number_in(str(error))
        if number not in IN_THE_WAY:
            raise
        cannot = CannotWrite(f"cannot write {path}: {IN_THE_WAY[number]}; what was there before is intact")
        cannot.errno = number
        raise cannot from error


def number_in(message: str) -> int | None:
    """The system's error number in a message of safetensors: "... (os error 28)"."""
    _, found, rest = message.partition("(os error ")
    digits = rest.partition(")")[0]
    return int(digits) if found and digits.isdigit() else None


def put_in_place(made: Path, place: Path, old: Path) -> None:
    """Move the folder `made` to `place`. A folder there ends up at `made`, or at `old` where two cannot change places.

    Others may write and take away the same folder meanwhile: whoever comes last stays.
    """
    while True:
        try:
            if place.exists():
                if exchange(made, place):
                    return
                shutil.rmtree(old, ignore_errors=True)
                os.replace(place, old)
            os.replace(made, place)
            return
        except OSError as error:
            if error.errno not in MOVED_MEANWHILE or not made.exists():
                raise


def settle(file: Path, scratch: Path) -> None:
    """Bring a file to the disk, with the permissions that the umask allows (safetensors gives only the owner's)."""
    if os.name == "posix":
        file.chmod(stat.S_IMODE(scratch.stat().st_mode) & 0o666)  # mkdir has just applied the umask
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def bring_to_disk(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            pass  # some network file systems cannot
        finally:
            os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    if sys.platform == "linux":
        name, arguments = (
            "renameat2",
            (-100, os.fsencode(one), -100, os.fsencode(other), 2),
        )  # AT_FDCWD, EXCHANGE
    elif sys.platform == "darwin":
        name, arguments = "renamex_np", (os.fsencode(one), os.fsencode(other), 2)  # RENAME_SWAP
    else:
        return False
    call = getattr(ctypes.CDLL(None), name, None)
    return call is not None and call(*arguments) == 0

"""The lower tier of a pager: where optimizer state lies while it is not needed.

On a CPU that is a file, read and written with `pread` and `pwrite`. (On CUDA it is host memory:
`labkit.optim.pinned_store`.)

Why not map the file into memory: a mapped page that was touched counts as resident until the *kernel* drops
it, so the budget would be a wish. With `pread` the hot state is ordinary memory. The kernel may cache the
file, and gives that up when a program needs memory.

Why a file without a name: it is unlinked the moment it is made (on Windows: opened to be deleted on close).
However the process ends, even by `kill -9`, the system frees the space. Why the space is reserved first
(`posix_fallocate`): a full disk then says so before a parameter has changed.
"""

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from labkit.paths import cache_folder

FRAME = 4096  # bytes, of the system's memory and of a slot
# all of it at once: one processor fault per 4 KiB takes longer than reading them
POPULATED = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE}
    if hasattr(mmap, "MAP_POPULATE")
    else {}
)
LIBC = ctypes.CDLL(None) if os.name == "posix" else None


class Slot(NamedTuple):
    """A piece of the store.

    Attributes:
        place: in a file, the distance from its start in bytes; in host memory, a pinned tensor.
        size: bytes.
    """

    place: Any
    size: int


class Placed(NamedTuple):
    """A tensor, and its distance from the start of the slot in bytes."""

    at: int
    tensor: Tensor


class PendingRead(Protocol):
    """A read under way."""

    def result(self) -> None:
        """Wait until it is done; raises what the read raises."""


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor in the order in which they lie in memory, as a view: (nbytes,) uint8."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def rounded(nbytes: int) -> int:
    """Bytes in whole frames of the system."""
    return -(-nbytes // FRAME) * FRAME


class FileStore:
    """State in a nameless file.

    Args:
        folder: where; created if it is missing. Default: `paging` in labkit's cache folder (LABKIT_CACHE).

    Raises:
        OSError: the folder cannot be created or written to.
    """

    device_type = "cpu"

    def __init__(self, folder: str | Path | None = None):
        if folder is None:
            folder = cache_folder() / "paging"
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(
                f"store={folder!r} must be the path of a folder, or None for labkit's cache folder"
            )
        self.folder = Path(folder).expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # until `close`
        except OSError as error:
            raise type(error)(
                error.errno,
                f"the page store cannot use the folder {self.folder} ({error.strerror}); give store= a "
                "folder that you may write to, on a disk",
            ) from error
        if is_in_memory(self.folder):
            warnings.warn(
                f"{self.folder} lies in memory (tmpfs): state that is paged out there saves nothing; give "
                "store= a folder on a disk",
                stacklevel=4,
            )
        self.end = 0
        self.free: dict[int, list[int]] = {}  # places by size
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="labkit-paging")

    def memory(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 that the system gets back as soon as nobody refers to it.

        Why not `torch.empty`: the C library keeps freed blocks for later and rarely finds one that fits.
        Under a budget of 60 MB the process was measured to hold 421 MB, most of it "free".
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(-1, nbytes, **POPULATED), dtype=torch.uint8)

    def let_go(self, memory: Tensor) -> None:
        """Nothing: what was computed with `memory` is done."""

    def give_back(self) -> None:
        """Ask the C library (glibc) to return freed memory to the system: an optimizer's temporaries."""
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)

    def __reduce__(self):
        raise TypeError(
            "a page store cannot be copied or pickled: its file is one process's. Copy or pickle the optimizer "
            "(its copy has all state in memory), or send its state_dict()"
        )

    def reserve(self, nbytes: int) -> Slot:
        """A slot of at least `nbytes`, with the disk space allocated.

        Raises:
            OSError: the disk is full.
        """
        size = rounded(nbytes)
        if self.free.get(size):
            return Slot(self.free[size].pop(), size)
        if size:
            try:
                allocate(self.file.fileno(), self.end, size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the page store in {self.folder} cannot grow from {self.end:,} to {self.end + size:,} "
                    f"bytes ({error.strerror}); the disk has {shutil.disk_usage(self.folder).free:,} free. "
                    "No parameter and no state was changed. Free some space, give store= another folder, or "
                    "a larger budget",
                ) from error
        slot = Slot(self.end, size)
        self.end += size
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        self.free.setdefault(slot.size, []).append(slot.place)

    def write(self, slot: Slot, tensors: list[Placed]) -> None:
        """Copy tensors into a slot.

        Raises:
            OSError: the write failed; the tensors are as they were.
        """
        for at, tensor in tensors:
            transfer(os.pwrite, self.file.fileno(), raw(tensor), slot.place + at)

    def read(self, slot: Slot, tensors: list[Placed]) -> None:
        """Fill tensors from a slot."""
        for at, tensor in tensors:
            transfer(read_into, self.file.fileno(), raw(tensor), slot.place + at)

    def start_reading(self, slot: Slot, tensors: list[Placed]) -> PendingRead:
        """The same in the background; `.result()` waits for it."""
        return self.thread.submit(self.read, slot, tensors)

    def close(self) -> None:
        """Free the disk space."""
        self.thread.shutdown()
        self.file.close()


def read_into(fd: int, buffer: memoryview, place: int) -> int:
    """`os.pread` into memory that is there."""
    return os.preadv(fd, [buffer], place)


def transfer(call: Callable[[int, memoryview, int], int], fd: int, data: Tensor, place: int) -> None:
    """Go on until all bytes are there: a system call may do less than it is asked for."""
    buffer = memoryview(data.numpy())
    while buffer:
        done = call(fd, buffer, place)
        if not done:
            raise OSError(errno.EIO, f"the page store ends at byte {place}; was its file cut short?")
        buffer, place = buffer[done:], place + done


def allocate(fd: int, place: int, size: int) -> None:
    """Make sure that `size` bytes from `place` have space on the disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, place, size)
    else:  # macOS
        os.pwrite(fd, bytes(size), place)


def is_in_memory(folder: Path) -> bool:
    """Is the folder on a file system that keeps its files in memory? Known on Linux only, elsewhere False."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return False
    kinds = {Path(m): kind for _, m, kind, *_ in map(str.split, mounts.read_text().splitlines())}
    real = folder.resolve()
    return next((kinds[p] for p in (real, *real.parents) if p in kinds), "") in ("tmpfs", "ramfs")

"""Limits of a process that runs what students wrote: memory, time, size of files, and which files at all.

    memory    RLIMIT_DATA: what it has now, and `memory` bytes more; a larger array is a MemoryError
    time      RLIMIT_CPU: seconds of computing in all; the system ends what goes on (`nbgrader` limits each cell)
    files     RLIMIT_FSIZE for each; and Landlock (Linux 5.13): read `readable`, write `writable`, nothing else
    network   Landlock (Linux 6.7): no connection by TCP

Why Landlock and not a container: it needs no rights, no daemon and no image, and a process can only ever tighten it.
Python's audit hooks would be simpler, and stop nobody who has ctypes. What is not covered: processes that it starts
share these limits but count anew; UDP; and root may raise the first three again, so grade as a user without rights.

Source: `man landlock`, `man setrlimit`; the numbers are those of `include/uapi/linux/landlock.h`.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
REFER, TRUNCATE, DEVICE = 1 << 13, 1 << 14, 1 << 15  # since versions 2, 3 and 5
RIGHTS = {1: REFER - 1, 2: TRUNCATE - 1, 3: DEVICE - 1, 4: DEVICE - 1}  # all rights that a version knows
CONNECT_TCP = 2
READ, FILES = EXECUTE | READ_FILE | READ_DIR, EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | DEVICE
NO_NEW_PRIVILEGES = 38  # of prctl


class Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))


class Beneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def landlock_version() -> int:
    """The version of Landlock that this system has; 0 for none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, ctypes.CDLL(None, use_errno=True).syscall(CREATE_RULESET, None, 0, 1))


def confine(readable: Iterable[str | Path], writable: Iterable[str | Path]) -> bool:
    """From now on this thread, and what it starts, reads and writes only beneath these paths.

    Args:
        readable, writable: files and folders; what does not exist is left out. What is writable is readable, too.

    Returns:
        False where the system has no Landlock: nothing has changed then.

    Raises:
        OSError: the system refuses.
    """
    version = landlock_version()
    if not version:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    rights = RIGHTS.get(version, 2 * DEVICE - 1)
    wanted = Ruleset(rights, CONNECT_TCP if version >= 4 else 0)
    size = ctypes.sizeof(wanted) if version >= 4 else 8
    rules = checked(libc.syscall(CREATE_RULESET, ctypes.byref(wanted), size, 0))
    for paths, allowed in ((readable, READ), (writable, rights)):
        for path in paths:
            add_rule(libc, rules, Path(path), allowed & rights)
    checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    checked(libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)
    return True


def add_rule(libc: ctypes.CDLL, rules: int, path: Path, allowed: int) -> None:
    """Allow something beneath a path, if it is there."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not path.is_dir():
        allowed &= FILES
    rule = Beneath(allowed, descriptor)
    checked(libc.syscall(ADD_RULE, rules, 1, ctypes.byref(rule), 0))
    os.close(descriptor)


def checked(result: int) -> int:
    """`result` of a system call.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result


def data_bytes() -> int:
    """What this process holds that RLIMIT_DATA counts; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:")), 0)


def limit(memory: int, seconds: int, file_bytes: int) -> None:
    """Limit this process, and what it starts.

    Args:
        memory: bytes beyond what it holds now.
        seconds: of computing, from its start.
        file_bytes: of a file that it writes.
    """
    lower(resource.RLIMIT_DATA, data_bytes() + memory)
    lower(resource.RLIMIT_CPU, seconds)
    lower(resource.RLIMIT_FSIZE, file_bytes)
    lower(resource.RLIMIT_CORE, 0)


def lower(what: int, to: int) -> None:
    """Set a limit, soft and hard, never above the one that is there."""
    _, hard = resource.getrlimit(what)
    to = to if hard == resource.RLIM_INFINITY else min(to, hard)
    resource.setrlimit(what, (to, to))

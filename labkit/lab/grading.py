"""The kernel in which nbgrader runs what students wrote: `python -m labkit.lab.grading -f CONNECTION_FILE`.

`make classroom` names it in the course folder. It is IPython's kernel with three things more:

1. Limits (`labkit.lab.sandbox`): memory, computing time, files; it writes to its own folder and a temporary one, and
   cannot read the lessons, the course folder, the gradebook, other students' work or the home folder.
2. A check (`lab.check.NAME(NAME)`, a cell of its own) runs with the functions that labkit had before the student's
   first cell. If the notebook has changed any of them, before or during the check, the check fails and says which.
3. A check that fails says what it looks like, and shows none of its code.

Student and check share a process, so this stops what is done in five minutes, not somebody with an afternoon: one can
walk the stack from a function to the check that called it, or restore what one has changed. Read what got full marks.
"""

import builtins
import json
import math
import os
import random
import re
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp

from labkit import lab
from labkit.hardware import switch
from labkit.lab.check.compare import GRADING
from labkit.lab.sandbox import confine, limit
from labkit.paths import CHECKOUT, cache_folder, data_folder

MEMORY, SECONDS, FILE_BYTES = 3 * 2**29, 600, 64 * 2**20  # 1.5 GiB beyond torch; ten minutes; 64 MiB
CHECK = re.compile(r"(?:lab\.)?check\.\w+\(\w+\)")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/proc", "/sys", "/dev")
DEVICES = ("/dev/null", "/dev/shm", "/dev/tty")
UNSAFE = (
    "warning: this system has no Landlock (Linux 5.13 or newer): what students wrote can read and write every file "
    "that you can. Grade in a container, or as a user who owns nothing."
)


def parts_of(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What of a module decides what its functions do: (name, object), and the insides of functions and classes."""
    for name, value in list(vars(module).items()):
        where = f"{module.__name__}.{name}"
        if callable(value) or isinstance(value, ModuleType):
            yield where, value
        if isinstance(value, FunctionType):
            yield f"{where}.__code__", value.__code__
            yield f"{where}.__defaults__", value.__defaults__
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield from (
                (f"{where}.{key}", inside) for key, inside in list(vars(value).items()) if callable(inside)
            )


class Guard:
    """What labkit, and what it calls by name, was when the guard was made."""

    def __init__(self) -> None:
        ours = [
            m for name, m in list(sys.modules.items()) if name.split(".")[0] == "labkit" and m is not None
        ]
        self.modules = [*ours, builtins, torch, random, math, json]
        self.before = {name: value for module in self.modules for name, value in parts_of(module)}

    def changed(self) -> list[str]:
        """The names of what is no longer what it was."""
        now = {name: value for module in self.modules for name, value in parts_of(module)}
        return [name for name, value in self.before.items() if now.get(name) is not value]


class GradingKernel(IPythonKernel):
    """IPython's kernel, with a guard around checks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._guard = Guard()

    async def do_execute(self, code: str, silent: bool, *rest: Any, **options: Any) -> Any:
        """Run a cell; a check only with an untouched labkit."""
        if not CHECK.fullmatch(code.strip()):
            return await super().do_execute(code, silent, *rest, **options)
        self.shell.user_ns.update(lab=lab, check=lab.check)
        changed = self._guard.changed()
        reply = await super().do_execute(refusal(changed) if changed else code, silent, *rest, **options)
        if not changed and (during := self._guard.changed()):
            reply = await super().do_execute(refusal(during), silent, *rest, **options)
        return reply


def refusal(changed: list[str]) -> str:
    """A cell that fails, and says why."""
    shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    said = f"this notebook changes {shown}, which the check needs as it is; no points before that is undone"
    return f"from labkit.lab.check.compare import NotYet as _NotYet\nraise _NotYet({said!r})"


def readable() -> list[str | Path]:
    """What a lesson's exercises need to read: the system, Python and its packages, labkit, its data, the models."""
    python = [*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *site.getsitepackages()]
    imports = [entry for entry in sys.path if entry and Path(entry).resolve() != CHECKOUT]
    ours = [CHECKOUT / "labkit", data_folder(), cache_folder()]
    return [*SYSTEM, *python, *imports, *ours]


def writable(connection_file: str) -> list[str | Path]:
    """The folder that the kernel was started in, one for temporary files, and the connection file."""
    temporary = tempfile.mkdtemp(prefix="labkit-grading-")
    tempfile.tempdir = temporary
    os.environ.update(
        TMPDIR=temporary, MPLCONFIGDIR=temporary, IPYTHONDIR=temporary, NUMBA_CACHE_DIR=temporary
    )
    return [*DEVICES, Path.cwd(), temporary, connection_file]


def main(arguments: list[str]) -> None:
    """Set the limits, then start the kernel.

    Args:
        arguments: `-f` and the connection file, as Jupyter gives them, and whatever else it gives.
    """
    os.environ.update(
        {GRADING: "yes", "LABKIT_PROGRESS": "no", "LABKIT_STATIC": "yes", "HF_HUB_OFFLINE": "1"}
    )
    connection_file = arguments[arguments.index("-f") + 1]
    if not confine(readable(), writable(connection_file)):
        print(UNSAFE, file=sys.stderr, flush=True)
        if not switch("LABKIT_GRADING_UNSAFE", False):
            sys.exit("set LABKIT_GRADING_UNSAFE=yes to grade all the same")
    limit(MEMORY, SECONDS, FILE_BYTES)
    IPKernelApp.launch_instance(argv=arguments, kernel_class=GradingKernel)


if __name__ == "__main__":
    main(sys.argv[1:])

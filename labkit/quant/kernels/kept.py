"""Compiled kernels, kept from one process to the next, so that only the first waits for the compiler.

What numba keeps is looked up by the file of one function, though a kernel calls functions of others; it is believed
without a look at its bytes; and with no folder to keep it in, numba refuses to compile. Here

- the name of what is kept is a hash of all that it was made from: the sources of this folder and the kernel's own file, the
  versions of numba and LLVM, the processor, the variables that steer numba;
- the file begins with a hash of its bytes. Damaged or cut off, it counts as missing, and is replaced;
- two processes at once, or a kill, leave a whole file (`labkit.files`);
- with no place to write, kernels are compiled anew in each process, with one warning.
"""

import hashlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from labkit.files import writing
from labkit.paths import user_cache_dir

SOURCES = Path(__file__).parent
DIGEST = 32  # bytes of a sha256


def compiled(signature: Any) -> Callable[[Callable], CFunc]:
    """A decorator like `numba.cfunc(signature)`; what it compiles is kept."""

    def compile_or_load(function: Callable) -> CFunc:
        kernel = CFunc(function, normalize_signature(signature), locals={}, options={})
        kernel._cache = Kept(function.__name__, Path(function.__code__.co_filename))  # type: ignore[attr-defined]
        kernel.compile()
        return kernel

    return compile_or_load


class Kept:
    """Where a `CFunc` of numba asks for what it has compiled before, and hands over what it has compiled now."""

    def __init__(self, name: str, source: Path):
        self.name, self.source = name, source

    def load_overload(self, signature: Any, target: Any) -> CompileResult | None:
        """What was compiled before from the same; None if there is none, or it is damaged."""
        target.refresh()
        name = file_name(self.name, target.codegen().magic_tuple(), self.source)
        for folder in folders():
            try:
                content = (folder / name).read_bytes()
                if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]:
                    return CompileResult._rebuild(target, *pickle.loads(content[DIGEST:]))
            except OSError:
                continue
        return None

    def save_overload(self, signature: Any, result: CompileResult) -> None:
        """Keep it in the first folder that can be written, in place of what older sources made there."""
        payload = dumps(result._reduce())
        name = file_name(self.name, result.codegen.magic_tuple(), self.source)
        reasons = []
        for folder in folders():
            try:
                with writing.new_file(folder / name) as part:
                    part.write_bytes(hashlib.sha256(payload).digest() + payload)
                forget_older(folder, name)
                return
            except OSError as error:
                reasons.append(f"{folder} ({str(error).partition(': ')[2].partition(';')[0] or error})")
        warn_once("; ".join(reasons))


def file_name(task: str, processor: tuple, source: Path) -> str:
    """TASK.MACHINE.SOURCES.kernel; the last two are hashes. The task stands in the file `source`."""
    steering = {k: v for k, v in os.environ.items() if k.startswith("NUMBA_") and "CACHE" not in k}
    machine = sys.version, numba.__version__, llvmlite.__version__, processor, sorted(steering.items())
    sources = hash_sources(SOURCES, None if source.parent == SOURCES else source)
    return f"{task}.{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.{sources}.kernel"


@cache
def hash_sources(folder: Path, another: Path | None) -> str:
    """A hash of all sources of a folder, and of another one, with their names."""
    digest = hashlib.sha256()
    for source in [*sorted(folder.glob("*.py")), *([another] if another else [])]:
        digest.update(f"{source.name} {source.stat().st_size} ".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def folders() -> list[Path]:
    """Where kernels are kept: NUMBA_CACHE_DIR alone, if it is set; else beside the sources, or in the user's cache."""
    of_these_sources = (
        f"labkit-{hashlib.sha256(os.fsencode(SOURCES)).hexdigest()[:16]}"  # another copy has others
    )
    chosen = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    if chosen:
        return [Path(chosen).absolute() / of_these_sources]
    users = Path(user_cache_dir("labkit"), "kernels")
    # a user without a home, as in a container, has no cache either
    return [SOURCES / "__pycache__", *([users / of_these_sources] if users.is_absolute() else ())]


def forget_older(folder: Path, name: str) -> None:
    """Remove what other sources made of the same task for the same machine."""
    task, machine, _, _ = name.split(".")
    for other in folder.glob(f"{task}.{machine}.*.kernel"):
        if other.name != name:
            other.unlink(missing_ok=True)


@cache
def warn_once(reasons: str) -> None:
    """Say that kernels are compiled in every process; all tasks have the same reasons, so once."""
    warnings.warn(
        "the compiled 4-bit kernels cannot be kept, so every process compiles them anew, which takes some seconds: "
        f"{reasons}. To keep them, set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )

"""Run a compiled task on the threads that PyTorch's own operations use.

A task is a C function, `void task(int64_t *arguments)`, compiled by numba. `arguments[0]` counts the parts of
the work that are taken, `arguments[1]` is their number, and the rest are addresses and sizes that the task
knows. Every thread that calls the task takes one part after another until none is left. So it does not matter
how many threads come, or that one comes late, and no thread runs a line of Python or waits for the
interpreter lock.

Why PyTorch's own OpenMP threads, called through C: after a matrix multiplication they stay awake for a while,
waiting for more, and any other thread would have to share a core with one of them. Where that runtime is not
found, and in a forked process, where it must not be used, Python threads call the same task.
"""

import ctypes
import os
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

SERIAL_BELOW = 1 << 16  # weights; below this, handing work to a thread costs more than it saves
# Small work is cut into one part per thread, so each thread finds its share of the result in its own cache
# the next time. Large work is cut into several, so a thread that comes late leaves some to the others.
PARTS_PER_THREAD = 4
PART = 1 << 17  # weights in a part, at least, where there are several per thread

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def find_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, PyTorch's on Linux; None if it does not have GNU's entry point."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (AttributeError, OSError, TypeError):
        return None
    return library


_openmp = find_openmp()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    """A forked child has only its first thread; OpenMP would wait for the others forever."""
    global _openmp, _lock, _pool
    _openmp, _lock, _pool = None, threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(task: int, units: int, weights: int, *arguments: int) -> None:
    """Run a task to its end.

    Args:
        task: address of the C function.
        units: the largest number of parts that the work can be cut into.
        weights: how many weights are worked on; a few are not worth more than one thread.
        arguments: the task's `arguments[2:]`.
    """
    threads = 1 if weights < SERIAL_BELOW else min(torch.get_num_threads(), units)
    most = PARTS_PER_THREAD * threads
    parts = 1 if threads == 1 else min(units, max(threads, min(most, weights // PART)))
    # int64; made and read in a third of the time of a ctypes array
    block = array("q", (0, parts, *arguments))
    address, _ = block.buffer_info()
    if threads == 1:
        Task(task)(address)
    elif _openmp is not None:
        _openmp.GOMP_parallel(task, address, threads, 0)
    else:
        run_in_pool(Task(task), address, threads)


def run_in_pool(task: Callable[[int], None], block: int, threads: int) -> None:
    """Call the task in this thread and in `threads - 1` others."""
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < threads - 1:
            _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="labkit-kernel")
        pool = _pool
    others = [pool.submit(task, block) for _ in range(threads - 1)]
    task(block)
    for other in others:
        other.result()

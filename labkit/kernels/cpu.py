"""Four-bit quantize and dequantize for a CPU, compiled by numba on first use and cached beside the package.

Dequantizing is bound by memory: half a byte is read and four are written for each weight, so the work per weight must
be next to nothing. A block has one scale and sixteen levels, so the sixteen products are made (and rounded to the
dtype) first, and a weight is one look-up in a table that fits a vector register: see `lookup.py`. Quantizing is bound
by the search for the nearest level: fifteen compares and adds, which the compiler turns into vector instructions, beat
a branching binary search.

Why PyTorch's own OpenMP threads, called through C: after a matrix multiplication they stay awake for a while, waiting
for more, and any other thread would have to share a core with one of them. Where that runtime is not found, and in a
forked process, where it must not be used, Python threads over a kernel that releases the interpreter lock do the work.

Agrees, bit for bit, with: `labkit.quant.quantize_blocks` and `dequantize_blocks`.
"""

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from labkit.codebooks import codes_by_rank, dynamic8, midpoints
from labkit.kernels.lookup import LANES, look_up

SERIAL_BELOW = 1 << 18  # weights; below this, handing work to a thread costs more than it saves
HUGE_PAGES_FROM = 1 << 22  # bytes

Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def find_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, PyTorch's on Linux; None if there is none with GNU's entry point."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = (Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        library.GOMP_parallel.restype = None
    except (AttributeError, OSError, TypeError):
        return None
    return library


_openmp = find_openmp()
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    """A forked child has no threads but its first; OpenMP would wait for the others forever."""
    global _openmp, _lock, _pool
    _openmp, _lock, _pool = None, threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_in_threads(job, n_blocks: int, n: int) -> None:
    """Call `job(first_block, last_block)` so that all `n_blocks` are covered, split over torch's thread count."""
    threads = 1 if n < SERIAL_BELOW else min(torch.get_num_threads(), n_blocks)
    edges = [n_blocks * i // threads for i in range(threads + 1)]
    if threads == 1:
        job(0, n_blocks)
    elif _openmp is not None:
        run_in_openmp(job, edges)
    else:
        run_in_pool(job, edges)


def run_in_openmp(job, edges: list[int]) -> None:
    """`job(edges[i], edges[i + 1])` for every i, on the threads that PyTorch's own operations use."""
    failures = []

    def body(_):
        try:  # fewer threads may come than were asked for
            for i in range(_openmp.omp_get_thread_num(), len(edges) - 1, _openmp.omp_get_num_threads()):
                job(edges[i], edges[i + 1])
        except BaseException as failure:  # may not leave through C
            failures.append(failure)

    _openmp.GOMP_parallel(Body(body), None, len(edges) - 1, 0)
    if failures:
        raise failures[0]


def run_in_pool(job, edges: list[int]) -> None:
    """The same on Python threads."""
    global _pool
    others = len(edges) - 2
    with _lock:
        if _pool is None or _pool._max_workers < others:
            _pool = ThreadPoolExecutor(others, thread_name_prefix="labkit-kernel")
        pool = _pool
    waiting = [pool.submit(job, edges[i], edges[i + 1]) for i in range(1, others + 1)]
    job(edges[0], edges[1])
    for other in waiting:
        other.result()


@numba.njit(nogil=True, cache=True)
def _quantize(first, last, flat, mids, by_rank, blocksize, smallest, absmax, packed):
    n = flat.size
    bits, absmax_bits = flat.view(np.int32), absmax.view(np.int32)
    scaled = np.zeros(blocksize, np.float32)
    ranks = np.empty(blocksize, np.int32)
    repack = np.empty(256, np.uint8)  # a byte of two ranks to a byte of two codes
    sorted_codes = True
    for byte in range(256):
        repack[byte] = (by_rank[byte >> 4] << 4) | by_rank[byte & 15]
        sorted_codes &= repack[byte] == byte
    for block in range(first, last):
        start = block * blocksize
        values = flat[start : min(start + blocksize, n)]
        # without their sign bit floats sort like integers, and an integer maximum is a vector instruction;
        # infinity and NaN sort above every number, so that they show in absmax
        magnitudes = bits[start : start + values.size]
        largest = np.int32(0)
        for i in range(magnitudes.size):
            largest = max(largest, magnitudes[i] & np.int32(0x7FFFFFFF))
        absmax_bits[block] = largest
        floor = smallest if absmax[block] < smallest else absmax[block]  # NaN stays NaN
        if values.size == blocksize:
            reciprocal = np.float32(1) / floor
            for i in range(blocksize):
                scaled[i] = values[i] * reciprocal
        else:
            absmax[block] = floor
            for i in range(values.size):
                scaled[i] = values[i] / floor
            scaled[values.size] = 0  # the second half of an odd tail's last byte
        for i in range(blocksize):
            rank = np.int32(0)
            for k in range(15):
                rank += np.int32(scaled[i] > mids[k])
            ranks[i] = rank
        out = packed[start // 2 : (start + values.size + 1) // 2]
        for i in range(out.size):
            out[i] = (ranks[2 * i] << 4) | ranks[2 * i + 1]
        if not sorted_codes:
            for i in range(out.size):
                out[i] = repack[out[i]]


@numba.njit(nogil=True, cache=True)
def _dequantize(first, last, packed, absmax, levels, blocksize, out):
    scaled = np.empty(16, np.float32)
    table = scaled.view(np.uint32)
    half = blocksize // 2
    for block in range(first, last):
        scale = absmax[block]
        codes = packed[block * half : (block + 1) * half]
        values = out[block * blocksize : (block + 1) * blocksize]
        done = 0
        if LANES > 0:
            done = values.size // LANES * LANES
            for i in range(0, done, LANES):
                look_up(codes, i // 2, levels, scale, values, i)
        if done == values.size:
            continue
        for k in range(16):
            scaled[k] = levels[k] * scale
        if out.itemsize == 2:  # bfloat16 is the upper half of a float32, rounded to even
            for k in range(16):
                even = (table[k] >> np.uint32(16)) & np.uint32(1)
                table[k] = (table[k] + np.uint32(0x7FFF) + even) >> np.uint32(16)
        for i in range(done, values.size):
            values[i] = table[codes[i // 2] & 15] if i % 2 else table[codes[i // 2] >> 4]


@numba.njit(nogil=True, cache=True)
def _dequantize_scales(first, last, codes, nested, offset, levels, absmax):
    for block in range(first, last):
        absmax[block] = levels[codes[block]] * nested[block // 256] + offset


def quantize_4bit(flat: Tensor, levels: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `labkit.kernels.quantize_4bit`."""
    n = flat.numel()
    n_blocks = -(-n // blocksize)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(n_blocks)
    inputs = (
        flat.numpy(),
        midpoints(levels).numpy(),
        codes_by_rank(levels).numpy(),
        blocksize,
        np.float32(1e-38),
    )
    outputs = absmax.numpy(), packed.numpy().reshape(-1)
    run_in_threads(lambda first, last: _quantize(first, last, *inputs, *outputs), n_blocks, n)
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    blocksize: int,
    out: Tensor,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """See `labkit.kernels.dequantize_4bit`; writes to `out`, (n,) contiguous, float32, float16 or bfloat16."""
    if out.dtype == torch.float16:  # numba has no half precision on a CPU
        whole = empty(out.numel(), torch.float32, out.device)
        dequantize_4bit(packed, scales, levels, blocksize, whole, nested, offset)
        out.copy_(whole)
        return
    bytes_, table = packed.numpy().reshape(-1), levels.numpy()
    result = out.view(torch.uint16 if out.dtype == torch.bfloat16 else torch.uint32).numpy()
    absmax = (scales if nested is None else torch.empty(scales.numel())).numpy()
    if nested is not None:
        inputs = scales.numpy(), nested.numpy(), offset.numpy()[()], dynamic8().numpy()

    def job(first: int, last: int) -> None:
        if nested is not None:  # each thread makes the scales of its own blocks, which then are in its cache
            _dequantize_scales(first, last, *inputs, absmax)
        _dequantize(first, last, bytes_, absmax, table, blocksize, result)

    run_in_threads(job, scales.numel(), out.numel())


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result on `device`, the CPU.

    A fresh 64 MB costs 20 ms in page faults, more than filling it. numpy asks the system for huge pages, which cuts
    that to about 5; torch does not.
    """
    if n * dtype.itemsize < HUGE_PAGES_FROM:
        return torch.empty(n, dtype=dtype)
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)

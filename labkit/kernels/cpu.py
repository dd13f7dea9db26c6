"""Four-bit quantize and dequantize for a CPU, compiled by numba on first use and cached beside the package.

Dequantizing is bound by memory: half a byte is read and four are written for each weight, so the work per weight must
be next to nothing. One byte is looked up as a *pair* of levels, moved as a single 64-bit word, and the block that was
just written, still in the first-level cache, is multiplied by its scale. Quantizing is bound by the search for the
nearest level: fifteen compares and adds, which the compiler turns into vector instructions, beat a branching binary
search.

Why Python threads over a kernel that releases the interpreter lock, and not numba's own `parallel=True`: its thread
layers are either not safe to call from two threads at once or not safe to fork, and DataLoader workers do both.

Agrees, bit for bit, with: `labkit.quant.quantize_blocks` and `dequantize_blocks`.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from labkit.codebooks import codes_by_rank, dynamic8, midpoints

SERIAL_BELOW = (
    1 << 20
)  # weights; below this, waking a thread beside those of a matrix multiplication costs more than it saves
HUGE_PAGES_FROM = 1 << 22  # bytes

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _lock, _pool
    _lock, _pool = threading.Lock(), None  # a forked child inherits the pool but not its threads


os.register_at_fork(after_in_child=_forget_pool)


def run_in_threads(job, n_blocks: int, n: int) -> None:
    """Call `job(first_block, last_block)` so that all `n_blocks` are covered, split over torch's thread count."""
    global _pool
    threads = 1 if n < SERIAL_BELOW else min(torch.get_num_threads(), n_blocks)
    if threads == 1:
        job(0, n_blocks)
        return
    with _lock:
        if _pool is None or _pool._max_workers < threads - 1:
            _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="labkit-kernel")
        pool = _pool
    edges = [n_blocks * i // threads for i in range(threads + 1)]
    waiting = [pool.submit(job, edges[i], edges[i + 1]) for i in range(1, threads)]
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
def _pairs(levels):
    """(256,) 64-bit words: the two levels of each byte, side by side."""
    pairs = np.empty(512, np.float32)
    for byte in range(256):
        pairs[2 * byte] = levels[byte >> 4]
        pairs[2 * byte + 1] = levels[byte & 15]
    return pairs.view(np.uint64)


@numba.njit(nogil=True, cache=True)
def _dequantize(first, last, packed, absmax, levels, blocksize, out):
    pairs = _pairs(levels)
    n = out.size
    words = out[: n // 2 * 2].view(np.uint64)
    half = blocksize // 2
    for block in range(first, last):
        scale = absmax[block]
        block_words = words[block * half : (block + 1) * half]
        codes = packed[block * half : block * half + block_words.size]
        for i in range(codes.size):
            block_words[i] = pairs[codes[i]]
        values = out[block * blocksize : block * blocksize + 2 * codes.size]
        for i in range(values.size):
            values[i] *= scale
    if n % 2 == 1 and last * blocksize >= n:
        out[n - 1] = levels[packed[n // 2] >> 4] * absmax[last - 1]


@numba.njit(nogil=True, cache=True)
def _dequantize_bf16(first, last, packed, absmax, levels, blocksize, out):
    pairs = _pairs(levels)
    half = blocksize // 2
    words = np.empty(half, np.uint64)
    values, bits = words.view(np.float32), words.view(np.uint32)
    for block in range(first, last):
        scale = absmax[block]
        codes = packed[block * half : (block + 1) * half]
        for i in range(codes.size):
            words[i] = pairs[codes[i]]
        for i in range(values.size):
            values[i] *= scale
        result = out[block * blocksize : (block + 1) * blocksize]
        for i in range(result.size):  # bfloat16 is the upper half of a float32, rounded to even
            tie = (bits[i] >> np.uint32(16)) & np.uint32(1)
            result[i] = (bits[i] + np.uint32(0x7FFF) + tie) >> np.uint32(16)


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
    kernel, result = _dequantize, out
    if out.dtype == torch.bfloat16:
        kernel, result = _dequantize_bf16, out.view(torch.uint16)
    bytes_, table, result = packed.numpy().reshape(-1), levels.numpy(), result.numpy()
    absmax = (scales if nested is None else torch.empty(scales.numel())).numpy()
    if nested is not None:
        inputs = scales.numpy(), nested.numpy(), offset.numpy()[()], dynamic8().numpy()

    def job(first: int, last: int) -> None:
        if nested is not None:  # each thread makes the scales of its own blocks, which then are in its cache
            _dequantize_scales(first, last, *inputs, absmax)
        kernel(first, last, bytes_, absmax, table, blocksize, result)

    run_in_threads(job, scales.numel(), out.numel())


def empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (n,) tensor for a result on `device`, the CPU.

    A fresh 64 MB costs 20 ms in page faults, more than filling it. numpy asks the system for huge pages, which cuts
    that to about 5; torch does not.
    """
    if n * dtype.itemsize < HUGE_PAGES_FROM:
        return torch.empty(n, dtype=dtype)
    return torch.from_numpy(np.empty(n * dtype.itemsize, np.uint8)).view(dtype)

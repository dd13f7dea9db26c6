"""Quantizing on a CPU: the loops that find scales and nearest levels.

Quantizing is bound by the search for the nearest level. Sixteen searches at once, each of four steps without
a branch, beat fifteen comparisons and additions, which is what the compiler makes of `_quantize_one_by_one`.
"""

import numba
import numpy as np

from labkit.quant.kernels.kept import compiled
from labkit.quant.kernels.lookups import look_up, ranks, store_codes
from labkit.quant.kernels.tasks import STEP, TASK
from labkit.quant.kernels.vectors import (
    LANES,
    larger,
    largest,
    load_floats,
    load_words,
    magnitudes,
    next_part,
    pointer,
    times,
)

SMALLEST = np.float32(1e-38)  # `labkit.quant.blockwise.SMALLEST_ABSMAX`


@numba.njit
def _quantize(first, last, flat, mids, by_rank, blocksize, absmax, packed):
    whole = first
    if LANES > 0:
        limits, table = np.zeros(16, np.float32), np.empty(16, np.uint32)
        limits[:15], table[:] = mids, by_rank
        thresholds, codes = load_floats(limits, 0), load_words(table, 0)
        whole = min(last, flat.size // blocksize) if blocksize % STEP == 0 else first
        for block in range(first, whole):
            start, stop = block * blocksize, (block + 1) * blocksize
            reciprocal = np.float32(1) / _find_scale(block, flat, start, stop, absmax)
            for i in range(start, stop, STEP):
                one = look_up(codes, ranks(times(load_floats(flat, i), reciprocal), thresholds))
                other = look_up(codes, ranks(times(load_floats(flat, i + 16), reciprocal), thresholds))
                store_codes(packed, i // 2, one, other)
    if whole < last:
        _quantize_one_by_one(whole, last, flat, mids, by_rank, blocksize, absmax, packed)


@numba.njit
def _find_scale(block, flat, start, stop, absmax):
    """Write the largest magnitude of flat[start:stop] to absmax[block]; return it, at least `SMALLEST`."""
    largest_bits = np.int32(0)
    vectors_stop = start + (stop - start) // 16 * 16
    if start < vectors_stop:
        found = magnitudes(load_words(flat, start))
        for i in range(start + 16, vectors_stop, 16):
            found = larger(found, magnitudes(load_words(flat, i)))
        largest_bits = largest(found)
    bits = flat.view(np.int32)
    for i in range(vectors_stop, stop):
        largest_bits = max(largest_bits, bits[i] & np.int32(0x7FFFFFFF))
    absmax.view(np.int32)[block] = largest_bits
    return SMALLEST if absmax[block] < SMALLEST else absmax[block]  # NaN stays NaN


@numba.njit
def _quantize_one_by_one(first, last, flat, mids, by_rank, blocksize, absmax, packed):
    """The same without vectors: for the incomplete last block, other block sizes, and other processors."""
    scaled = np.zeros(blocksize, np.float32)
    rank_of = np.empty(blocksize, np.int32)
    for block in range(first, last):
        start = block * blocksize
        values = flat[start : min(start + blocksize, flat.size)]
        scale = _find_scale(block, flat, start, start + values.size, absmax)
        if values.size == blocksize:
            reciprocal = np.float32(1) / scale
            for i in range(blocksize):
                scaled[i] = values[i] * reciprocal
        else:
            absmax[block] = scale
            for i in range(values.size):
                scaled[i] = values[i] / scale
            scaled[values.size] = 0  # the second half of an odd tail's last byte
        for i in range(blocksize):
            rank = np.int32(0)
            for k in range(15):
                rank += np.int32(scaled[i] > mids[k])
            rank_of[i] = rank
        out = packed[start // 2 : (start + values.size + 1) // 2]
        for i in range(out.size):
            out[i] = (by_rank[rank_of[2 * i]] << 4) | by_rank[rank_of[2 * i + 1]]


@numba.njit
def _quantize_scales(first, last, flat, mids, by_rank, absmax, codes):
    """The same in blocks of 256 with 256 levels, for which a binary search without branches is fastest."""
    for block in range(first, last):
        start, stop = block * 256, min(block * 256 + 256, flat.size)
        scale = _find_scale(block, flat, start, stop, absmax)
        if stop - start < 256:
            absmax[block] = scale
        reciprocal = np.float32(1) / scale
        for i in range(start, stop):
            scaled = flat[i] * reciprocal if stop - start == 256 else flat[i] / scale
            rank = 0
            for step in (128, 64, 32, 16, 8, 4, 2, 1):
                rank += 0 if mids[rank + step - 1] >= scaled else step
            codes[i] = by_rank[rank]


@compiled(TASK)
def quantize_task(arguments):
    a = numba.carray(arguments, 10)
    parts, n, n_blocks, blocksize = a[1], a[2], a[3], a[4]
    flat = numba.carray(pointer(a[5]), n, np.float32)
    mids = numba.carray(pointer(a[6]), 15, np.float32)
    by_rank = numba.carray(pointer(a[7]), 16, np.uint8)
    absmax = numba.carray(pointer(a[8]), n_blocks, np.float32)
    packed = numba.carray(pointer(a[9]), (n + 1) // 2, np.uint8)
    part = next_part(a)
    while part < parts:
        first, last = n_blocks * part // parts, n_blocks * (part + 1) // parts
        _quantize(first, last, flat, mids, by_rank, blocksize, absmax, packed)
        part = next_part(a)


@compiled(TASK)
def quantize_scales_task(arguments):
    a = numba.carray(arguments, 9)
    parts, n, n_blocks = a[1], a[2], a[3]
    flat = numba.carray(pointer(a[4]), n, np.float32)
    mids = numba.carray(pointer(a[5]), 255, np.float32)
    by_rank = numba.carray(pointer(a[6]), 256, np.uint8)
    codes = numba.carray(pointer(a[7]), n, np.uint8)
    absmax = numba.carray(pointer(a[8]), n_blocks, np.float32)
    part = next_part(a)
    while part < parts:
        first, last = n_blocks * part // parts, n_blocks * (part + 1) // parts
        _quantize_scales(first, last, flat, mids, by_rank, absmax, codes)
        part = next_part(a)

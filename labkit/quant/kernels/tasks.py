"""The loops of the CPU kernels, compiled by numba on first use and cached beside the package.

*Dequantizing* is bound by memory: half a byte is read and four are written for each weight, so the work per weight
must be next to nothing: sixteen levels fit a vector register or two, and thirty-two weights are looked up there at once, see
`stores.py`. A result too large for the caches is *streamed*: an ordinary store first reads what it is about to overwrite, one past
the caches does not. That halves the time on 4096 x 4096, and costs more than it saves where the result is still in the cache when
it is used. (Streamed stores may become visible late; the atomic step with which each thread looks for another part, and finds
none, waits for them.)

*Quantizing* is bound by the search for the nearest level. Sixteen searches at once, of four steps each without a branch, beat
fifteen compares and adds, which are what the compiler makes of the loop below them.

*Multiplying* one or a few vectors by the matrix does not write the weights anywhere: they go from the look-up into a
sum. An fp32 layer reads four bytes a weight to do so, this one half a byte; generating text, that is most of the work.

The functions with `_task` in their name are tasks for `threads.py`. They take addresses, cut the work, and call the
loop; `cpu.py` puts their arguments together, in the order in which they stand here.
"""

from pathlib import Path

import numba
import numpy as np
from numba.core import types

from labkit.quant.kernels.lookups import (
    first_codes,
    load_codes,
    look_up,
    ranks,
    scaled_levels,
    store_codes,
)
from labkit.quant.kernels.outdated import forget_outdated
from labkit.quant.kernels.stores import store_weights, stream_weights
from labkit.quant.kernels.vectors import (
    LANES,
    larger,
    largest,
    load_floats,
    load_words,
    magnitudes,
    multiply_add,
    next_part,
    pointer,
    times,
    total,
    zeros,
)

SMALLEST = np.float32(1e-38)  # `labkit.quant.blockwise.SMALLEST_ABSMAX`
STEP = 32  # weights: 16 bytes, the two codes of each in a vector; every block size of `labkit.quant.blockwise` is a multiple
TASK = types.void(types.CPointer(types.int64))

forget_outdated(Path(__file__).parent)


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
    """Write the largest magnitude of flat[start:stop] to absmax[block]; returns it, or `SMALLEST` where it is less."""
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
    """The same without vectors: for the incomplete last block, odd block sizes, and processors that have none."""
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
    """The same in blocks of 256, with a codebook of 256 levels: here a binary search, without branches, is best."""
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


@numba.njit
def _scale(block, scales):
    """The scale of a block; made of its code first if the scales are quantized themselves."""
    absmax, codes, nested, offset, levels = scales
    return levels[codes[block]] * nested[block >> 8] + offset[0] if codes.size else absmax[block]


@numba.njit
def _dequantize(first, last, packed, scales, levels, blocksize, out, streamed):
    whole = first
    if LANES > 0:
        whole = min(last, out.size // blocksize) if blocksize % STEP == 0 else first
        sixteen = load_floats(levels, 0)
        for block in range(first, whole):
            scale = _scale(block, scales)
            for i in range(block * blocksize, (block + 1) * blocksize, STEP):
                if streamed:
                    stream_weights(out, i, packed, sixteen, scale)
                else:
                    store_weights(out, i, packed, sixteen, scale)
    if whole < last:
        _dequantize_one_by_one(whole, last, packed, scales, levels, blocksize, out)


@numba.njit
def _dequantize_one_by_one(first, last, packed, scales, levels, blocksize, out):
    """The same without vectors: for the incomplete last block, odd block sizes, and processors that have none."""
    scaled = np.empty(16, np.float32)
    table = scaled.view(np.uint32)
    for block in range(first, last):
        scale = _scale(block, scales)
        for k in range(16):
            scaled[k] = levels[k] * scale
        if out.itemsize == 2:  # bfloat16 is the upper half of a float32, rounded to even
            for k in range(16):
                even = (table[k] >> np.uint32(16)) & np.uint32(1)
                table[k] = (table[k] + np.uint32(0x7FFF) + even) >> np.uint32(16)
        for i in range(block * blocksize, min((block + 1) * blocksize, out.size)):
            out[i] = table[packed[i // 2] & 15] if i % 2 else table[packed[i // 2] >> 4]


@numba.njit
def _split(x):
    """The numbers that meet the first codes of the bytes, and those that meet the second: x[::2] and x[1::2]."""
    evens, odds = np.empty(x.size // 2, np.float32), np.empty(x.size // 2, np.float32)
    for i in range(evens.size):
        evens[i], odds[i] = x[2 * i], x[2 * i + 1]
    return evens, odds


@numba.njit
def _multiply_one(at, end, evens, odds, x_at, packed, scales, levels, blocksize):
    """The sum of weights[at:end] * x[x_at:]."""
    a, b = zeros(), zeros()
    sixteen = load_floats(levels, 0)
    block = at // blocksize
    x_at = (x_at - at) // 2
    while at < end:
        table = scaled_levels(sixteen, _scale(block, scales))
        block += 1
        stop = min(end, block * blocksize)
        for i in range(at // 2, stop // 2, STEP // 2):
            codes = load_codes(packed, i)
            a = multiply_add(look_up(table, first_codes(codes)), load_floats(evens, x_at + i), a)
            b = multiply_add(look_up(table, codes), load_floats(odds, x_at + i), b)
        at = stop
    return total(a, b)


@numba.njit
def _multiply_four(at, end, evens, odds, x_at, packed, scales, levels, blocksize):
    """The same, in the same order, for four rows of x at once, so that a weight is looked up once for all."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    sixteen = load_floats(levels, 0)
    block, step = at // blocksize, (end - at) // 2
    x_at = (x_at - at) // 2
    while at < end:
        table = scaled_levels(sixteen, _scale(block, scales))
        block += 1
        stop = min(end, block * blocksize)
        for i in range(at // 2, stop // 2, STEP // 2):
            codes = load_codes(packed, i)
            first, second = look_up(table, first_codes(codes)), look_up(table, codes)
            k = x_at + i
            a0 = multiply_add(first, load_floats(evens, k), a0)
            b0 = multiply_add(second, load_floats(odds, k), b0)
            a1 = multiply_add(first, load_floats(evens, k + step), a1)
            b1 = multiply_add(second, load_floats(odds, k + step), b1)
            a2 = multiply_add(first, load_floats(evens, k + 2 * step), a2)
            b2 = multiply_add(second, load_floats(odds, k + 2 * step), b2)
            a3 = multiply_add(first, load_floats(evens, k + 3 * step), a3)
            b3 = multiply_add(second, load_floats(odds, k + 3 * step), b3)
        at = stop
    return total(a0, b0), total(a1, b1), total(a2, b2), total(a3, b3)


@numba.njit
def _multiply(first, last, x, width, packed, scales, levels, blocksize, y):
    """y[:, row] = x @ weight[row] for some rows; x is (tokens, width)."""
    tokens = x.size // width
    height = y.size // tokens
    evens, odds = _split(x)
    for row in range(first, last):
        weight = row * width, (row + 1) * width
        token = 0
        while token + 4 <= tokens:
            sums = _multiply_four(*weight, evens, odds, token * width, packed, scales, levels, blocksize)
            for k in range(4):
                y[(token + k) * height + row] = sums[k]
            token += 4
        while token < tokens:
            at = token * width
            y[token * height + row] = _multiply_one(
                *weight, evens, odds, at, packed, scales, levels, blocksize
            )
            token += 1


@numba.cfunc(TASK, cache=True)
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


@numba.cfunc(TASK, cache=True)
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


@numba.njit
def _scales(a):
    """Where the scales are, as `weight_arguments` said: in `absmax`, or else in the other four."""
    n_blocks = a[3]
    quantized = a[7] != 0
    return (
        numba.carray(pointer(a[6]), 0 if quantized else n_blocks, np.float32),
        numba.carray(pointer(a[7]), n_blocks if quantized else 0, np.uint8),
        numba.carray(pointer(a[8]), (n_blocks + 255) // 256, np.float32),
        numba.carray(pointer(a[9]), 1, np.float32),
        numba.carray(pointer(a[10]), 256, np.float32),
    )


@numba.cfunc(TASK, cache=True)
def dequantize_task(arguments):
    a = numba.carray(arguments, 15)
    parts, n, n_blocks, blocksize, streamed = a[1], a[2], a[3], a[4], a[14] != 0
    packed = numba.carray(pointer(a[5]), (n + 1) // 2, np.uint8)
    scales = _scales(a)
    levels = numba.carray(pointer(a[11]), 16, np.float32)
    part = next_part(a)
    while part < parts:
        first, last = n_blocks * part // parts, n_blocks * (part + 1) // parts
        if a[13] == 4:
            out = numba.carray(pointer(a[12]), n, np.uint32)
            _dequantize(first, last, packed, scales, levels, blocksize, out, streamed)
        else:
            out = numba.carray(pointer(a[12]), n, np.uint16)
            _dequantize(first, last, packed, scales, levels, blocksize, out, streamed)
        part = next_part(a)


@numba.cfunc(TASK, cache=True)
def multiply_task(arguments):
    a = numba.carray(arguments, 16)
    parts, n, blocksize, width, tokens = a[1], a[2], a[4], a[13], a[15]
    height = n // width
    packed = numba.carray(pointer(a[5]), (n + 1) // 2, np.uint8)
    scales = _scales(a)
    levels = numba.carray(pointer(a[11]), 16, np.float32)
    x = numba.carray(pointer(a[12]), tokens * width, np.float32)
    y = numba.carray(pointer(a[14]), tokens * height, np.float32)
    part = next_part(a)
    while part < parts:
        first, last = height * part // parts, height * (part + 1) // parts
        if LANES > 0:  # elsewhere there is nothing to compile, and `multiplies` says no
            _multiply(first, last, x, width, packed, scales, levels, blocksize, y)
        part = next_part(a)

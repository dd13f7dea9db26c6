"""Dequantizing on a CPU: the loops that look weights up and write them.

Dequantizing is bound by memory: half a byte is read and four are written per weight, so the work per weight
must be next to nothing. Sixteen levels fit into one or two vector registers, where thirty-two weights are
looked up at once (`stores.py`).

A result too large for the caches is *streamed*: an ordinary store first reads what it is about to overwrite,
a store past the caches does not. That halves the time on 4096 x 4096, but costs more than it saves if the
result would still be in the cache when it is used. (Streamed stores may become visible late. The atomic step
with which each thread asks for another part, and finds none, waits for them.)
"""

import numba
import numpy as np

from labkit.quant.kernels.kept import compiled
from labkit.quant.kernels.stores import store_weights, stream_weights
from labkit.quant.kernels.tasks import STEP, TASK
from labkit.quant.kernels.vectors import LANES, load_floats, next_part, pointer


@numba.njit
def scale_of(block, scales):
    """The scale of a block; computed from its code if the scales are themselves quantized."""
    absmax, codes, nested, offset, levels = scales
    return levels[codes[block]] * nested[block >> 8] + offset[0] if codes.size else absmax[block]


@numba.njit
def _dequantize(first, last, packed, scales, levels, blocksize, out, streamed):
    whole = first
    if LANES > 0:
        whole = min(last, out.size // blocksize) if blocksize % STEP == 0 else first
        sixteen = load_floats(levels, 0)
        for block in range(first, whole):
            scale = scale_of(block, scales)
            for i in range(block * blocksize, (block + 1) * blocksize, STEP):
                if streamed:
                    stream_weights(out, i, packed, sixteen, scale)
                else:
                    store_weights(out, i, packed, sixteen, scale)
    if whole < last:
        _dequantize_one_by_one(whole, last, packed, scales, levels, blocksize, out)


@numba.njit
def _dequantize_one_by_one(first, last, packed, scales, levels, blocksize, out):
    """The same without vectors: for the incomplete last block, other block sizes, and other processors."""
    scaled = np.empty(16, np.float32)
    table = scaled.view(np.uint32)
    for block in range(first, last):
        scale = scale_of(block, scales)
        for k in range(16):
            scaled[k] = levels[k] * scale
        if out.itemsize == 2:  # bfloat16 is the upper half of a float32, rounded to even
            for k in range(16):
                even = (table[k] >> np.uint32(16)) & np.uint32(1)
                table[k] = (table[k] + np.uint32(0x7FFF) + even) >> np.uint32(16)
        for i in range(block * blocksize, min((block + 1) * blocksize, out.size)):
            out[i] = table[packed[i // 2] & 15] if i % 2 else table[packed[i // 2] >> 4]


@numba.njit
def scales_at(a):
    """The scales, by the addresses of `cpu.weight_arguments`: in the first array, or in the other four."""
    n_blocks = a[3]
    quantized = a[7] != 0
    return (
        numba.carray(pointer(a[6]), 0 if quantized else n_blocks, np.float32),
        numba.carray(pointer(a[7]), n_blocks if quantized else 0, np.uint8),
        numba.carray(pointer(a[8]), (n_blocks + 255) // 256, np.float32),
        numba.carray(pointer(a[9]), 1, np.float32),
        numba.carray(pointer(a[10]), 256, np.float32),
    )


@compiled(TASK)
def dequantize_task(arguments):
    a = numba.carray(arguments, 15)
    parts, n, n_blocks, blocksize, streamed = a[1], a[2], a[3], a[4], a[14] != 0
    packed = numba.carray(pointer(a[5]), (n + 1) // 2, np.uint8)
    scales = scales_at(a)
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

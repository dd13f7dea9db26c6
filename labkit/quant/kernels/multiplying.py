"""Multiplying one or a few vectors by a 4-bit weight on a CPU, without writing the weight anywhere.

The weights go from the look-up straight into a sum. An fp32 layer reads four bytes per weight for that, this
one half a byte; when text is generated, reading weights is most of the work.
"""

import numba
import numpy as np

from labkit.quant.kernels.dequantizing import scale_of, scales_at
from labkit.quant.kernels.kept import compiled
from labkit.quant.kernels.lookups import first_codes, load_codes, look_up, scaled_levels
from labkit.quant.kernels.tasks import STEP, TASK
from labkit.quant.kernels.vectors import (
    LANES,
    load_floats,
    multiply_add,
    next_part,
    pointer,
    total,
    zeros,
)


@numba.njit
def _split(x):
    """x[::2] and x[1::2]: what meets the first code of each byte, and what meets the second."""
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
        table = scaled_levels(sixteen, scale_of(block, scales))
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
    """The same, in the same order, for four rows of x at once: a weight is looked up once for all of them."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    sixteen = load_floats(levels, 0)
    block, step = at // blocksize, (end - at) // 2
    x_at = (x_at - at) // 2
    while at < end:
        table = scaled_levels(sixteen, scale_of(block, scales))
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


@compiled(TASK)
def multiply_task(arguments):
    a = numba.carray(arguments, 16)
    parts, n, blocksize, width, tokens = a[1], a[2], a[4], a[13], a[15]
    height = n // width
    packed = numba.carray(pointer(a[5]), (n + 1) // 2, np.uint8)
    scales = scales_at(a)
    levels = numba.carray(pointer(a[11]), 16, np.float32)
    x = numba.carray(pointer(a[12]), tokens * width, np.float32)
    y = numba.carray(pointer(a[14]), tokens * height, np.float32)
    part = next_part(a)
    while part < parts:
        first, last = height * part // parts, height * (part + 1) // parts
        if LANES > 0:  # without vectors there is nothing to compile, and `multiplies` says no
            _multiply(first, last, x, width, packed, scales, levels, blocksize, y)
        part = next_part(a)

"""What a GPU runs for the four-bit kernels, in Triton: each function below is compiled for the card at its first call.

A GPU moves bytes well where threads that sit side by side read and write 16 bytes each, side by side. So the packed
weight is read in words of eight codes, and a word becomes eight weights, which lie next to each other in the result.

Three things that a GPU does by default would change bits. Division is approximate: `div_rn` rounds like the reference.
A product and a sum fuse into one instruction with one rounding: `launch` in `triton.py` forbids it. And a
floating-point maximum drops NaN: the maximum here is of integers, as on the CPU.

A condition on `None` or on a constant in capitals is decided when the function is compiled.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)  # of a warp


@triton.jit
def _ranks(x, mids, LEVELS: tl.constexpr):
    # how many thresholds are below each value, by bisection; 0 for NaN
    half: tl.constexpr = LEVELS // 2
    quarter: tl.constexpr = LEVELS // 4
    upper = x > tl.load(mids + half - 1)
    limit = tl.where(upper, tl.load(mids + half + quarter - 1), tl.load(mids + quarter - 1))
    rank = tl.where(upper, half, 0) + tl.where(x > limit, quarter, 0)  # two steps without a table
    for power in tl.static_range(3, 5 if LEVELS == 16 else 9):
        rank += tl.where(x > tl.load(mids + rank + ((LEVELS >> power) - 1)), LEVELS >> power, 0)
    return rank


@triton.jit
def _store_codes(codes, at, n, mids, by_rank, scaled, LEVELS: tl.constexpr, SIZE: tl.constexpr):
    # codes at[0 : n] of the nearest levels; two to a byte if there are 16 levels. All of them if n is None
    code = _ranks(scaled, mids, LEVELS)
    if by_rank is not None:
        code = tl.load(by_rank + code).to(tl.int32)
    if LEVELS == 16:
        high, low = tl.split(tl.reshape(code, [SIZE // 2, 2]))
        index = tl.arange(0, SIZE // 2)
        mask = None if n is None else 2 * index < n
        tl.store(codes + at // 2 + index, ((high << 4) | low).to(tl.uint8), mask=mask)
    else:
        index = tl.arange(0, SIZE)
        mask = None if n is None else index < n
        tl.store(codes + at + index, tl.reshape(code, [SIZE]).to(tl.uint8), mask=mask)


@triton.jit
def _largest(x):
    # the largest magnitude of each row, NaN if there is one
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n"])
def quantize(
    flat,
    mids,
    by_rank,
    codes,
    absmax,
    n,
    smallest,
    LEVELS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    start = first * BLOCKSIZE
    block, place = tl.arange(0, BLOCKS), tl.arange(0, BLOCKSIZE)
    index = block[:, None] * BLOCKSIZE + place[None, :]  # (BLOCKS, BLOCKSIZE)
    if start + BLOCKS * BLOCKSIZE <= n:
        x = tl.load(flat + start + index).to(tl.float32)
        largest = _largest(x)
        tl.store(absmax + first + block, largest)
        floor = tl.where(largest < smallest, smallest, largest)
        # bitsandbytes multiplies by the reciprocal in a whole block, and divides in the incomplete last one
        scaled = x * tl.div_rn(1.0, floor)[:, None]
        _store_codes(codes, start, None, mids, by_rank, scaled, LEVELS, BLOCKS * BLOCKSIZE)
    else:
        left = (n - start).to(tl.int32)
        x = tl.load(flat + start + index, mask=index < left, other=0.0).to(tl.float32)
        largest = _largest(x)
        floor = tl.where(largest < smallest, smallest, largest)
        is_whole = (block + 1) * BLOCKSIZE <= left
        tl.store(absmax + first + block, tl.where(is_whole, largest, floor), mask=block * BLOCKSIZE < left)
        divided = tl.div_rn(x, tl.broadcast_to(floor[:, None], x.shape))
        scaled = tl.where(is_whole[:, None], x * tl.div_rn(1.0, floor)[:, None], divided)
        _store_codes(codes, start, left, mids, by_rank, scaled, LEVELS, BLOCKS * BLOCKSIZE)


@triton.jit
def _scales_at(block, inside, scales, nested, offset, scale_levels):
    # the scales of blocks; computed from their codes if they are themselves quantized
    other: tl.constexpr = None if inside is None else 0
    scale = tl.load(scales + block, mask=inside, other=other)
    if nested is not None:
        factor = tl.load(nested + block // 256, mask=inside, other=other)
        scale = tl.load(scale_levels + scale.to(tl.int32)) * factor + tl.load(offset)
    return scale


@triton.jit
def _weights_of(word, scale, levels):
    # (words,) to (words, 8): in memory the first of two codes is in the high half of a byte
    shift = 4 * (tl.arange(0, 8) ^ 1)
    return tl.load(levels + ((word[:, None] >> shift[None, :]) & 15)) * scale[:, None]


@triton.jit(do_not_specialize=["n"])
def dequantize(
    packed,
    scales,
    levels,
    out,
    nested,
    offset,
    scale_levels,
    n,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    words = packed.to(tl.pointer_type(tl.int32))
    first = tl.program_id(0).to(tl.int64) * WORDS
    word, place = tl.arange(0, WORDS), tl.arange(0, 8)
    to = out + 8 * first + 8 * word[:, None] + place[None, :]  # (WORDS, 8)
    block = first * 8 // BLOCKSIZE + word * 8 // BLOCKSIZE
    whole = n // 8
    if first + WORDS <= whole:
        scale = _scales_at(block, None, scales, nested, offset, scale_levels)
        tl.store(to, _weights_of(tl.load(words + first + word), scale, levels))
    else:
        left = (n - 8 * first).to(tl.int32)
        inside = word * 8 < left
        scale = _scales_at(block, inside, scales, nested, offset, scale_levels)
        # the last word may end before its fourth byte: read it byte by byte
        byte = packed + 4 * first + 4 * word
        value = tl.zeros_like(word)
        for k in tl.static_range(4):
            there = word * 8 + 2 * k < left
            value |= tl.load(byte + k, mask=there, other=0).to(tl.int32) << (8 * k)
        weight = _weights_of(value, scale, levels)
        tl.store(to, weight, mask=8 * word[:, None] + place[None, :] < left)


@triton.jit
def _four_weights(word, scale, levels, place: tl.constexpr, dtype: tl.constexpr):
    # weights place ... place + 3 of each word, rounded to a dtype: (LANES,) to (LANES, 4), each lane its own four
    four = ()
    for k in tl.static_range(4):
        level = tl.load(levels + ((word >> (4 * ((place + k) ^ 1))) & 15))
        four += (level * scale,)
    pairs = tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))  # (LANES, 2, 2)
    return tl.reshape(pairs, [LANES, 4]).to(dtype).to(tl.float32)


@triton.jit
def _pairwise(x, SHAPE: tl.constexpr):
    # (…, 2 n) to SHAPE, (…, n): each number with an even index plus its right neighbour
    return tl.sum(tl.reshape(x, SHAPE + [2]), axis=len(SHAPE))  # noqa: RUF005 – Triton has no star here


@triton.jit
def _sum_of_four(x, weight, TOKENS: tl.constexpr):
    # (TOKENS, LANES, 4) * (LANES, 4) to (TOKENS, LANES): (0 + 1) + (2 + 3)
    return _pairwise(_pairwise(x * weight[None, :, :], [TOKENS, LANES, 2]), [TOKENS, LANES])


@triton.jit(do_not_specialize=["height", "tokens"])
def multiply(
    x,
    packed,
    scales,
    levels,
    y,
    nested,
    offset,
    scale_levels,
    width,
    height,
    tokens,
    BLOCKSIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """y[:, row] = x @ weight[row]: one row to a program, which is one warp, and every 32nd word of it to each lane.

    The order of a sum is fixed: the eight products of a word are added as a tree, ((0 + 1) + (2 + 3)) + ((4 + 5) +
    (6 + 7)); each lane adds up the sums of its words from left to right; the 32 lanes are added as such a tree.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    words = packed.to(tl.pointer_type(tl.int32))
    row, words_in_row = tl.program_id(0).to(tl.int64), width // 8
    start = row * words_in_row
    before = (start % (BLOCKSIZE // 8)).to(
        tl.int32
    )  # words of the row's first block that are in the row above
    lane, token = tl.arange(0, LANES), tl.arange(0, TOKENS)
    sums = tl.zeros([TOKENS, LANES], tl.float32)
    for first in tl.range(0, words_in_row, LANES, loop_unroll_factor=4 // TOKENS if TOKENS < 4 else 1):
        column = first + lane
        inside = column < words_in_row
        block = start * 8 // BLOCKSIZE + (before + column) * 8 // BLOCKSIZE
        scale = _scales_at(block, inside, scales, nested, offset, scale_levels)
        codes = tl.load(words + start + column, mask=inside, other=0)
        at = x + (token * width)[:, None, None] + 8 * column[None, :, None]  # (TOKENS, LANES, 1)
        there = (token < tokens)[:, None, None] & inside[None, :, None]
        # 16 bytes of x to a lane at a time: eight numbers, or four of fp32
        if dtype == tl.float32:
            left = tl.load(at + tl.arange(0, 4)[None, None, :], mask=there, other=0.0)
            right = tl.load(at + 4 + tl.arange(0, 4)[None, None, :], mask=there, other=0.0)
        else:
            eight = tl.load(at + tl.arange(0, 8)[None, None, :], mask=there, other=0.0).to(tl.float32)
            halves = tl.permute(tl.reshape(eight, [TOKENS, LANES, 2, 4]), [0, 1, 3, 2])
            left, right = tl.split(halves)
        terms = _sum_of_four(left, _four_weights(codes, scale, levels, 0, dtype), TOKENS)
        sums += terms + _sum_of_four(right, _four_weights(codes, scale, levels, 4, dtype), TOKENS)
    for power in tl.static_range(1, 6):
        sums = _pairwise(sums, [TOKENS, LANES >> power])
    tl.store(y + token * height + row, tl.reshape(sums, [TOKENS]).to(dtype), mask=token < tokens)

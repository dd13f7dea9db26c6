"""Thirty-two weights from their codes to memory, the innermost step of dequantizing, in one of two ways.

*By words* (AVX-512), where sixteen words fit one register: the levels are multiplied by the scale of the
block, and rounded for bfloat16; then a weight is one look-up among the sixteen products, as in `lookups.py`.

*By bytes* (AVX2), where that would take two registers and four instructions. Another instruction (`vpshufb`)
looks up thirty-two bytes at once in a table of sixteen. So the table is cut into its lowest bytes, the next
ones, …; a look-up in each finds the bytes of thirty-two weights, and interleaving joins them. For bfloat16
the table is that of the products. For fp32 it is that of the levels, the same for every block, and the scale
comes last.

What depends only on levels and scale stands inside the loop over weights; LLVM moves it out.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from labkit.quant.kernels.lookups import find, first, scaled
from labkit.quant.kernels.vectors import (
    BYTES,
    FLOAT,
    INT32,
    INTP,
    LANES,
    WORDS,
    broadcast,
    call,
    floats,
    lanes,
    place,
    splat,
)

ALIGNMENT = 64  # bytes, of what is stored past the caches
SHORTS = ir.VectorType(ir.IntType(16), 16)


@intrinsic
def store_weights(typing_context, out, at, packed, levels, scale):
    """out[at : at + 32] = levels[code] * scale, of the codes in packed[at / 2 : at / 2 + 16].

    `out` is an array of uint32 that holds fp32 bits, or of uint16 that holds bfloat16 bits.
    """

    def generate(*arguments):
        return write(*arguments, streamed=False)

    return types.void(out, types.intp, packed, floats, types.float32), generate


@intrinsic
def stream_weights(typing_context, out, at, packed, levels, scale):
    """`store_weights`, but past the caches; the address of out[at] must be a multiple of `ALIGNMENT`."""

    def generate(*arguments):
        return write(*arguments, streamed=True)

    return types.void(out, types.intp, packed, floats, types.float32), generate


def write(context, builder: ir.IRBuilder, signature, arguments, streamed: bool) -> ir.Value:
    """The code of both kinds of stores."""
    out, at, packed, levels, scale = arguments
    out_type, packed_type = signature.args[0], signature.args[2]
    half = builder.lshr(at, INTP(1))
    codes = builder.load(place(context, builder, packed_type, packed, half, BYTES), align=1)
    vectors = weights(builder, codes, levels, scale, in_fp32=out_type.dtype.bitwidth == 32)
    for vector in vectors:
        store = builder.store(vector, place(context, builder, out_type, out, at, vector.type), align=2)
        if streamed:
            store.align = ALIGNMENT if LANES == 16 else ALIGNMENT // 2  # a register
            store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        at = builder.add(at, INTP(32 // len(vectors)))
    return context.get_dummy_value()


def weights(
    builder: ir.IRBuilder, codes: ir.Value, levels: ir.Value, scale: ir.Value, in_fp32: bool
) -> list[ir.Value]:
    """Vectors that hold the weights of sixteen bytes of codes, one after the other."""
    products = scaled(builder, levels, scale)
    table = products if in_fp32 else to_bfloat16(builder, products)
    if LANES == 16:
        return [by_words(builder, codes, table, in_fp32)]
    if not in_fp32:
        return by_bytes(builder, codes, table, 2)
    factor = broadcast(builder, scale)
    return [multiplied(builder, eight, factor) for eight in by_bytes(builder, codes, levels, 4)]


def by_words(builder: ir.IRBuilder, codes: ir.Value, table: ir.Value, in_fp32: bool) -> ir.Value:
    """Thirty-two weights as words of fp32, or as sixteen words of two bfloat16 each."""
    codes = builder.zext(codes, WORDS)
    ones, others = find(builder, table, first(builder, codes)), find(builder, table, codes)
    if in_fp32:
        return lanes(builder, ones, others, [lane for i in range(16) for lane in (i, 16 + i)])
    return builder.or_(ones, builder.shl(others, splat(WORDS, 16)))


def to_bfloat16(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """fp32 bits to bfloat16 bits in the low half of each word: the upper half, rounded to even."""
    even = builder.and_(builder.lshr(bits, splat(WORDS, 16)), splat(WORDS, 1))
    return builder.lshr(builder.add(builder.add(bits, splat(WORDS, 0x7FFF)), even), splat(WORDS, 16))


def by_bytes(builder: ir.IRBuilder, codes: ir.Value, table: ir.Value, size: int) -> list[ir.Value]:
    """table[code] of thirty-two codes, as registers of 256 bits; `size` low bytes (four or two) per word.

    The instructions treat each 128 bits of a register separately. So each half of the first register gets the
    codes of half of each result, in order.
    """
    in_half = 16 // size  # of the results in one register
    starts = [start + upper * in_half for upper in range(2) for start in range(0, 32, 2 * in_half)]
    order = [code // 2 for start in starts for code in range(start, start + in_half)]
    pairs = builder.bitcast(lanes(builder, codes, codes, order), SHORTS)  # each byte twice: for its two codes
    ones = builder.and_(builder.lshr(pairs, splat(SHORTS, 4)), splat(SHORTS, 0x000F))
    others = builder.and_(pairs, splat(SHORTS, 0x0F00))
    indices = builder.bitcast(builder.or_(ones, others), ir.VectorType(ir.IntType(8), 32))
    every = builder.bitcast(table, ir.VectorType(ir.IntType(8), 64))
    found = []
    for byte in range(size):
        plane = lanes(builder, every, every, [4 * code + byte for code in range(16)] * 2)
        found.append(call(builder, "llvm.x86.avx2.pshuf.b", plane, indices))
    return joined(builder, found)


def joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> list[ir.Value]:
    """Numbers whose lowest bytes are `parts[0]`, whose next bytes are `parts[1]`, …, within each 128 bits."""
    if len(parts) == 1:
        return parts
    lower, upper = [], []
    for low, high in zip(parts[::2], parts[1::2]):
        count, width = low.type.count, low.type.element.width
        for wider, half in ((lower, 0), (upper, 1)):
            starts = [start + half * count // 4 for start in (0, count // 2)]
            chosen = [k for start in starts for k in range(start, start + count // 4)]
            both = lanes(builder, low, high, [lane for k in chosen for lane in (k, count + k)])  # vpunpck
            wider.append(builder.bitcast(both, ir.VectorType(ir.IntType(2 * width), count // 2)))
    return joined(builder, lower) + joined(builder, upper)


def multiplied(builder: ir.IRBuilder, eight: ir.Value, factor: ir.Value) -> ir.Value:
    """Eight fp32 numbers, given as bits, times a factor that stands in sixteen lanes."""
    numbers = builder.bitcast(eight, ir.VectorType(FLOAT, 8))
    return builder.fmul(numbers, lanes(builder, factor, factor, range(8)))

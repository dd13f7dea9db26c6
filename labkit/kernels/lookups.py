"""4-bit codes and a table of sixteen numbers, in registers: look a code up, or find the code of a number.

A code is an index into a table of sixteen levels, and sixteen fp32 numbers are one AVX-512 register. The instruction that
permutes the lanes of a register by indices from another (`vpermd`) then looks up sixteen codes at once. With AVX2 a register has
eight lanes: two permutations, one for each half of the table, and a choice by the code's highest bit.

Quantizing asks the other way round, how many of fifteen thresholds a number exceeds: a search of four steps in sixteen numbers
at once, whose thresholds are looked up in a register too.

Why multiply the levels, and not the weights that were looked up: the product is the same, and rounding it to bfloat16
then costs sixteen operations a block instead of one for every weight. Why the indices are not masked: the permutation
reads only the lowest four (AVX2: three) bits of a lane.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from labkit.kernels.vectors import (
    BYTES,
    FLOAT,
    FLOATS,
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
    words,
)

ALIGNMENT = 64  # bytes, of what is stored past the caches
PERMUTE = (
    {"int": "llvm.x86.avx512.permvar.si.512", "float": "llvm.x86.avx512.permvar.sf.512"}
    if LANES == 16
    else {"int": "llvm.x86.avx2.permd", "float": "llvm.x86.avx2.permps"}
)


@intrinsic
def load_codes(typing_context, packed, at):
    """The bytes packed[at : at + 16] as words: the low four bits of each are a code, the next four another."""

    def generate(context, builder, signature, arguments):
        address = place(context, builder, signature.args[0], *arguments, BYTES)
        return builder.zext(builder.load(address, align=1), WORDS)

    return words(packed, types.intp), generate


@intrinsic
def first_codes(typing_context, codes):
    """The code that comes first in each byte, the high one, moved to the low four bits."""
    return words(words), lambda context, builder, signature, arguments: builder.lshr(
        arguments[0], splat(WORDS, 4)
    )


@intrinsic
def scaled_levels(typing_context, levels, scale):
    """levels * scale, as words that hold the bits of the fp32 products."""

    def generate(context, builder, signature, arguments):
        address = place(context, builder, signature.args[0], arguments[0], INTP(0), FLOATS)
        products = builder.fmul(builder.load(address, align=4), broadcast(builder, arguments[1]))
        return builder.bitcast(products, WORDS)

    return words(levels, types.float32), generate


@intrinsic
def to_bfloat16(typing_context, table):
    """fp32 bits to bfloat16 bits in the low half of each word: the upper half of a float32, rounded to even."""

    def generate(context, builder, signature, arguments):
        (bits,) = arguments
        even = builder.and_(builder.lshr(bits, splat(WORDS, 16)), splat(WORDS, 1))
        return builder.lshr(builder.add(builder.add(bits, splat(WORDS, 0x7FFF)), even), splat(WORDS, 16))

    return words(words), generate


def permute(builder: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
    """table[index] in every lane, of a table of `LANES` lanes, by the lowest bits of each index."""
    name = PERMUTE["float" if table.type.element == FLOAT else "int"]
    return call(builder, name, table, indices)


def halves(builder: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
    """The lower and the upper eight lanes."""
    return [lanes(builder, vector, vector, half) for half in (range(8), range(8, 16))]


@intrinsic
def look_up(typing_context, table, codes):
    """table[code] in every lane; only the low four bits of a code count."""

    def generate(context, builder, signature, arguments):
        table, codes = arguments
        if LANES == 16:
            return permute(builder, table, codes)
        lower, upper = halves(builder, table)
        found = []
        for eight in halves(builder, codes):
            is_upper = builder.icmp_signed(
                "<", builder.shl(eight, splat(eight.type, 28)), splat(eight.type, 0)
            )
            either = [permute(builder, part, eight) for part in (upper, lower)]
            found.append(builder.select(is_upper, *either))
        return lanes(builder, *found, range(16))

    return words(words, words), generate


@intrinsic
def ranks(typing_context, values, thresholds):
    """How many of the first fifteen thresholds, which rise, each value exceeds; of NaN: 0."""

    def generate(context, builder, signature, arguments):
        values, thresholds = arguments

        def exceeds(limits):
            return builder.fcmp_ordered(">", values, limits)

        def all_equal(k):
            return lanes(builder, thresholds, thresholds, [k] * 16)

        def one_of(candidates, indices):  # at most eight candidates: they fit an AVX2 register
            table = lanes(builder, thresholds, thresholds, candidates * (LANES // len(candidates)))
            if LANES == 16:
                return permute(builder, table, indices)
            found = [permute(builder, table, eight) for eight in halves(builder, indices)]
            return lanes(builder, *found, range(16))

        def append(bit, rank):  # a comparison that holds is -1 in every bit
            return builder.sub(builder.shl(rank, splat(WORDS, 1)), builder.sext(bit, WORDS))

        upper = exceeds(all_equal(7))
        rank = builder.zext(upper, WORDS)
        rank = append(exceeds(builder.select(upper, all_equal(11), all_equal(3))), rank)
        rank = append(exceeds(one_of([1, 5, 9, 13], rank)), rank)
        return append(exceeds(one_of([0, 2, 4, 6, 8, 10, 12, 14], rank)), rank)

    return words(floats, floats), generate


@intrinsic
def store_codes(typing_context, packed, at, first, second):
    """packed[at : at + 16] = sixteen bytes of two codes each: of first[0] and first[1], …, second[14] and second[15]."""

    def generate(context, builder, signature, arguments):
        packed, at, *codes = arguments
        in_bytes = lanes(builder, *(builder.trunc(half, BYTES) for half in codes), range(32))
        two = builder.bitcast(in_bytes, ir.VectorType(ir.IntType(16), 16))  # the first of two is the low byte
        joined = builder.or_(builder.shl(two, splat(two.type, 4)), builder.lshr(two, splat(two.type, 8)))
        address = place(context, builder, signature.args[0], packed, at, BYTES)
        builder.store(builder.trunc(joined, BYTES), address, align=1)
        return context.get_dummy_value()

    return types.void(packed, types.intp, words, words), generate


def pairs(context, builder, signature, arguments) -> tuple[ir.Value, ir.Value]:
    """The address of out[at] and what belongs there: first[0], second[0], first[1], second[1], …"""
    out, at, first, second = arguments
    if signature.args[0].dtype.bitwidth == 32:
        both = lanes(builder, first, second, [lane for i in range(16) for lane in (i, 16 + i)])
    else:  # the second of two 16-bit numbers is the upper half of their 32 bits
        both = builder.or_(first, builder.shl(second, splat(WORDS, 16)))
    return place(context, builder, signature.args[0], out, at, both.type), both


@intrinsic
def store_pairs(typing_context, out, at, first, second):
    """out[at : at + 32] = first[0], second[0], first[1], second[1], …

    `out` is an array of uint32 that holds fp32 bits, or of uint16 that holds bfloat16 bits.
    """

    def generate(context, builder, signature, arguments):
        address, both = pairs(context, builder, signature, arguments)
        builder.store(both, address, align=2)
        return context.get_dummy_value()

    return types.void(out, types.intp, words, words), generate


@intrinsic
def stream_pairs(typing_context, out, at, first, second):
    """`store_pairs`, past the caches straight to memory; the address of out[at] must be a multiple of `ALIGNMENT`."""

    def generate(context, builder, signature, arguments):
        address, both = pairs(context, builder, signature, arguments)
        store = builder.store(both, address, align=ALIGNMENT)
        store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return context.get_dummy_value()

    return types.void(out, types.intp, words, words), generate

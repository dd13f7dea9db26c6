"""4-bit codes and a table of sixteen numbers, in registers: look up a code, or find the code of a number.

A code is an index into a table of sixteen levels, and sixteen fp32 numbers fit one AVX-512 register. The
instruction that permutes the lanes of a register by indices from another one (`vpermd`) then looks up sixteen
codes at once. With AVX2, a register has eight lanes: two permutations, one for each half of the table, and a
choice by the code's highest bit.

Quantizing asks the reverse, how many of fifteen thresholds a number exceeds: a search in four steps, of
sixteen numbers at once, whose thresholds are looked up in a register too.

Why the indices are not masked: the permutation reads only the lowest four (AVX2: three) bits of a lane.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from labkit.quant.kernels.vectors import (
    BYTES,
    FLOAT,
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

PERMUTE = (
    {"int": "llvm.x86.avx512.permvar.si.512", "float": "llvm.x86.avx512.permvar.sf.512"}
    if LANES == 16
    else {"int": "llvm.x86.avx2.permd", "float": "llvm.x86.avx2.permps"}
)


@intrinsic
def load_codes(typing_context, packed, at):
    """The bytes packed[at : at + 16] as words, which hold a code in their low four bits, and one above it."""

    def generate(context, builder, signature, arguments):
        address = place(context, builder, signature.args[0], *arguments, BYTES)
        return builder.zext(builder.load(address, align=1), WORDS)

    return words(packed, types.intp), generate


@intrinsic
def first_codes(typing_context, codes):
    """The first code of each byte, which is in its high four bits, moved to the low four bits."""
    return words(words), lambda context, builder, signature, arguments: first(builder, *arguments)


def first(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """See `first_codes`."""
    return builder.lshr(codes, splat(WORDS, 4))


@intrinsic
def scaled_levels(typing_context, levels, scale):
    """levels * scale, as words that hold the bits of the fp32 products."""
    return words(floats, types.float32), lambda context, builder, signature, arguments: scaled(
        builder, *arguments
    )


def scaled(builder: ir.IRBuilder, levels: ir.Value, scale: ir.Value) -> ir.Value:
    """See `scaled_levels`."""
    return builder.bitcast(builder.fmul(levels, broadcast(builder, scale)), WORDS)


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
    return words(words, words), lambda context, builder, signature, arguments: find(builder, *arguments)


def find(builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    """See `look_up`."""
    if LANES == 16:
        return permute(builder, table, codes)
    lower, upper = halves(builder, table)
    found = []
    for eight in halves(builder, codes):
        is_upper = builder.icmp_signed("<", builder.shl(eight, splat(eight.type, 28)), splat(eight.type, 0))
        either = [permute(builder, part, eight) for part in (upper, lower)]
        found.append(builder.select(is_upper, *either))
    return lanes(builder, *found, range(16))


@intrinsic
def ranks(typing_context, values, thresholds):
    """How many of the first fifteen thresholds, which rise, each value exceeds; 0 for NaN."""

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
    """packed[at : at + 16] = bytes of two codes each: first[0] and first[1], …, second[14] and second[15]."""

    def generate(context, builder, signature, arguments):
        packed, at, *codes = arguments
        in_bytes = lanes(builder, *(builder.trunc(half, BYTES) for half in codes), range(32))
        two = builder.bitcast(in_bytes, ir.VectorType(ir.IntType(16), 16))  # the first of two is the low byte
        joined = builder.or_(builder.shl(two, splat(two.type, 4)), builder.lshr(two, splat(two.type, 8)))
        address = place(context, builder, signature.args[0], packed, at, BYTES)
        builder.store(builder.trunc(joined, BYTES), address, align=1)
        return context.get_dummy_value()

    return types.void(packed, types.intp, words, words), generate

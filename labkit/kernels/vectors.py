"""Sixteen numbers at once: the part of the CPU kernels that numba cannot say in Python.

A 4-bit code is an index into a table of sixteen levels, and sixteen fp32 numbers are one AVX-512 register. The
instruction that permutes the lanes of a register by indices from another (`vpermd`) then looks up sixteen codes at
once. With AVX2 a register has eight lanes: two permutations, one for each half of the table, and a choice by the
code's highest bit. On other processors `LANES` is 0, and the kernels loop over a table in memory.

This file gives numba two types, a vector of sixteen 32-bit words and one of sixteen fp32 numbers, and the few
operations on them that the kernels use. LLVM cuts a vector of sixteen in two where a register holds eight.

Why multiply the levels, and not the weights that were looked up: the product is the same, and rounding it to bfloat16
then costs sixteen operations a block instead of one for every weight. Why the indices are not masked: the permutation
reads only the lowest four (AVX2: three) bits of a lane.
"""

import numba
from llvmlite import ir
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

FEATURES = (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",")
LANES = 16 if "+avx512f" in FEATURES else 8 if {"+avx2", "+fma"} <= set(FEATURES) else 0
ALIGNMENT = 64  # bytes, of what is stored past the caches
INT32, INTP, FLOAT = ir.IntType(32), ir.IntType(types.intp.bitwidth), ir.FloatType()
BYTES, WORDS, FLOATS = (ir.VectorType(element, 16) for element in (ir.IntType(8), INT32, FLOAT))


class VectorType(types.Type):
    """Sixteen numbers in a register, as numba sees them."""


words, floats = VectorType("sixteen words"), VectorType("sixteen floats")


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is passed around as the LLVM vector that it is."""

    def __init__(self, manager, vector):
        super().__init__(manager, vector, WORDS if vector is words else FLOATS)


def splat(vector: ir.VectorType, value: int) -> ir.Constant:
    """The same constant in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def lanes(builder: ir.IRBuilder, vector: ir.Value, other: ir.Value, chosen) -> ir.Value:
    """A vector of the `chosen` lanes of two, which are numbered on from the first to the second."""
    chosen = list(chosen)
    return builder.shuffle_vector(vector, other, ir.Constant(ir.VectorType(INT32, len(chosen)), chosen))


def place(context, builder: ir.IRBuilder, array_type, array: ir.Value, at: ir.Value, vector: ir.VectorType):
    """The address of array[at] as that of a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """An LLVM intrinsic that takes and returns vectors of one type."""
    function_type = ir.FunctionType(arguments[0].type, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


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
        first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), arguments[1], INT32(0))
        scales = lanes(builder, first, first, [0] * 16)
        return builder.bitcast(builder.fmul(builder.load(address, align=4), scales), WORDS)

    return words(levels, types.float32), generate


@intrinsic
def to_bfloat16(typing_context, table):
    """fp32 bits to bfloat16 bits in the low half of each word: the upper half of a float32, rounded to even."""

    def generate(context, builder, signature, arguments):
        (bits,) = arguments
        even = builder.and_(builder.lshr(bits, splat(WORDS, 16)), splat(WORDS, 1))
        return builder.lshr(builder.add(builder.add(bits, splat(WORDS, 0x7FFF)), even), splat(WORDS, 16))

    return words(words), generate


@intrinsic
def look_up(typing_context, table, codes):
    """table[code] in every lane; only the low four bits of a code count."""

    def generate(context, builder, signature, arguments):
        table, codes = arguments
        if LANES == 16:
            return call(builder, "llvm.x86.avx512.permvar.si.512", table, codes)
        lower, upper = (lanes(builder, table, table, half) for half in (range(8), range(8, 16)))
        found = []
        for half in (range(8), range(8, 16)):
            eight = lanes(builder, codes, codes, half)
            is_upper = builder.icmp_signed(
                "<", builder.shl(eight, splat(eight.type, 28)), splat(eight.type, 0)
            )
            either = [call(builder, "llvm.x86.avx2.permd", part, eight) for part in (upper, lower)]
            found.append(builder.select(is_upper, *either))
        return lanes(builder, *found, range(16))

    return words(words, words), generate


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


@intrinsic
def load_floats(typing_context, array, at):
    """array[at : at + 16]."""

    def generate(context, builder, signature, arguments):
        return builder.load(place(context, builder, signature.args[0], *arguments, FLOATS), align=4)

    return floats(array, types.intp), generate


@intrinsic
def zeros(typing_context):
    """Sixteen zeros."""
    return floats(), lambda context, builder, signature, arguments: splat(FLOATS, 0)


@intrinsic
def multiply_add(typing_context, weights, values, sums):
    """weights * values + sums with one rounding; `weights` are words with fp32 bits."""

    def generate(context, builder, signature, arguments):
        weights, values, sums = arguments
        return call(builder, "llvm.fma.v16f32", builder.bitcast(weights, FLOATS), values, sums)

    return floats(words, floats, floats), generate


@intrinsic
def total(typing_context, one, other):
    """The sum of both vectors, always in the same order."""

    def generate(context, builder, signature, arguments):
        sums = builder.fadd(*arguments)
        for half in (8, 4, 2, 1):
            left, right = (lanes(builder, sums, sums, range(k, k + half)) for k in (0, half))
            sums = builder.fadd(left, right)
        return builder.extract_element(sums, INT32(0))

    return types.float32(floats, floats), generate


@intrinsic
def next_part(typing_context, arguments):
    """arguments[0] += 1 in one go, also among threads; the value before."""

    def generate(context, builder, signature, values):
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, ir.IntType(64)(1), "seq_cst")

    return types.int64(arguments), generate


@intrinsic
def pointer(typing_context, address):
    """The memory at an address that came as a number, for `numba.carray`."""
    return types.voidptr(types.int64), lambda context, builder, signature, arguments: builder.inttoptr(
        arguments[0], ir.IntType(8).as_pointer()
    )

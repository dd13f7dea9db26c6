"""Sixteen numbers at once: the part of the CPU kernels that numba cannot express in Python.

This file gives numba two types, a vector of sixteen 32-bit words and one of sixteen fp32 numbers, and the few
operations on them that the kernels use; those on 4-bit codes are in `lookups.py` and `stores.py`. One AVX-512
register holds such a vector; with AVX2 a register has eight lanes, and LLVM cuts a vector in two. On other
processors `LANES` is 0, and the kernels loop without vectors (except for the largest magnitude of a block,
whose instructions every processor has).
"""

import numba
from llvmlite import ir
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

FEATURES = (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",")
LANES = 16 if "+avx512f" in FEATURES else 8 if {"+avx2", "+fma"} <= set(FEATURES) else 0
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
    """The `chosen` lanes of two vectors; the lanes of `other` are numbered on from those of `vector`."""
    chosen = list(chosen)
    return builder.shuffle_vector(vector, other, ir.Constant(ir.VectorType(INT32, len(chosen)), chosen))


def place(context, builder: ir.IRBuilder, array_type, array: ir.Value, at: ir.Value, vector: ir.VectorType):
    """The address of array[at] as that of a vector."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """An fp32 number in every lane."""
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, INT32(0))
    return lanes(builder, first, first, [0] * 16)


def call(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """An LLVM intrinsic that returns a vector of the type of its first argument."""
    function_type = ir.FunctionType(arguments[0].type, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


@intrinsic
def load_floats(typing_context, array, at):
    """array[at : at + 16]."""

    def generate(context, builder, signature, arguments):
        return builder.load(place(context, builder, signature.args[0], *arguments, FLOATS), align=4)

    return floats(array, types.intp), generate


@intrinsic
def load_words(typing_context, array, at):
    """The bits of array[at : at + 16], an array of 32-bit numbers."""

    def generate(context, builder, signature, arguments):
        return builder.load(place(context, builder, signature.args[0], *arguments, WORDS), align=4)

    return words(array, types.intp), generate


@intrinsic
def times(typing_context, values, factor):
    """values * factor."""
    return floats(floats, types.float32), lambda context, builder, signature, arguments: builder.fmul(
        arguments[0], broadcast(builder, arguments[1])
    )


@intrinsic
def magnitudes(typing_context, numbers):
    """fp32 bits without their sign. As integers they sort like the magnitudes; infinity and NaN come last."""
    return words(words), lambda context, builder, signature, arguments: builder.and_(
        arguments[0], splat(WORDS, 0x7FFFFFFF)
    )


def greater(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """See `larger`."""
    return builder.select(builder.icmp_signed(">", one, other), one, other)


@intrinsic
def larger(typing_context, one, other):
    """The larger of two integers in every lane."""
    return words(words, words), lambda context, builder, signature, arguments: greater(builder, *arguments)


@intrinsic
def largest(typing_context, integers):
    """The largest of the sixteen."""

    def generate(context, builder, signature, arguments):
        return builder.extract_element(reduce(builder, greater, arguments[0]), INT32(0))

    return types.int32(words), generate


def reduce(builder: ir.IRBuilder, join, vector: ir.Value) -> ir.Value:
    """A vector of one lane: the lanes joined two by two, always in the same order."""
    for half in (8, 4, 2, 1):
        vector = join(builder, *(lanes(builder, vector, vector, range(k, k + half)) for k in (0, half)))
    return vector


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
        sums = reduce(builder, ir.IRBuilder.fadd, builder.fadd(*arguments))
        return builder.extract_element(sums, INT32(0))

    return types.float32(floats, floats), generate


@intrinsic
def next_part(typing_context, arguments):
    """arguments[0] += 1, atomically among threads; returns the value before."""

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

"""Sixteen table look-ups in one instruction: the part of the CPU kernels that numba cannot say in Python.

A 4-bit code is an index into a table of sixteen levels, and sixteen fp32 numbers are one AVX-512 register. The
instruction that permutes the lanes of a register by indices from another (`vpermd`) then looks up sixteen codes at
once. With AVX2 a register has eight lanes: two permutations, one for each half of the table, and a choice by the
code's highest bit. On other processors `LANES` is 0, and `cpu.py` loops over a table in memory.

Why multiply the levels, and not the weights that were looked up: the product is the same, and rounding it to bfloat16
then costs sixteen operations a block instead of one for every weight.

Why the indices are not masked: the permutation reads only the lowest four (AVX2: three) bits of a lane.
"""

import numba
from llvmlite import ir
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

FEATURES = (numba.config.CPU_FEATURES or get_host_cpu_features()).split(",")
LANES = 16 if "+avx512f" in FEATURES else 8 if "+avx2" in FEATURES else 0
INT32, INTP = ir.IntType(32), ir.IntType(types.intp.bitwidth)


def splat(vector_type: ir.VectorType, value: int) -> ir.Constant:
    """The same constant in every lane."""
    return ir.Constant(vector_type, [value] * vector_type.count)


def indices(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
    """LANES / 2 bytes from the address `at` on, as LANES 32-bit numbers whose low four bits are the codes."""
    pairs = ir.VectorType(ir.IntType(64), LANES // 2)
    codes = builder.load(builder.bitcast(at, ir.VectorType(ir.IntType(8), LANES // 2).as_pointer()), align=1)
    codes = builder.zext(codes, pairs)  # a byte in each 64 bits: its high code goes to their lower half
    codes = builder.or_(builder.lshr(codes, splat(pairs, 4)), builder.shl(codes, splat(pairs, 32)))
    return builder.bitcast(codes, ir.VectorType(INT32, LANES))


def table_part(builder: ir.IRBuilder, at: ir.Value, scale: ir.Value, to_bfloat16: bool) -> ir.Value:
    """LANES levels from the address `at` on, times `scale`, as 32-bit words; bfloat16 is in their low 16 bits."""
    words, floats = ir.VectorType(INT32, LANES), ir.VectorType(ir.FloatType(), LANES)
    first = builder.insert_element(ir.Constant(floats, ir.Undefined), scale, INT32(0))
    scales = builder.shuffle_vector(first, first, splat(words, 0))
    levels = builder.load(builder.bitcast(at, floats.as_pointer()), align=4)
    bits = builder.bitcast(builder.fmul(levels, scales), words)
    if to_bfloat16:  # the upper half of a float32, rounded to even
        even = builder.and_(builder.lshr(bits, splat(words, 16)), splat(words, 1))
        bits = builder.lshr(builder.add(builder.add(bits, splat(words, 0x7FFF)), even), splat(words, 16))
    return bits


def permute(builder: ir.IRBuilder, part: ir.Value, codes: ir.Value) -> ir.Value:
    """part[code] in every lane."""
    name = "llvm.x86.avx512.permvar.si.512" if LANES == 16 else "llvm.x86.avx2.permd"
    function_type = ir.FunctionType(part.type, [part.type, part.type])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, [part, codes])


@intrinsic
def look_up(typing_context, packed, at, levels, scale, out, to):
    """out[to : to + LANES] = levels[code] * scale for the codes in packed[at : at + LANES / 2].

    `out` is an array of uint32 that holds fp32 bits, or of uint16 that holds bfloat16 bits.
    """

    def generate(context, builder, signature, arguments):
        def address(k, index):
            return builder.gep(
                context.make_array(signature.args[k])(context, builder, arguments[k]).data, [index]
            )

        element = ir.IntType(signature.args[4].dtype.bitwidth)
        codes = indices(builder, address(0, arguments[1]))
        parts = [
            table_part(builder, address(2, INTP(k)), arguments[3], element.width == 16)
            for k in range(0, 16, LANES)
        ]
        words = [permute(builder, part, codes) for part in parts]
        if LANES == 8:
            is_upper = builder.icmp_signed(
                "<", builder.shl(codes, splat(codes.type, 28)), splat(codes.type, 0)
            )
            words = [builder.select(is_upper, words[1], words[0])]
        result_type = ir.VectorType(element, LANES)
        result = words[0] if element.width == 32 else builder.trunc(words[0], result_type)
        place = builder.bitcast(address(4, arguments[5]), result_type.as_pointer())
        builder.store(result, place, align=element.width // 8)
        return context.get_dummy_value()

    return types.void(packed, types.intp, levels, types.float32, out, types.intp), generate

"""Products of small matrices by one warp: `mma.sync`, and its operands in shared memory.

In all fragments of m16n8k8, lane ``4 g + t`` holds rows g and g + 8 of A and C, and column g of B:
A: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  B: (t, g), (t + 4, g);  C: (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
Those of m16n8k16 hold two 16-bit elements, 2t and 2t + 1, where those have one, and C is the same.
"""

import cutlass.experimental.primitives as prims
from cutlass import BFloat16, Float32
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure, pure_floats
from cute_ssm.device.convert import as_word


@dsl_user_op
def mma_tf32(a, b, c, *, loc=None, ip=None):
    """c + A[16, 8] B[8, 8] in float32; the low 13 bits of all elements of A and B are ignored."""
    text = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};"
    )
    operands = [*["r"] * 6, *["f"] * 4]
    words = [as_word(value, loc=loc, ip=ip) for value in (*a, *b)]
    results = pure_floats(4, [*words, *c], text, operands, loc, ip)
    return [Float32(value) for value in results]


@dsl_user_op
def mma_16(a, b, c, dtype, *, loc=None, ip=None):
    """c + A[16, 16] B[16, 8] in float32, of words of two bfloat16 or float16."""
    kind = "bf16" if dtype is BFloat16 else "f16"
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
        "{$10, $11, $12, $13};"
    )
    results = pure_floats(4, [*a, *b, *c], text, [*["r"] * 6, *["f"] * 4], loc, ip)
    return [Float32(value) for value in results]


@dsl_user_op
def _cut(value, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [value], "and.b32 $0, $1, 0xffffe000;", "=f,f", loc, ip))


@dsl_user_op
def _half_up(value, *, loc=None, ip=None):
    """The value whose high 19 bits are those of `value` rounded to nearest, ties away from zero."""
    return Float32(pure(T.f32(), [value], "add.s32 $0, $1, 0x1000;", "=f,f", loc, ip))


def rounded(values):
    """Floats of which `mma_tf32` sees the nearest tf32, ties away from zero."""
    return [_half_up(value) for value in values]


def split(values):
    """(high, low) of floats: high + low are the values exactly, high is tf32, and low nearly so.

    Low has 13 bits, of which `mma_tf32` ignores up to two: 2^-22 of the value at worst.  On sm_90a, ``cvt.rna.tf32`` is
    four instructions, so what it would gain has its price (sm_90a, ptxas 13.0).
    """
    high = [_cut(value) for value in values]
    return high, [value - part for value, part in zip(values, high)]


def split_fully(values):
    """(high, low) of floats, both as good as rounded to tf32: what `mma_tf32` sees of them adds up to 2^-24.

    Magnitudes within 2^-12 of the largest float32 become infinite; NaN and infinities stay what they are, or NaN.
    """
    high = [_cut(_half_up(value)) for value in values]
    return high, [_half_up(value - part) for value, part in zip(values, high)]


def load_matrices(pointer, count, transposed=True):
    """`count` (1, 2 or 4) 8x8 matrices of 16-bit elements, one row at each lane's address.

    Lane ``4 g + t`` gets elements (2t, g) and (2t + 1, g) of each in one register, or (g, 2t) and (g, 2t + 1) if they
    are not to be transposed.
    """
    words = prims.ldmatrix(pointer.raw_ptr(), count, prims.MMALayout.COL if transposed else prims.MMALayout.ROW)
    return [words] if count == 1 else [words[i] for i in range(count)]


def store_matrices(pointer, words, transposed=True):
    """The inverse of `load_matrices`."""
    prims.stmatrix(pointer.raw_ptr(), list(words), prims.MMALayout.COL if transposed else prims.MMALayout.ROW)

"""Products of small matrices by one warp: `mma.sync`, and its operands in shared memory.

In all fragments of m16n8k8, lane ``4 g + t`` holds rows g and g + 8 of A and C, and column g of B:
A: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  B: (t, g), (t + 4, g);  C: (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
In m16n8k16, each register of A and B holds two 16-bit elements, 2t and 2t + 1, and C is the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cutlass.cute as cute
import cutlass.experimental.primitives as prims
from cutlass import BFloat16, Float32, Int32, Numeric
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure, pure_floats
from cute_ssm.device.convert import as_word


class Parts(NamedTuple):
    """Floats as sums of two parts, each of which `mma_tf32` can multiply."""

    high: list[Float32]
    low: list[Float32]


@dsl_user_op
def mma_tf32(
    a: Sequence[Float32], b: Sequence[Float32], c: Sequence[Float32], *, loc: Any = None, ip: Any = None
) -> list[Float32]:
    """Return c + A[16, 8] B[8, 8] in float32; the low 13 bits of all elements of A and B are ignored."""
    text = (
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};"
    )
    words = [as_word(value, loc=loc, ip=ip) for value in (*a, *b)]
    results = pure_floats(4, [*words, *c], text, "rrrrrrffff", loc, ip)
    return [Float32(value) for value in results]


@dsl_user_op
def mma_16(
    a: Sequence[Int32],
    b: Sequence[Int32],
    c: Sequence[Float32],
    dtype: type[Numeric],
    *,
    loc: Any = None,
    ip: Any = None,
) -> list[Float32]:
    """Return c + A[16, 16] B[16, 8] in float32; A and B are words of two bfloat16 or float16."""
    kind = "bf16" if dtype is BFloat16 else "f16"
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
        "{$10, $11, $12, $13};"
    )
    results = pure_floats(4, [*a, *b, *c], text, "rrrrrrffff", loc, ip)
    return [Float32(value) for value in results]


@dsl_user_op
def _cut(value: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Clear the bits that `mma_tf32` ignores."""
    return Float32(pure(T.f32(), [value], "and.b32 $0, $1, 0xffffe000;", "=f,f", loc, ip))


@dsl_user_op
def _half_up(value: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return a value whose high 19 bits are those of `value` rounded to nearest, ties away from zero."""
    return Float32(pure(T.f32(), [value], "add.s32 $0, $1, 0x1000;", "=f,f", loc, ip))


def rounded(values: Sequence[Float32]) -> list[Float32]:
    """Return floats that `mma_tf32` reads as the nearest tf32 of `values`, ties away from zero."""
    return [_half_up(value) for value in values]


def split(values: Sequence[Float32]) -> Parts:
    """Split floats exactly into high parts, which are tf32, and low parts, which nearly are.

    Low has 13 bits, of which `mma_tf32` ignores up to two: 2^-22 of the value at worst.  Rounding it by
    ``cvt.rna.tf32`` would take four instructions (sm_90a, ptxas 13.0).
    """
    high = [_cut(value) for value in values]
    return Parts(high, [value - part for value, part in zip(values, high)])


def split_fully(values: Sequence[Float32]) -> Parts:
    """Split floats into two parts whose sum, as `mma_tf32` reads them, has a relative error of 2^-24.

    Magnitudes within 2^-12 of the largest float32 become infinite; an infinity stays infinite or becomes NaN, and NaN
    stays NaN.
    """
    high = [_cut(_half_up(value)) for value in values]
    return Parts(high, [_half_up(value - part) for value, part in zip(values, high)])


def load_matrices(pointer: cute.Pointer, count: int, transposed: bool = True) -> list[Int32]:
    """Load `count` (1, 2 or 4) 8x8 matrices of 16-bit elements, one row at each lane's address.

    Lane ``4 g + t`` gets elements (2t, g) and (2t + 1, g) of each matrix in one register, or (g, 2t) and (g, 2t + 1)
    if `transposed` is False.
    """
    words = prims.ldmatrix(pointer.raw_ptr(), count, prims.MMALayout.COL if transposed else prims.MMALayout.ROW)
    return [words] if count == 1 else [words[i] for i in range(count)]


def store_matrices(pointer: cute.Pointer, words: Sequence[Int32], transposed: bool = True) -> None:
    """Store the matrices that `load_matrices` loads."""
    prims.stmatrix(pointer.raw_ptr(), list(words), prims.MMALayout.COL if transposed else prims.MMALayout.ROW)

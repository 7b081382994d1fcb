"""Loads, stores and bulk copies.

Registers hold the contents of memory as *words* (`convert`); the caller says how many bytes one access may take.
"""

from collections.abc import Sequence
from typing import Any, Optional

import cutlass
import cutlass.cute as cute
import cutlass.experimental.primitives as prims
from cutlass import Boolean, Float32, Int8, Int16, Int32, Int64, Numeric
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device import convert


def address(tensor: cute.Tensor, *coordinate: Any) -> cute.Pointer:
    """Return a pointer to an element; offsets are computed in the type of the strides, 64 bits for symbolic ones."""
    return tensor.iterator + cute.crd2idx(coordinate, tensor.layout)


@dsl_user_op
def pinned(value: Numeric, *, loc: Any = None, ip: Any = None) -> Numeric:
    """Return the same integer, opaque to LLVM: nothing computed from it moves ahead of this point.

    LLVM also stops computing the value again wherever a loop uses it.  ptxas sees a plain move.
    """
    kind, wrap, letter = (T.i64(), Int64, "l") if value.width == 64 else (T.i32(), Int32, "r")
    operand = value.ir_value(loc=loc, ip=ip)
    text = f"mov.b{value.width} $0, $1;"
    return wrap(
        llvm.inline_asm(
            kind, [operand], text, f"={letter},{letter}", has_side_effects=True, is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
        )
    )  # fmt: skip


def global_bytes(address: Int64, align: int = 16) -> cute.Pointer:
    """Return a pointer to an address in global memory, a multiple of `align`; bulk copies need multiples of 16."""
    return cute.make_ptr(Int8, address, cute.AddressSpace.gmem, assumed_align=align)


def either(condition: Boolean, pointer: cute.Pointer, other: cute.Pointer) -> cute.Pointer:
    """Return one of two pointers to shared memory, for loads of up to 8 bytes; the condition may differ per thread."""
    chosen = cutlass.select_(condition, pointer.toint(), other.toint())
    return cute.make_ptr(pointer.dtype, chosen, cute.AddressSpace.smem, assumed_align=8)


_INTEGERS = {8: (T.i8, Int8), 16: (T.i16, Int16), 32: (T.i32, Int32), 64: (T.i64, Int64)}


@dsl_user_op
def load_words(ptr: cute.Pointer, count: int, bits: int = 32, *, loc: Any = None, ip: Any = None) -> list[Numeric]:
    """Load `count` (1, 2 or 4) words of `bits`, at most 16 bytes, from an address that is a multiple of their size."""
    kind, wrap = _INTEGERS[bits]
    source, alignment = ptr.to_llvm_ptr(loc=loc, ip=ip), count * bits // 8
    if count == 1:
        return [wrap(llvm.load(kind(), source, alignment=alignment, loc=loc, ip=ip))]
    vector = llvm.load(ir.VectorType.get([count], kind()), source, alignment=alignment, loc=loc, ip=ip)
    index = [llvm.mlir_constant(ir.IntegerAttr.get(T.i32(), i), loc=loc, ip=ip) for i in range(count)]
    return [wrap(llvm.extractelement(vector, i, loc=loc, ip=ip)) for i in index]


@dsl_user_op
def store_words(ptr: cute.Pointer, words: Sequence[Numeric], *, loc: Any = None, ip: Any = None) -> None:
    """Store 1, 2 or 4 words at an address that is a multiple of their size; a single one may be of 8 or 16 bits."""
    target = ptr.to_llvm_ptr(loc=loc, ip=ip)
    if len(words) == 1:
        size = words[0].width // 8
        llvm.store(words[0].ir_value(loc=loc, ip=ip), target, alignment=size, loc=loc, ip=ip)
        return
    vector = llvm.mlir_undef(ir.VectorType.get([len(words)], T.i32()), loc=loc, ip=ip)
    for i, word in enumerate(words):
        index = llvm.mlir_constant(ir.IntegerAttr.get(T.i32(), i), loc=loc, ip=ip)
        vector = llvm.insertelement(vector, word.ir_value(loc=loc, ip=ip), index, loc=loc, ip=ip)
    llvm.store(vector, target, alignment=4 * len(words), loc=loc, ip=ip)


@dsl_user_op
def load_scalar(ptr: cute.Pointer, dtype: type[Numeric], *, loc: Any = None, ip: Any = None) -> Float32:
    """Load one element as float32."""
    return convert.widen(load_words(ptr, 1, dtype.width, loc=loc, ip=ip)[0], dtype, loc=loc, ip=ip)


@dsl_user_op
def store_scalar(
    ptr: cute.Pointer,
    value: Float32,
    dtype: type[Numeric],
    saturate: bool = False,
    *,
    loc: Any = None,
    ip: Any = None,
) -> None:
    """Round one float32 to nearest even and store it; 16-bit types may saturate."""
    bits = convert.narrow(value, dtype, saturate, loc=loc, ip=ip)
    llvm.store(
        bits.ir_value(loc=loc, ip=ip), ptr.to_llvm_ptr(loc=loc, ip=ip), alignment=dtype.width // 8, loc=loc, ip=ip
    )


def load(ptr: cute.Pointer, dtype: type[Numeric], count: int, access_bytes: int) -> list[Float32]:
    """Load `count` contiguous elements as float32, by accesses of `access_bytes` (one element's size up to 16).

    Quantised elements are not multiplied by their scale.
    """
    per_access = access_bytes * 8 // dtype.width
    values: list[Float32] = []
    for first in range(0, count, per_access):
        if per_access == 1 and access_bytes < 4:
            values.append(load_scalar(ptr + first, dtype))
        elif access_bytes < 4:
            word = Int32(load_words(ptr + first, 1, access_bytes * 8)[0])
            values += convert.unpack([word], dtype)[:per_access]
        else:
            bits = convert.word_bits(dtype, access_bytes)
            values += convert.unpack(load_words(ptr + first, access_bytes * 8 // bits, bits), dtype)
    return values


def load_packed(ptr: cute.Pointer, count: int, access_bytes: int) -> list[Int32]:
    """Load `count` 32-bit words of 16-bit elements from a multiple of `access_bytes` (2 to 16), that many at a time."""
    if access_bytes == 2:
        halves = [Int32(load_words(ptr + i, 1, 16)[0]) for i in range(2 * count)]
        return [low & 0xFFFF | high << 16 for low, high in zip(halves[::2], halves[1::2])]
    width = min(access_bytes // 4, count)
    return [word for first in range(0, count, width) for word in load_words(ptr + 2 * first, width)]


def store(
    ptr: cute.Pointer, values: Sequence[Float32], dtype: type[Numeric], access_bytes: int, saturate: bool = False
) -> None:
    """Round float32 values to nearest even and store them contiguously, by accesses of `access_bytes`.

    16-bit types may saturate (`convert.pack`).
    """
    if access_bytes < 4:
        for i, value in enumerate(values):
            store_scalar(ptr + i, value, dtype, saturate)
        return
    store_packed(ptr, convert.pack(values, dtype, saturate), dtype, access_bytes)


def store_packed(
    ptr: cute.Pointer,
    words: Sequence[Int32],
    dtype: type[Numeric],
    access_bytes: int,
    count: Optional[int] = None,
) -> None:
    """Store the elements of type `dtype` in 32-bit `words` contiguously, by accesses of `access_bytes` (1 to 16).

    All elements, or the first `count`, a whole number of accesses.
    """
    if access_bytes < 4:
        per_access, bits = access_bytes * 8 // dtype.width, access_bytes * 8
        _, piece = _INTEGERS[bits]
        pieces = [piece(word >> shift) for word in words for shift in range(0, 32, bits)]
    else:
        width = access_bytes // 4
        per_access = 32 // dtype.width * width
        pieces = [words[i : i + width] for i in range(0, len(words), width)]
    if count is not None:
        pieces = pieces[: count // per_access]
    for i, part in enumerate(pieces):
        store_words(ptr + i * per_access, part if access_bytes >= 4 else [part])


def bulk_load(dst: cute.Pointer, src: cute.Pointer, n_bytes: Int32 | int, mbar: cute.Pointer) -> None:
    """Copy `n_bytes` (a multiple of 16) to shared memory; `mbar` counts them.  Each thread that calls this copies."""
    prims.cp_async_bulk_shared_cluster_global(dst.raw_ptr(), src.raw_ptr(), mbar.raw_ptr(), n_bytes)


def bulk_store(dst: cute.Pointer, src: cute.Pointer, n_bytes: Int32 | int) -> None:
    """Copy `n_bytes` (a multiple of 16) to global memory in the current bulk group.  Each calling thread copies."""
    prims.cp_async_bulk_global_shared_cta(dst.raw_ptr(), src.raw_ptr(), n_bytes)

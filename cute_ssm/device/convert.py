"""Every numeric cast of the package.

A *word* is a register as memory holds it, the first element in its lowest bits: an `Int32` of one float32 or two 16-bit
elements, or an `Int64` of four float16, which one instruction takes apart.
"""

import cutlass
from cutlass import BFloat16, Float16, Float32, Int16, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure, pure_floats

DTYPES = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "float16": Float16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}
_PTX = {BFloat16: "bf16", Float16: "f16"}


@dsl_user_op
def as_float(word, *, loc=None, ip=None):
    """The float32 with the bits of `word`."""
    return Float32(llvm.bitcast(T.f32(), word.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def as_word(value, *, loc=None, ip=None):
    """The bits of a float32."""
    return Int32(llvm.bitcast(T.i32(), value.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def _unpack_bfloat16(word, *, loc=None, ip=None):
    texts = ("shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;")
    return [Float32(pure(T.f32(), [word], text, "=f,r", loc, ip)) for text in texts]


@dsl_user_op
def _unpack_float16(word, *, loc=None, ip=None):
    count = word.width // 16
    halves = [f"h{i}" for i in range(count)]
    converts = " ".join(f"cvt.f32.f16 ${i}, h{i};" for i in range(count))
    text = f"{{ .reg .b16 {', '.join(halves)}; mov.b{word.width} {{{', '.join(halves)}}}, ${count}; {converts} }}"
    return [Float32(value) for value in pure_floats(count, [word], text, "l" if count == 4 else "r", loc, ip)]


@dsl_user_op
def _pack_pair(low, high, dtype, *, loc=None, ip=None):
    return Int32(pure(T.i32(), [high, low], f"cvt.rn.{_PTX[dtype]}x2.f32 $0, $1, $2;", "=r,f,f", loc, ip))


def word_bits(dtype, access_bytes):
    """Width of the words in which `unpack` takes loads of `access_bytes`."""
    return 64 if dtype is Float16 and access_bytes >= 8 else 32


def unpack(words, dtype):
    """All elements of `words`, exactly, as a list of float32."""
    if dtype is Float32:
        return [as_float(word) for word in words]
    split = _unpack_bfloat16 if dtype is BFloat16 else _unpack_float16
    return [value for word in words for value in split(word)]


def pack(values, dtype):
    """Words of `values` rounded to nearest even."""
    if dtype is Float32:
        return [as_word(value) for value in values]
    return [_pack_pair(values[i], values[i + 1], dtype) for i in range(0, len(values), 2)]


@dsl_user_op
def widen(bits, dtype, *, loc=None, ip=None):
    """One element, given as an integer register of its own width, exactly as float32."""
    if dtype is Float32:
        return as_float(bits, loc=loc, ip=ip)
    if dtype is BFloat16:
        return Float32(pure(T.f32(), [bits], "mov.b32 $0, {0, $1};", "=f,h", loc, ip))
    return Float32(pure(T.f32(), [bits], "cvt.f32.f16 $0, $1;", "=f,h", loc, ip))


@dsl_user_op
def narrow(value, dtype, *, loc=None, ip=None):
    """One float32 rounded to nearest even, as an integer register of the result's width."""
    if dtype is Float32:
        return as_word(value, loc=loc, ip=ip)
    return Int16(pure(T.i16(), [value], f"cvt.rn.{_PTX[dtype]}.f32 $0, $1;", "=h,f", loc, ip))

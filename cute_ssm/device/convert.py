"""Every numeric cast of the package.

A *word* is a register with the bits of memory, the first element in its lowest bits: an `Int32` of one float32, two
16-bit or four 8-bit elements, or an `Int64` of four float16, which one instruction unpacks.

`cute_ssm.reference.rounding` defines the results, and the functions here match it bit for bit on every architecture.
Quantised elements are unpacked without their scale; the caller multiplies by the scale of the row.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int8, Int16, Int32, Numeric
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.arch import Arch
from cute_ssm.device.asm import pure, pure_floats

DTYPES: dict[Optional[str], type[Numeric]] = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "float16": Float16,
    "float8_e4m3fn": Float8E4M3FN,
    "int8": cutlass.Int8,
    "int16": cutlass.Int16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}
# (1 + 2^-22) / (largest magnitude of a quantised type), rounded up
SCALE_FACTORS: dict[type[Numeric], float] = {
    Int8: float.fromhex("0x1.02040e0000000p-7"),
    Int16: float.fromhex("0x1.0002060000000p-15"),
    Float8E4M3FN: float.fromhex("0x1.24924e0000000p-9"),
}
SMALLEST_SCALE = 2.0**-126
_PTX: dict[type[Numeric], str] = {BFloat16: "bf16", Float16: "f16"}
# 1.5 * 2^23: added to an integer below 2^22 in magnitude, it leaves that integer in the low bits of a float32's pattern
_MAGIC = 12582912


@dsl_user_op
def as_float(word: Int32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return the float32 with the bits of `word`."""
    return Float32(llvm.bitcast(T.f32(), word.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def as_word(value: Float32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the bits of a float32."""
    return Int32(llvm.bitcast(T.i32(), value.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def _unpack_bfloat16(word: Numeric, *, loc: Any = None, ip: Any = None) -> list[Float32]:
    texts = ("shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;")
    return [Float32(pure(T.f32(), [word], text, "=f,r", loc, ip)) for text in texts]


@dsl_user_op
def _unpack_float16(word: Numeric, *, loc: Any = None, ip: Any = None) -> list[Float32]:
    count = word.width // 16
    halves = [f"h{i}" for i in range(count)]
    converts = " ".join(f"cvt.f32.f16 ${i}, h{i};" for i in range(count))
    text = f"{{ .reg .b16 {', '.join(halves)}; mov.b{word.width} {{{', '.join(halves)}}}, ${count}; {converts} }}"
    return [Float32(value) for value in pure_floats(count, [word], text, "l" if count == 4 else "r", loc, ip)]


@dsl_user_op
def _pack_pair(
    low: Float32, high: Float32, dtype: type[Numeric], saturate: bool = False, *, loc: Any = None, ip: Any = None
) -> Int32:
    name = f"cvt.rn{_finite(saturate)}.{_PTX[dtype]}x2.f32"
    return Int32(pure(T.i32(), [high, low], f"{name} $0, $1, $2;", "=r,f,f", loc, ip))


def _finite(saturate: bool) -> str:
    """Return the modifier that replaces an infinite result by the largest finite number; NaN stays NaN."""
    return ".satfinite" if saturate else ""


@dsl_user_op
def _unpack_integers(word: Int32, dtype: type[Numeric], *, loc: Any = None, ip: Any = None) -> list[Float32]:
    """Add each element to the bit pattern of the magic number by a dot product with a unit vector."""
    count = 32 // dtype.width
    name = "dp2a.lo" if count == 2 else "dp4a"
    values = []
    for i in range(count):
        text = f"{name}.s32.s32 $0, $1, {1 << 8 * i}, {_hex_word(_MAGIC)};"
        values.append(Float32(pure(T.f32(), [word], text, "=f,r", loc, ip)) - float(_MAGIC))
    return values


@dsl_user_op
def _unpack_float8(word: Int32, *, loc: Any = None, ip: Any = None) -> list[Float32]:
    text = (
        "{ .reg .b16 a, b, h0, h1, h2, h3; .reg .b32 x, y; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 x, a;"
        " cvt.rn.f16x2.e4m3x2 y, b; mov.b32 {h0, h1}, x; mov.b32 {h2, h3}, y;"
        " cvt.f32.f16 $0, h0; cvt.f32.f16 $1, h1; cvt.f32.f16 $2, h2; cvt.f32.f16 $3, h3; }"
    )
    return [Float32(value) for value in pure_floats(4, [word], text, "r", loc, ip)]


def _hex(value: float) -> str:
    """Return a float32 literal of PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _hex_word(value: float) -> str:
    """Return the bits of a float32 as an integer literal of PTX."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def word_bits(dtype: type[Numeric], access_bytes: int) -> int:
    """Return the width of the words that `unpack` expects of loads of `access_bytes`."""
    return 64 if dtype is Float16 and access_bytes >= 8 else 32


_UNPACK: dict[type[Numeric], Callable[[Numeric], list[Float32]]] = {
    BFloat16: _unpack_bfloat16,
    Float16: _unpack_float16,
    Float8E4M3FN: _unpack_float8,
    Int8: lambda word: _unpack_integers(word, Int8),
    Int16: lambda word: _unpack_integers(word, Int16),
}


def unpack(words: Sequence[Numeric], dtype: type[Numeric]) -> list[Float32]:
    """Return all elements of `words` as float32, exactly."""
    if dtype is Float32:
        return [as_float(word) for word in words]
    return [value for word in words for value in _UNPACK[dtype](word)]


def pack(values: Sequence[Float32], dtype: type[Numeric], saturate: bool = False) -> list[Int32]:
    """Round `values` to nearest even and return their words; 16-bit types saturate if `saturate` is set."""
    if dtype is Float32:
        return [as_word(value) for value in values]
    return [_pack_pair(values[i], values[i + 1], dtype, saturate) for i in range(0, len(values), 2)]


# ------------------------------------------------------------------------------------------------- stochastic rounding
@dsl_user_op
def _pack_pair_rs(
    low: Float32, high: Float32, random: Int32, dtype: type[Numeric], saturate: bool, *, loc: Any = None, ip: Any = None
) -> Int32:
    """Round stochastically: the low half of the random word rounds the low element, as the hardware defines."""
    text = f"cvt.rs{_finite(saturate)}.{_PTX[dtype]}x2.f32 $0, $1, $2, $3;"
    return Int32(pure(T.i32(), [high, low, random], text, "=r,f,f,r", loc, ip))


@dsl_user_op
def _add_half(word: Float32, random: Int32, half: int, shift: int, *, loc: Any = None, ip: Any = None) -> Float32:
    """Add one half of the random word, times 2^`shift`, to a float32's pattern, by a dot product with a unit vector."""
    text = f"dp2a.lo.u32.u32 $0, $1, {1 << 8 * half + shift}, $2;"
    return Float32(pure(T.f32(), [random, word], text, "=f,r,f", loc, ip))


@dsl_user_op
def _cut(value: Float32, bits: int, *, loc: Any = None, ip: Any = None) -> Float32:
    """Clear the low `bits` of a float32's pattern."""
    return Float32(pure(T.f32(), [value], f"and.b32 $0, $1, {0xFFFFFFFF << bits & 0xFFFFFFFF:#x};", "=f,f", loc, ip))


@dsl_user_op
def _multiply_rz(value: Float32, factor: float, *, loc: Any = None, ip: Any = None) -> Float32:
    """Multiply by a constant, rounding towards zero."""
    return Float32(pure(T.f32(), [value], f"mul.rz.f32 $0, $1, {_hex(factor)};", "=f,f", loc, ip))


@dsl_user_op
def _high_halves(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return the high halves of two patterns as one word."""
    return Int32(pure(T.i32(), [low, high], "prmt.b32 $0, $1, $2, 0x7632;", "=r,f,f", loc, ip))


@dsl_user_op
def _with_nans(
    word: Int32, low: Float32, high: Float32, dtype: type[Numeric], *, loc: Any = None, ip: Any = None
) -> Int32:
    """Return `word` with NaN restored: adding random bits to a NaN's pattern may wrap around to a zero.

    Computes ``0 * value + word``, with the value rounded to the finite range.
    """
    name = _PTX[dtype]
    finite = pure(T.i32(), [high, low], f"cvt.rn.satfinite.{name}x2.f32 $0, $1, $2;", "=r,f,f", loc, ip)
    zero = Int32(0).ir_value(loc=loc, ip=ip)
    return Int32(pure(T.i32(), [finite, zero, word], f"fma.rn.{name}x2 $0, $1, $2, $3;", "=r,r,r,r", loc, ip))


class _Rebiased(NamedTuple):
    """A float32, divided by two to the power of the difference of the exponent biases.

    So subnormal results of the narrow type are subnormal float32, and the discarded part begins at the same bit of all
    patterns.

    Attributes
    ----------
    rounded : Float32
        Rounded stochastically to a value of the narrow type; a NaN may have wrapped around to a zero.
    exact : Float32
        Not rounded.
    """

    rounded: Float32
    exact: Float32


def _rebiased(value: Float32, random: Int32, half: int, dtype: type[Numeric]) -> _Rebiased:
    """Round a float32 stochastically to a type with fewer exponent bits, by one half of a random word."""
    rebias, cut, shift = (112, 13, 0) if dtype is Float16 else (120, 20, 4)
    scaled = _multiply_rz(value, 2.0**-rebias)
    return _Rebiased(_cut(_add_half(scaled, random, half, shift), cut), scaled)


def pack_stochastic(
    values: list[Float32], words: Sequence[Int32], dtype: type[Numeric], arch: Arch, saturate: bool = False
) -> list[Int32]:
    """Round `values` stochastically to bfloat16 or float16, with one random word for each two values.

    With an odd number of values, the upper half of the last word is unspecified.  float16 saturates if `saturate` is
    set.  Uses ``cvt.rs`` where the architecture has it: PTX specifies which random bits round which element, and that
    as many of the discarded bits take part; that subnormal results discard more is taken from published models of the
    instruction.
    """
    packed = []
    values = _padded(values, 2)
    for random, low, high in zip(words, values[::2], values[1::2]):
        if arch.cvt_rs:
            packed.append(_pack_pair_rs(low, high, random, dtype, saturate))
            continue
        if dtype is BFloat16:
            word = _high_halves(_add_half(low, random, 0, 0), _add_half(high, random, 1, 0))
            word = _with_nans(word, low, high, dtype)
        else:
            used = random & 0x1FFF1FFF
            grid = [_rebiased(low, used, 0, dtype), _rebiased(high, used, 1, dtype)]
            # the exact value is below the precision of the result, and restores NaN
            low, high = (cute.math.fma(pair.rounded, Float32(2.0**112), pair.exact) for pair in grid)
            word = _pack_pair(low, high, dtype, saturate)
        packed.append(word)
    return packed


# --------------------------------------------------------------------------------------------------------- quantisation
@dsl_user_op
def _absolute(value: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    return Float32(pure(T.f32(), [value], "abs.f32 $0, $1;", "=f,f", loc, ip))


@dsl_user_op
def _largest(*values: Float32, loc: Any = None, ip: Any = None) -> Float32:
    """Return the largest of two floats, or of three on sm_100 and later; NaN if any is NaN."""
    operands = ", ".join(f"${i}" for i in range(len(values) + 1))
    constraints = "=f" + ",f" * len(values)
    return Float32(pure(T.f32(), list(values), f"max.NaN.f32 {operands};", constraints, loc, ip))


def max_abs(values: Sequence[Float32], arch: Arch, start: Optional[Float32] = None) -> Float32:
    """Return the largest magnitude of `values` and of `start` (not negative); NaN if any is NaN.

    ``abs`` is a modifier of the maximum's operands, and costs nothing.
    """
    values = [_absolute(value) for value in values]
    largest = values.pop(0) if start is None else start
    step = 2 if arch.capability >= (10, 0) else 1  # operands of one instruction
    for first in range(0, len(values), step):
        largest = _largest(largest, *values[first : first + step])
    return largest


@dsl_user_op
def _reciprocal(value: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    return Float32(pure(T.f32(), [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


class RowScale(NamedTuple):
    """Scale of a quantised row, and the factor that encodes its elements: the reciprocal of the scale."""

    scale: Float32
    encode: Float32


def row_scale(largest: Float32, dtype: type[Numeric]) -> RowScale:
    """Return the scale of a row whose largest magnitude is `largest`: `reference.rounding.row_scale`.

    The reciprocal is correctly rounded: one Newton step is what the compiler emits for ``rcp.rn`` of normal arguments
    with normal results, and the scale and its reciprocal are always normal.  Any guess within the documented error of
    rcp will do, but for a mantissa of ones alone, where the lower of the two would give a reciprocal of 2^-k.
    """
    floor = Float32(SMALLEST_SCALE)
    scale = _largest(largest * Float32(SCALE_FACTORS[dtype]), floor)
    guess = _reciprocal(scale)
    error = cute.math.fma(-scale, guess, Float32(1.0))
    encode = cute.math.fma(guess, error, guess)
    # if the row has an infinite element, 1 / scale is NaN, and so is the whole row
    return RowScale(cute.math.fma(encode, Float32(0.0), scale), encode)


@dsl_user_op
def _permute(a: Int32, b: Int32, selector: int, *, loc: Any = None, ip: Any = None) -> Int32:
    return Int32(pure(T.i32(), [a, b], f"prmt.b32 $0, $1, $2, {selector:#06x};", "=r,r,r", loc, ip))


@dsl_user_op
def _round_integer(value: Float32, encode: Float32, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return ``value * encode``, rounded once to the nearest integer, in the low bits."""
    text = f"fma.rn.f32 $0, $1, $2, {_hex(_MAGIC)};"
    return Int32(pure(T.i32(), [value, encode], text, "=r,f,f", loc, ip))


@dsl_user_op
def _floor_integer(
    value: Float32, encode: Float32, random: Int32, half: int, *, loc: Any = None, ip: Any = None
) -> Int32:
    """Return ``floor(value * encode + r / 65536)`` in the low bits; r is one half of the random word.

    The pattern 0x4300 above r is the float 128 + r / 65536.  Rounding down twice equals rounding down once.
    """
    text = (
        f"{{ .reg .b32 r, x; prmt.b32 r, $3, 0x43000000, {0x7632 if half else 0x7610:#06x};"
        f" fma.rm.f32 x, $1, $2, r; add.rm.f32 $0, x, {_hex(_MAGIC - 128)}; }}"
    )
    return Int32(pure(T.i32(), [value, encode, random], text, "=r,f,f,r", loc, ip))


@dsl_user_op
def _pack_float8(values: Sequence[Float32], *, loc: Any = None, ip: Any = None) -> Int32:
    """Round four floats to nearest even, saturating, and return them as one word of float8_e4m3fn."""
    text = (
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
        " mov.b32 $0, {a, b}; }"
    )
    return Int32(pure(T.i32(), values, text, "=r,f,f,f,f", loc, ip))


def _pack_integers(integers: Sequence[Int32], dtype: type[Numeric]) -> list[Int32]:
    """Return words of the low bits of `integers`."""
    pairs = [_permute(a, b, 0x5410 if dtype is Int16 else 0x0040) for a, b in zip(integers[::2], integers[1::2])]
    return pairs if dtype is Int16 else [_permute(a, b, 0x5410) for a, b in zip(pairs[::2], pairs[1::2])]


def _padded(values: list[Any], multiple: int) -> list[Any]:
    """Repeat the last value up to a multiple of so many."""
    return values + values[-1:] * (-len(values) % multiple)


def pack_quantised(
    values: list[Float32], encode: Float32, dtype: type[Numeric], words: Optional[list[Int32]] = None
) -> list[Int32]:
    """Return words of ``values * encode`` in int16, int8 or float8_e4m3fn; elements beyond the values are unspecified.

    Parameters
    ----------
    values : list of Float32
    encode : Float32
        Factor of `row_scale`, so that no product exceeds the type.
    dtype : type
    words : list of Int32, optional
        One random word for each two values: round stochastically.
    """
    values = _padded(values, 32 // dtype.width)
    words = words and _padded(words, 16 // dtype.width)
    if dtype is Float8E4M3FN:
        scaled = [value * encode for value in values]
        if words is not None:
            zero = encode * Float32(-0.0)  # preserves the sign of zeros; NaN if the row is NaN
            grid = [_rebiased(value, words[i // 2], i % 2, dtype) for i, value in enumerate(scaled)]
            scaled = [cute.math.fma(pair.rounded, Float32(2.0**120), zero) for pair in grid]
        return [_pack_float8(scaled[i : i + 4]) for i in range(0, len(scaled), 4)]
    if words is None:
        return _pack_integers([_round_integer(value, encode) for value in values], dtype)
    return _pack_integers(
        [_floor_integer(value, encode, words[i // 2], i % 2) for i, value in enumerate(values)], dtype
    )


@dsl_user_op
def widen(bits: Numeric, dtype: type[Numeric], *, loc: Any = None, ip: Any = None) -> Float32:
    """Return one element, given as an integer register of its own width, as float32, exactly."""
    if dtype is Float32:
        return as_float(bits, loc=loc, ip=ip)
    if dtype is BFloat16:
        return Float32(pure(T.f32(), [bits], "mov.b32 $0, {0, $1};", "=f,h", loc, ip))
    if dtype is Float16:
        return Float32(pure(T.f32(), [bits], "cvt.f32.f16 $0, $1;", "=f,h", loc, ip))
    if dtype is Float8E4M3FN:
        text = "{ .reg .b16 l, h; .reg .b32 x; cvt.rn.f16x2.e4m3x2 x, $1; mov.b32 {l, h}, x; cvt.f32.f16 $0, l; }"
        return Float32(pure(T.f32(), [Int16(bits)], text, "=f,h", loc, ip))
    return _unpack_integers(Int32(bits), dtype)[0]


@dsl_user_op
def narrow(value: Float32, dtype: type[Numeric], saturate: bool = False, *, loc: Any = None, ip: Any = None) -> Numeric:
    """Round one float32 to nearest even, and return it as an integer register of the result's width; see `pack`."""
    if dtype is Float32:
        return as_word(value, loc=loc, ip=ip)
    return Int16(pure(T.i16(), [value], f"cvt.rn{_finite(saturate)}.{_PTX[dtype]}.f32 $0, $1;", "=h,f", loc, ip))

"""Every numeric cast of the package.

A *word* is a register as memory holds it, the first element in its lowest bits: an `Int32` of one float32, two 16-bit
or four 8-bit elements, or an `Int64` of four float16, which one instruction takes apart.

`cute_ssm.reference.rounding` states what the results are; everything here is bit-equal to it on every architecture.
Quantised elements are loaded as they are: what they mean is their product with the row's scale.
"""

import struct

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int8, Int16, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure, pure_floats

DTYPES = {
    "float32": Float32,
    "bfloat16": BFloat16,
    "float16": Float16,
    "float8_e4m3fn": Float8E4M3FN,
    "int8": cutlass.Int8,
    "int16": cutlass.Int16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}
# of the quantised types: (1 + 2^-22) / largest magnitude, rounded up
SCALE_FACTORS = {
    Int8: float.fromhex("0x1.02040e0000000p-7"),
    Int16: float.fromhex("0x1.0002060000000p-15"),
    Float8E4M3FN: float.fromhex("0x1.24924e0000000p-9"),
}
SMALLEST_SCALE = 2.0**-126
_PTX = {BFloat16: "bf16", Float16: "f16"}
# 1.5 * 2^23: added to an integer below 2^22 in magnitude, it leaves that integer in the low bits of a float32's pattern
_MAGIC = 12582912


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
def _pack_pair(low, high, dtype, saturate=False, *, loc=None, ip=None):
    name = f"cvt.rn{_finite(saturate)}.{_PTX[dtype]}x2.f32"
    return Int32(pure(T.i32(), [high, low], f"{name} $0, $1, $2;", "=r,f,f", loc, ip))


def _finite(saturate):
    """The modifier that makes the largest finite number of what would be infinite; NaN stays NaN."""
    return ".satfinite" if saturate else ""


@dsl_user_op
def _unpack_integers(word, dtype, *, loc=None, ip=None):
    """Each element is added to the pattern of the magic number by a dot product with a unit vector."""
    count = 32 // dtype.width
    name = "dp2a.lo" if count == 2 else "dp4a"
    values = []
    for i in range(count):
        text = f"{name}.s32.s32 $0, $1, {1 << 8 * i}, {_hex_word(_MAGIC)};"
        values.append(Float32(pure(T.f32(), [word], text, "=f,r", loc, ip)) - float(_MAGIC))
    return values


@dsl_user_op
def _unpack_float8(word, *, loc=None, ip=None):
    text = (
        "{ .reg .b16 a, b, h0, h1, h2, h3; .reg .b32 x, y; mov.b32 {a, b}, $4; cvt.rn.f16x2.e4m3x2 x, a;"
        " cvt.rn.f16x2.e4m3x2 y, b; mov.b32 {h0, h1}, x; mov.b32 {h2, h3}, y;"
        " cvt.f32.f16 $0, h0; cvt.f32.f16 $1, h1; cvt.f32.f16 $2, h2; cvt.f32.f16 $3, h3; }"
    )
    return [Float32(value) for value in pure_floats(4, [word], text, "r", loc, ip)]


def _hex(value):
    """A float32 as PTX spells it."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _hex_word(value):
    """The bits of a float32, as PTX spells an integer."""
    return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def word_bits(dtype, access_bytes):
    """Width of the words in which `unpack` takes loads of `access_bytes`."""
    return 64 if dtype is Float16 and access_bytes >= 8 else 32


_UNPACK = {
    BFloat16: _unpack_bfloat16,
    Float16: _unpack_float16,
    Float8E4M3FN: _unpack_float8,
    Int8: lambda word: _unpack_integers(word, Int8),
    Int16: lambda word: _unpack_integers(word, Int16),
}


def unpack(words, dtype):
    """All elements of `words`, exactly, as a list of float32."""
    if dtype is Float32:
        return [as_float(word) for word in words]
    return [value for word in words for value in _UNPACK[dtype](word)]


def pack(values, dtype, saturate=False):
    """Words of `values` rounded to nearest even; 16-bit types may saturate instead of becoming infinite."""
    if dtype is Float32:
        return [as_word(value) for value in values]
    return [_pack_pair(values[i], values[i + 1], dtype, saturate) for i in range(0, len(values), 2)]


# ------------------------------------------------------------------------------------------------- stochastic rounding
@dsl_user_op
def _pack_pair_rs(low, high, random, dtype, saturate, *, loc=None, ip=None):
    """Of the random word, the low half rounds the low element: the hardware's own order."""
    text = f"cvt.rs{_finite(saturate)}.{_PTX[dtype]}x2.f32 $0, $1, $2, $3;"
    return Int32(pure(T.i32(), [high, low, random], text, "=r,f,f,r", loc, ip))


@dsl_user_op
def _add_half(word, random, half, shift, *, loc=None, ip=None):
    """Add one half of the random word, times 2^`shift`, to a float32's pattern, by a dot product with a unit vector."""
    text = f"dp2a.lo.u32.u32 $0, $1, {1 << 8 * half + shift}, $2;"
    return Float32(pure(T.f32(), [random, word], text, "=f,r,f", loc, ip))


@dsl_user_op
def _cut(value, bits, *, loc=None, ip=None):
    """Clear the low `bits` of a float32's pattern."""
    return Float32(pure(T.f32(), [value], f"and.b32 $0, $1, {0xFFFFFFFF << bits & 0xFFFFFFFF:#x};", "=f,f", loc, ip))


@dsl_user_op
def _multiply_rz(value, factor, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [value], f"mul.rz.f32 $0, $1, {_hex(factor)};", "=f,f", loc, ip))


@dsl_user_op
def _high_halves(low, high, *, loc=None, ip=None):
    return Int32(pure(T.i32(), [low, high], "prmt.b32 $0, $1, $2, 0x7632;", "=r,f,f", loc, ip))


@dsl_user_op
def _with_nans(word, low, high, dtype, *, loc=None, ip=None):
    """`word`, with NaN where `low` or `high` are: adding random bits to a NaN's pattern may wrap around to a zero.

    0 * value + word, with the value rounded to the finite range.
    """
    name = _PTX[dtype]
    finite = pure(T.i32(), [high, low], f"cvt.rn.satfinite.{name}x2.f32 $0, $1, $2;", "=r,f,f", loc, ip)
    zero = Int32(0).ir_value(loc=loc, ip=ip)
    return Int32(pure(T.i32(), [finite, zero, word], f"fma.rn.{name}x2 $0, $1, $2, $3;", "=r,r,r,r", loc, ip))


def _rebiased(value, random, half, dtype):
    """A float32 rounded stochastically to a type with fewer bits of exponent: (on the grid of that type, as it was).

    Both are scaled down by the difference of the exponent biases: subnormal results are subnormal float32, and the cut
    part begins at the same bit of all patterns.  On the grid, a NaN may have wrapped around to a zero.
    """
    rebias, cut, shift = (112, 13, 0) if dtype is Float16 else (120, 20, 4)
    scaled = _multiply_rz(value, 2.0**-rebias)
    return _cut(_add_half(scaled, random, half, shift), cut), scaled


def pack_stochastic(values, words, dtype, arch, saturate=False):
    """Words of `values` in bfloat16 or float16, rounded stochastically with one random word for each two values.

    Of an odd number of values, the last word's upper half is anything.  float16 may saturate.
    By ``cvt.rs`` where the architecture has it: PTX states which random bits go where, and that as many of the
    discarded bits take part; that subnormal results discard more is taken from published models of the instruction.
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
            # what is added is less than any place of the result, but NaN where the value is
            low, high = (cute.math.fma(value, Float32(2.0**112), was) for value, was in grid)
            word = _pack_pair(low, high, dtype, saturate)
        packed.append(word)
    return packed


# --------------------------------------------------------------------------------------------------------- quantisation
@dsl_user_op
def _absolute(value, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [value], "abs.f32 $0, $1;", "=f,f", loc, ip))


@dsl_user_op
def _largest(*values, loc=None, ip=None):
    """The largest of two floats, or of three on sm_100 and later; NaN if any is."""
    operands = ", ".join(f"${i}" for i in range(len(values) + 1))
    constraints = "=f" + ",f" * len(values)
    return Float32(pure(T.f32(), list(values), f"max.NaN.f32 {operands};", constraints, loc, ip))


def max_abs(values, arch, start=None):
    """The largest magnitude of `values` and of `start` (not negative), NaN if any is; `abs` is free in hardware."""
    values = [_absolute(value) for value in values]
    largest = values.pop(0) if start is None else start
    step = 2 if arch.capability >= (10, 0) else 1  # operands of one instruction
    for first in range(0, len(values), step):
        largest = _largest(largest, *values[first : first + step])
    return largest


@dsl_user_op
def _reciprocal(value, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


def row_scale(largest, dtype):
    """(scale, factor that encodes) of a row whose largest magnitude is `largest`: `reference.rounding.row_scale`.

    The reciprocal is exactly rounded: one step of Newton's iteration is what the compiler itself makes of
    ``rcp.rn`` for normal arguments with normal results, and the scale is always such a one.
    """
    floor = Float32(SMALLEST_SCALE)
    scale = _largest(largest * Float32(SCALE_FACTORS[dtype]), floor)
    guess = _reciprocal(scale)
    error = cute.math.fma(-scale, guess, Float32(1.0))
    encode = cute.math.fma(guess, error, guess)
    return cute.math.fma(encode, Float32(0.0), scale), encode  # of an infinite row, 1 / scale is NaN and makes it NaN


@dsl_user_op
def _permute(a, b, selector, *, loc=None, ip=None):
    return Int32(pure(T.i32(), [a, b], f"prmt.b32 $0, $1, $2, {selector:#06x};", "=r,r,r", loc, ip))


@dsl_user_op
def _round_integer(value, encode, *, loc=None, ip=None):
    """value * encode, rounded once, to the nearest integer: in the low bits."""
    text = f"fma.rn.f32 $0, $1, $2, {_hex(_MAGIC)};"
    return Int32(pure(T.i32(), [value, encode], text, "=r,f,f", loc, ip))


@dsl_user_op
def _floor_integer(value, encode, random, half, *, loc=None, ip=None):
    """floor(value * encode + r / 65536) in the low bits; r is a half of the random word.

    The pattern 0x4300 above r is the float 128 + r / 65536.  Rounding down twice is rounding down once.
    """
    text = (
        f"{{ .reg .b32 r, x; prmt.b32 r, $3, 0x43000000, {0x7632 if half else 0x7610:#06x};"
        f" fma.rm.f32 x, $1, $2, r; add.rm.f32 $0, x, {_hex(_MAGIC - 128)}; }}"
    )
    return Int32(pure(T.i32(), [value, encode, random], text, "=r,f,f,r", loc, ip))


@dsl_user_op
def _pack_float8(values, *, loc=None, ip=None):
    """Four floats as one word of float8_e4m3fn, to nearest even, saturating."""
    text = (
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;"
        " mov.b32 $0, {a, b}; }"
    )
    return Int32(pure(T.i32(), values, text, "=r,f,f,f,f", loc, ip))


def _pack_integers(integers, dtype):
    """Words of the low bits of `integers`."""
    pairs = [_permute(a, b, 0x5410 if dtype is Int16 else 0x0040) for a, b in zip(integers[::2], integers[1::2])]
    return pairs if dtype is Int16 else [_permute(a, b, 0x5410) for a, b in zip(pairs[::2], pairs[1::2])]


def _padded(values, multiple):
    return values + values[-1:] * (-len(values) % multiple)


def pack_quantised(values, encode, dtype, words=None):
    """Words of ``values * encode`` in int16, int8 or float8_e4m3fn; what the values do not fill is anything.

    Parameters
    ----------
    values : list of Float32
    encode : Float32
        By `row_scale`; then no product exceeds the type.
    dtype : type
    words : list of Int32, optional
        One random word for each two values: round stochastically.
    """
    values = _padded(values, 32 // dtype.width)
    words = words and _padded(words, 16 // dtype.width)
    if dtype is Float8E4M3FN:
        scaled = [value * encode for value in values]
        if words is not None:
            zero = encode * Float32(-0.0)  # keeps the sign of zeros, and is NaN where the row is
            grid = [_rebiased(value, words[i // 2], i % 2, dtype) for i, value in enumerate(scaled)]
            scaled = [cute.math.fma(value, Float32(2.0**120), zero) for value, _ in grid]
        return [_pack_float8(scaled[i : i + 4]) for i in range(0, len(scaled), 4)]
    if words is None:
        return _pack_integers([_round_integer(value, encode) for value in values], dtype)
    return _pack_integers(
        [_floor_integer(value, encode, words[i // 2], i % 2) for i, value in enumerate(values)], dtype
    )


@dsl_user_op
def widen(bits, dtype, *, loc=None, ip=None):
    """One element, given as an integer register of its own width, exactly as float32."""
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
def narrow(value, dtype, saturate=False, *, loc=None, ip=None):
    """One float32 rounded to nearest even, as an integer register of the result's width; see `pack`."""
    if dtype is Float32:
        return as_word(value, loc=loc, ip=ip)
    return Int16(pure(T.i16(), [value], f"cvt.rn{_finite(saturate)}.{_PTX[dtype]}.f32 $0, $1;", "=h,f", loc, ip))

"""Scalar functions of the recurrences, and reductions over lanes, in float32.

`softplus` and `silu` are accurate to a few units in the last place.  `fast_softplus` and `fast_silu` take fewer
instructions, and their relative error grows with the magnitude of the argument: use them where results enter products
whose rounding error is larger.

Errors are relative and in units of 2^-23.  They are those of rounding, and besides what the documents of the hardware
allow its instructions: 2 units for ex2, and 1 for rcp with its rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Numeric
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure
from cute_ssm.device.convert import as_float, as_word

# log2(e) as the sum of two floats: rounding x log2(e) to one float costs |x| units in the last place of e^x
LOG2E = 1.44269502162933349609375
_LOG2E_LOW = 1.92596299112661746e-8
_LN2 = 0.6931471805599453
# log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: artanh(s) / s in powers of s^2, to a relative 2e-8
_ARTANH = tuple(1.0 / (2 * k + 1) for k in range(7))
# log(1 + e) / e on [0, 1], 1 at 0, in powers of e, to a relative 4e-8
_LOG1P = (
    1.0, -0.49999648332595825, 0.3332132399082184, -0.24857163429260254, 0.19153651595115662, -0.13753795623779297,
    0.07920445501804352, -0.030065739527344704, 0.005364810582250357,
)  # fmt: skip


@dsl_user_op
def _approx(name: str, x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return the hardware's approximation of a function."""
    return Float32(pure(T.f32(), [x], f"{name}.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


def power_of_two(x: Float32) -> Float32:
    """Return 2^x to an error of 1/2 and that of ex2; below 2^-126 zero."""
    return _approx("ex2", x)


def decay(x: Float32) -> Float32:
    """Return e^x to an error of 1 and that of ex2; above 88 the result is NaN."""
    x = larger(x, Float32(-128.0))  # e^-128 is zero here, and the excess of an infinite product would be NaN
    product = x * LOG2E
    excess = cute.math.fma(x, Float32(-LOG2E), product)  # how far the rounded product is too large
    excess = cute.math.fma(x, Float32(-_LOG2E_LOW), excess)
    power = _approx("ex2", product)
    return cute.math.fma(power * excess, Float32(-_LN2), power)


def reciprocal(x: Float32) -> Float32:
    """Return 1 / x to an error of 1."""
    return _approx("rcp", x)


def softplus(x: Float32) -> Float32:
    """Return log(1 + e^x) to an error of 2 and those of ex2 and rcp, also where it is small; above 20 it is x."""
    e = decay(-cute.math.absf(x))
    s = e * _approx("rcp", e + 2.0)
    square = s * s
    series = Float32(_ARTANH[-1])
    for coefficient in _ARTANH[-2::-1]:
        series = cute.math.fma(series, square, Float32(coefficient))
    return cute.math.fma(s + s, series, cute.arch.fmax(x, Float32(0.0)))


def fast_softplus(x: Float32) -> Float32:
    """Return log(1 + e^x) to an error of 2 + 5/8 |x| and that of ex2, in two thirds of the instructions."""
    e = power_of_two(cute.math.absf(x) * -LOG2E)
    series = Float32(_LOG1P[-1])
    for coefficient in _LOG1P[-2::-1]:
        series = cute.math.fma(series, e, Float32(coefficient))
    return cute.math.fma(e, series, cute.arch.fmax(x, Float32(0.0)))


@cute.jit
def silu(x: Float32) -> Float32:
    """Return x / (1 + e^-x) to an error of 2 and those of ex2 and rcp."""
    e = decay(-cute.math.absf(x))  # never overflows
    inverse = _approx("rcp", e + 1.0)
    return x * (inverse if x >= 0.0 else e * inverse)


def fast_silu(x: Float32) -> Float32:
    """Return x / (1 + e^-x) to an error of 2 + 5/8 |x| and those of ex2 and rcp, in half of the instructions."""
    return x * reciprocal(power_of_two(x * -LOG2E) + 1.0)


@dsl_user_op
def _add_below(x: Float32, distance: int, *, loc: Any = None, ip: Any = None) -> Float32:
    """Add the value `distance` lanes below in the same half of the warp, if there is such a lane."""
    text = f"{{ .reg .pred p; shfl.sync.up.b32 $0|p, $1, {distance}, 0x1000, 0xffffffff; @p add.f32 $0, $0, $1; }}"
    # without a lane below, a shuffle returns the lane's own value
    return Float32(pure(T.f32(), [x], text, "=&f,f", loc, ip))


def running_sum(x: Float32) -> Float32:
    """Return inclusive sums over each half of a warp, from its first lane."""
    for i in range(4):
        x = _add_below(x, 1 << i)
    return x


@dsl_user_op
def _add_above(x: Float32, distance: int, *, loc: Any = None, ip: Any = None) -> Float32:
    """Add the value `distance` lanes above in the same half of the warp, if there is such a lane."""
    text = f"{{ .reg .pred p; shfl.sync.down.b32 $0|p, $1, {distance}, 0x101f, 0xffffffff; @p add.f32 $0, $0, $1; }}"
    return Float32(pure(T.f32(), [x], text, "=&f,f", loc, ip))


def remaining_sum(x: Float32) -> Float32:
    """Return inclusive sums over each half of a warp, from its last lane."""
    for i in range(4):
        x = _add_above(x, 1 << i)
    return x


def exchanged(value: Numeric, distance: int) -> Numeric:
    """Return the value of the lane whose number is this lane's, exclusive or `distance`."""
    return value if distance == 0 else cute.arch.shuffle_sync_bfly(value, distance)


def _reduce_exchanged(values: Sequence[Float32], lanes: int, combine: Callable[[Float32, Float32], Float32]) -> Float32:
    offset = 1
    while len(values) > 1:
        values = [combine(mine, exchanged(other, offset)) for mine, other in zip(values[::2], values[1::2])]
        offset *= 2
    total = values[0]
    while offset < lanes:
        total = combine(total, exchanged(total, offset))
        offset *= 2
    return total


def sum_exchanged(values: Sequence[Float32], lanes: int) -> Float32:
    """Return one sum per lane over segments of `lanes` lanes, with about one exchange per sum.

    `values` lists n <= `lanes` floats (both powers of two); in lane j of a segment, values[s] belongs to sum ``s ^ (j
    % n)``.  Lane j returns sum ``j % n``.  This order lets every lane add to its even entries and send its odd ones.
    The order of additions depends on `lanes` alone.
    """
    return _reduce_exchanged(values, lanes, lambda a, b: a + b)


def max_exchanged(values: Sequence[Float32], lanes: int) -> Float32:
    """Return maxima instead of the sums of `sum_exchanged`; NaN if any value is."""
    return _reduce_exchanged(values, lanes, larger)


@dsl_user_op
def larger(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return the larger of two floats, NaN if one is."""
    return Float32(pure(T.f32(), [a, b], "max.NaN.f32 $0, $1, $2;", "=f,f,f", loc, ip))


@dsl_user_op
def smaller(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """Return the smaller of two floats, NaN if one is."""
    return Float32(pure(T.f32(), [a, b], "min.NaN.f32 $0, $1, $2;", "=f,f,f", loc, ip))


def any_nan(values: Sequence[Float32]) -> Boolean:
    """Return whether one of the floats of any lane of the warp is NaN.

    May also return true where products of the floats overflow, never false if one is NaN.
    """
    total = values[0]
    for i in range(1, len(values), 2):  # a fused multiply-add propagates NaN of two more values
        total = cute.math.fma(total, *values[i : i + 2]) if i + 1 < len(values) else total * values[i]
    return cute.arch.vote_any_sync(total != total)


def from_lane(value: Numeric, lane: Int32) -> Numeric:
    """Return the value of the lane `lane`, which may differ from lane to lane."""
    return cute.arch.shuffle_sync(value, lane)


_LN2_HIGH = 0.693145751953125  # 15 bits: its products with exponents are exact
_LN2_LOW = 1.42860682030941723e-6
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, in the low bits of the sum
_SMALLEST_EXPONENT = -88.0  # e^x is zero for this x and below
_LARGEST_EXPONENT = 88.37  # e^x is 2^127 at most, times a number in [0.7, 1.42]


def exponential(x: Float32, low: Optional[Float32] = None) -> Float32:
    """Return e^(x + low), correctly rounded but for about 2^-26; zero below -88, not finite above 88.376.

    Use it where `decay`, whose instruction errs by two units in the last place, would be the largest error.
    """
    x = larger(x, Float32(_SMALLEST_EXPONENT))
    shifted = cute.math.fma(x, Float32(LOG2E), Float32(_ROUNDER))
    n = shifted - _ROUNDER
    r = cute.math.fma(n, Float32(-_LN2_HIGH), x)
    r = cute.math.fma(n, Float32(-_LN2_LOW), r)
    if low is not None:
        r += low
    series = Float32(1.0 / 5040)
    for factorial in (720, 120, 24, 6, 2):
        series = cute.math.fma(series, r, Float32(1.0 / factorial))
    value = 1.0 + cute.math.fma(series, r * r, r)
    return value * as_float(as_word(shifted) * (1 << 23) + (127 << 23))


def _refined_reciprocal(x: Float32) -> Float32:
    """Return 1 / x after one step of Newton's method."""
    guess = _approx("rcp", x)
    return cute.math.fma(guess, cute.math.fma(-x, guess, Float32(1.0)), guess)


@cute.jit
def sigmoid(x: Float32) -> Float32:
    """Return 1 / (1 + e^-x) to about one unit in the last place."""
    e = exponential(-cute.math.absf(x))  # never overflows
    inverse = _refined_reciprocal(e + 1.0)
    return inverse if x >= 0.0 else e * inverse


@cute.jit
def gate_exponent(A_log: Float32, x: Float32) -> tuple[Float32, Float32]:
    """Return (p, low): p = e^A_log softplus(x) rounded, at most 1e4, and p minus the exact product."""
    e = exponential(-cute.math.absf(x))
    s = e * _refined_reciprocal(e + 2.0)
    square = s * s
    series = Float32(_ARTANH[-1])
    for coefficient in _ARTANH[-2::-1]:
        series = cute.math.fma(series, square, Float32(coefficient))
    step = cute.math.fma(s + s, series, cute.arch.fmax(x, Float32(0.0)))
    rate = exponential(smaller(A_log, Float32(_LARGEST_EXPONENT)))
    product = smaller(rate * step, Float32(1e4))
    low = cute.math.fma(-rate, step, product) if product < 1e4 else Float32(0.0)
    return product, low


def gate_decay(A_log: Float32, x: Float32) -> Float32:
    """Return e^(-e^A_log softplus(x)), zero where the exponent overflows.

    The error is about that of the largest rounding in it.
    """
    product, low = gate_exponent(A_log, x)
    return exponential(-product, low)


def rsqrt(x: Float32) -> Float32:
    """Return 1 / sqrt(x) of a positive normal x, correctly rounded but for about 2^-26."""
    guess = _approx("rsqrt", x)
    product = x * guess
    error = cute.math.fma(-product, guess, Float32(1.0))
    error = cute.math.fma(-cute.math.fma(x, guess, -product), guess, error)
    return cute.math.fma(guess * 0.5, error, guess)

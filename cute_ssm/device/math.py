"""Scalar functions of the recurrences, and sums over lanes, in float32."""

import cutlass.cute as cute
from cutlass import Float32
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device.asm import pure
from cute_ssm.device.convert import as_float, as_word

# log2(e) as the sum of two floats; rounding x log2(e) to one float alone would cost |x| units in the last place of e^x
_LOG2E = 1.44269502162933349609375
_LOG2E_LOW = 1.92596299112661746e-8
_LN2 = 0.6931471805599453
# log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: artanh(s) / s in powers of s^2, to a relative 2e-8
_ARTANH = tuple(1.0 / (2 * k + 1) for k in range(7))


@dsl_user_op
def _approx(name, x, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [x], f"{name}.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


def decay(x):
    """e^x, to a relative error of about 2^-22, where it is finite: above 88 the result is NaN."""
    x = larger(x, Float32(-128.0))  # e^-128 is zero here, and the excess of an infinite product would be NaN
    product = x * _LOG2E
    excess = cute.math.fma(x, Float32(-_LOG2E), product)  # how far the rounded product is too large
    excess = cute.math.fma(x, Float32(-_LOG2E_LOW), excess)
    power = _approx("ex2", product)
    return cute.math.fma(power * excess, Float32(-_LN2), power)


def reciprocal(x):
    """1 / x, correct to one unit in the last place."""
    return _approx("rcp", x)


def softplus(x):
    """log(1 + e^x) to a relative error of about 2^-22, also where it is small; above 20 it is x itself in float32."""
    e = decay(-cute.math.absf(x))
    s = e * _approx("rcp", e + 2.0)
    square = s * s
    series = Float32(_ARTANH[-1])
    for coefficient in _ARTANH[-2::-1]:
        series = cute.math.fma(series, square, Float32(coefficient))
    return cute.math.fma(s + s, series, cute.arch.fmax(x, Float32(0.0)))


@cute.jit
def silu(x: Float32):
    """x / (1 + e^-x)."""
    e = decay(-cute.math.absf(x))  # never overflows
    inverse = _approx("rcp", e + 1.0)
    return x * (inverse if x >= 0.0 else e * inverse)


@dsl_user_op
def _add_below(x, distance, *, loc=None, ip=None):
    """x and the value `distance` lanes below it in the same half of the warp, if there is such a lane."""
    text = f"{{ .reg .pred p; shfl.sync.up.b32 $0|p, $1, {distance}, 0x1000, 0xffffffff; @p add.f32 $0, $0, $1; }}"
    # without a lane below, a shuffle gives back its own value
    return Float32(pure(T.f32(), [x], text, "=&f,f", loc, ip))


def running_sum(x):
    """Inclusive sums over each half of a warp."""
    for i in range(4):
        x = _add_below(x, 1 << i)
    return x


@dsl_user_op
def _add_above(x, distance, *, loc=None, ip=None):
    """x and the value `distance` lanes above it in the same half of the warp, if there is such a lane."""
    text = f"{{ .reg .pred p; shfl.sync.down.b32 $0|p, $1, {distance}, 0x101f, 0xffffffff; @p add.f32 $0, $0, $1; }}"
    return Float32(pure(T.f32(), [x], text, "=&f,f", loc, ip))


def remaining_sum(x):
    """Inclusive sums over each half of a warp, from its last lane on."""
    for i in range(4):
        x = _add_above(x, 1 << i)
    return x


def exchanged(value, distance):
    """The value of the lane whose number differs by an exclusive or with `distance`, a Python int."""
    return value if distance == 0 else cute.arch.shuffle_sync_bfly(value, distance)


def _reduce_exchanged(values, lanes, combine):
    offset = 1
    while len(values) > 1:
        values = [combine(keep, exchanged(give, offset)) for keep, give in zip(values[::2], values[1::2])]
        offset *= 2
    total = values[0]
    while offset < lanes:
        total = combine(total, exchanged(total, offset))
        offset *= 2
    return total


def sum_exchanged(values, lanes):
    """Sums over segments of `lanes` lanes, one sum per lane, at about one exchange a sum.

    `values` lists n <= `lanes` floats (both powers of two); in lane j of a segment, values[s] belongs to sum ``s ^ (j
    % n)``.  Lane j returns sum ``j % n``.  Because of that order a lane always keeps even entries and gives odd
    ones.  The order of additions depends on `lanes` alone.
    """
    return _reduce_exchanged(values, lanes, lambda a, b: a + b)


def max_exchanged(values, lanes):
    """Like `sum_exchanged`, the largest instead of the sum; NaN if any is."""
    return _reduce_exchanged(values, lanes, larger)


@dsl_user_op
def larger(a, b, *, loc=None, ip=None):
    """The larger of two floats, NaN if one is."""
    return Float32(pure(T.f32(), [a, b], "max.NaN.f32 $0, $1, $2;", "=f,f,f", loc, ip))


@dsl_user_op
def smaller(a, b, *, loc=None, ip=None):
    """The smaller of two floats, NaN if one is."""
    return Float32(pure(T.f32(), [a, b], "min.NaN.f32 $0, $1, $2;", "=f,f,f", loc, ip))


def any_nan(values):
    """Whether, in any lane of a warp, one of the floats is NaN; also, now and then, where their products overflow."""
    total = values[0]
    for i in range(1, len(values), 2):  # NaN stays NaN, and an operation takes two more
        total = cute.math.fma(total, *values[i : i + 2]) if i + 1 < len(values) else total * values[i]
    return cute.arch.vote_any_sync(total != total)


def from_lane(value, lane):
    """The value of the lane that each lane names."""
    return cute.arch.shuffle_sync(value, lane)


_LN2_HIGH = 0.693145751953125  # 15 bits: its products with exponents are exact
_LN2_LOW = 1.42860682030941723e-6
_ROUNDER = 12582912.0  # 1.5 * 2^23: a sum with it is rounded to an integer, which its low bits are
_SMALLEST_EXPONENT = -88.0  # and less: e^x is zero
_LARGEST_EXPONENT = 88.37  # whose e^x is a power of two, 2^127 at most, times a number of [0.7, 1.42]


def exponential(x, low=None):
    """e^(x + low) of x <= 88.37, correctly rounded but for about 2^-26; zero below -88, not finite above 88.376.

    For where `decay`, whose instruction errs by two units in the last place, would be the largest error.
    """
    x = larger(x, Float32(_SMALLEST_EXPONENT))
    shifted = cute.math.fma(x, Float32(_LOG2E), Float32(_ROUNDER))
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


def _reciprocal(x):
    guess = _approx("rcp", x)
    return cute.math.fma(guess, cute.math.fma(-x, guess, Float32(1.0)), guess)


@cute.jit
def sigmoid(x: Float32):
    """1 / (1 + e^-x), to about a unit in the last place."""
    e = exponential(-cute.math.absf(x))  # never overflows
    inverse = _reciprocal(e + 1.0)
    return inverse if x >= 0.0 else e * inverse


@cute.jit
def gate_exponent(A_log: Float32, x: Float32):
    """(p, low) with p = e^A_log softplus(x) rounded, at most 1e4, and low what the rounding added."""
    e = exponential(-cute.math.absf(x))
    s = e * _reciprocal(e + 2.0)
    square = s * s
    series = Float32(_ARTANH[-1])
    for coefficient in _ARTANH[-2::-1]:
        series = cute.math.fma(series, square, Float32(coefficient))
    step = cute.math.fma(s + s, series, cute.arch.fmax(x, Float32(0.0)))
    rate = exponential(smaller(A_log, Float32(_LARGEST_EXPONENT)))
    product = smaller(rate * step, Float32(1e4))
    low = cute.math.fma(-rate, step, product) if product < 1e4 else Float32(0.0)
    return product, low


def gate_decay(A_log, x):
    """e^(-e^A_log softplus(x)) to about the accuracy of its largest rounding; zero where the exponent overflows."""
    product, low = gate_exponent(A_log, x)
    return exponential(-product, low)


def rsqrt(x):
    """1 / sqrt(x) of a positive normal x, correctly rounded but for about 2^-26."""
    guess = _approx("rsqrt", x)
    product = x * guess
    error = cute.math.fma(-product, guess, Float32(1.0))
    error = cute.math.fma(-cute.math.fma(x, guess, -product), guess, error)
    return cute.math.fma(guess * 0.5, error, guess)

"""What a scan over tokens is composed of: powers, gates, sums of chains, and pieces of a row of tokens.

A *piece* is `count` neighbouring tokens of one row, held as 32-bit words like memory (`convert`), or, if it is a single
token, as a float32.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_ssm.device import convert, memory
from cute_ssm.device.asm import pure

LOG2E = 1.44269502162933349609375  # log2(e), rounded to float32
# log(1 + e) / e on [0, 1], 1 at 0, in powers of e, to a relative 4e-8
_LOG1P = (
    1.0, -0.49999648332595825, 0.3332132399082184, -0.24857163429260254, 0.19153651595115662, -0.13753795623779297,
    0.07920445501804352, -0.030065739527344704, 0.005364810582250357,
)  # fmt: skip


@dsl_user_op
def power_of_two(x, *, loc=None, ip=None):
    """2^x to a relative error of about 2^-22; below 2^-126 zero."""
    return Float32(pure(T.f32(), [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


@dsl_user_op
def _reciprocal(x, *, loc=None, ip=None):
    return Float32(pure(T.f32(), [x], "rcp.approx.ftz.f32 $0, $1;", "=f,f", loc, ip))


def softplus(x):
    """log(1 + e^x) to a relative error of about (4 + 5/4 |x|) 2^-24, by two thirds of `math.softplus`'s instructions.

    Next to the roundings of the products that follow, what `math.softplus` is more exact by does not show.
    """
    e = power_of_two(cute.math.absf(x) * -LOG2E)
    series = Float32(_LOG1P[-1])
    for coefficient in _LOG1P[-2::-1]:
        series = cute.math.fma(series, e, Float32(coefficient))
    return cute.math.fma(e, series, cute.arch.fmax(x, Float32(0.0)))


def silu(x):
    """x / (1 + e^-x) to a relative error of about (4 + 5/4 |x|) 2^-24, by half the instructions of `math.silu`."""
    return x * _reciprocal(power_of_two(x * -LOG2E) + 1.0)


def sum_chains(chains):
    """Sum of a power of two of floats, halves first: entries i and i + n / 2 meet."""
    while len(chains) > 1:
        half = len(chains) // 2
        chains = [low + high for low, high in zip(chains[:half], chains[half:])]
    return chains[0]


def scatter_sums(values, lane, lanes):
    """Sum over the lanes of an aligned segment of `lanes`; lane j keeps its share of the list, from j n / lanes on.

    The order of additions is that of `sum_chains`: lanes j and j + lanes / 2 meet first.
    """
    distance = lanes // 2
    while distance:
        half = len(values) // 2
        upper = (lane & distance) != 0
        keep = [cutlass.select_(upper, high, low) for low, high in zip(values[:half], values[half:])]
        give = [cutlass.select_(upper, low, high) for low, high in zip(values[:half], values[half:])]
        values = [mine + cute.arch.shuffle_sync_bfly(other, distance) for mine, other in zip(keep, give)]
        distance //= 2
    return values


def piece_words(dtype, count):
    """How many words a piece has."""
    return max(1, count * dtype.width // 32)


def unpack_piece(words, dtype, count):
    """A piece as float32 values."""
    return [convert.as_float(words[0])] if count == 1 else convert.unpack(words, dtype)


def pack_piece(values, dtype):
    """Float32 values that `dtype` holds exactly as a piece."""
    return [convert.as_word(values[0])] if len(values) == 1 else convert.pack(values, dtype)


@cute.jit
def load_pieces(
    rows,
    token,
    begin,
    stop,
    whole: Boolean,
    valid: Boolean,
    count: cutlass.Constexpr,
    aligned: cutlass.Constexpr,
    outside: cutlass.Constexpr = 0.0,
):
    """`count` tokens of each row from `token` on, one piece after another; all zero unless `valid`.

    `whole` says that all of them are in [begin, stop); then, if `aligned`, accesses are as wide as can be.  Instead of
    tokens outside stands 0, and in the last row `outside`.
    """
    dtype = rows[0].dtype
    if const_expr(aligned and count * dtype.width >= 32):
        words = [Int32(0)] * (len(rows) * piece_words(dtype, count))
        if whole and valid:
            words = _load_whole(rows, token, piece_words(dtype, count))
        else:
            words = _load_inside(rows, token, begin, stop, valid, count, outside)
    else:
        words = _load_inside(rows, token, begin, stop, valid, count, outside)
    return words


def _load_whole(rows, token, count):
    """`count` words of each row from `token` on, by accesses of up to 16 bytes."""
    words = []
    for row in rows:
        pointer = row + token
        for first in range(0, count, 4):
            words += memory.load_words(pointer + first * 32 // row.dtype.width, min(4, count))
    return words


@cute.jit
def _load_inside(rows, token, begin, stop, valid, count: cutlass.Constexpr, outside: cutlass.Constexpr):
    words = [Int32(0)] * (len(rows) * piece_words(rows[0].dtype, count))
    if valid:
        for n in cutlass.range_constexpr(len(rows)):
            values = [Float32(0.0)] * count
            for i in cutlass.range_constexpr(count):
                value = Float32(outside if const_expr(n + 1 == len(rows)) else 0.0)
                if token + i >= begin and token + i < stop:
                    value = memory.load_scalar(rows[n] + (token + i), rows[n].dtype)
                values[i] = value
            size = piece_words(rows[n].dtype, count)
            words[n * size : (n + 1) * size] = pack_piece(values, rows[n].dtype)
    return words


@cute.jit
def store_pieces(rows, token, lists, begin, stop, whole: Boolean, valid: Boolean, aligned: cutlass.Constexpr):
    """Round and store a list of values in each row from `token` on, those inside [begin, stop); see `load_pieces`."""
    dtype = rows[0].dtype
    if const_expr(aligned and len(lists[0]) * dtype.width >= 32):
        if whole and valid:
            for n in cutlass.range_constexpr(len(rows)):
                memory.store(rows[n] + token, lists[n], dtype, min(16, len(lists[n]) * dtype.width // 8))
        else:
            _store_inside(rows, token, lists, begin, stop, valid)
    else:
        _store_inside(rows, token, lists, begin, stop, valid)


@cute.jit
def _store_inside(rows, token, lists, begin, stop, valid):
    if valid:
        for n in cutlass.range_constexpr(len(rows)):
            for i in cutlass.range_constexpr(len(lists[n])):
                if token + i >= begin and token + i < stop:
                    memory.store_scalar(rows[n] + (token + i), lists[n][i], rows[n].dtype)

"""Parts of a scan over tokens: sums of chains, and loads and stores of pieces of a row of tokens.

A *piece* is `count` neighbouring tokens of one row.  In registers it is a list of 32-bit words in the layout of memory
(`convert`), or one word with the bits of a float32 if it is a single token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Numeric, const_expr

from cute_ssm.device import convert, memory


class TokenRange(NamedTuple):
    """Tokens [begin, end) of a row."""

    begin: Int32
    end: Int32


def sum_chains(chains: list[Float32]) -> Float32:
    """Return the sum of a power of two of floats; in each step the entries i and i + n / 2 are added."""
    while len(chains) > 1:
        half = len(chains) // 2
        chains = [low + high for low, high in zip(chains[:half], chains[half:])]
    return chains[0]


def scatter_sums(values: list[Float32], lane: Int32, lanes: int) -> list[Float32]:
    """Sum a list over an aligned segment of `lanes` lanes; lane j returns its n / lanes sums, from entry j n / lanes.

    The order of additions is that of `sum_chains`: lanes j and j + lanes / 2 are added first.
    """
    distance = lanes // 2
    while distance:
        half = len(values) // 2
        upper = (lane & distance) != 0
        mine = [cutlass.select_(upper, high, low) for low, high in zip(values[:half], values[half:])]
        other = [cutlass.select_(upper, low, high) for low, high in zip(values[:half], values[half:])]
        values = [a + cute.arch.shuffle_sync_bfly(b, distance) for a, b in zip(mine, other)]
        distance //= 2
    return values


def piece_words(dtype: type[Numeric], count: int) -> int:
    """Return the number of words of a piece."""
    bits: int = count * dtype.width
    return max(1, bits // 32)


def unpack_piece(words: Sequence[Int32], dtype: type[Numeric], count: int) -> list[Float32]:
    """Return a piece as float32 values."""
    return [convert.as_float(words[0])] if count == 1 else convert.unpack(words, dtype)


def pack_piece(values: Sequence[Float32], dtype: type[Numeric]) -> list[Int32]:
    """Return float32 values, which `dtype` represents exactly, as a piece."""
    return [convert.as_word(values[0])] if len(values) == 1 else convert.pack(values, dtype)


@cute.jit
def load_pieces(
    rows: Sequence[cute.Pointer],
    token: Int32,
    tokens: TokenRange,
    whole: Boolean,
    active: Boolean,
    count: cutlass.Constexpr,
    aligned: cutlass.Constexpr,
    outside: cutlass.Constexpr = 0.0,
) -> list[Int32]:
    """Load `count` tokens of each row from `token` on, one piece after another; all zero unless `active`.

    `whole` says that all of them are in `tokens`; then accesses are as wide as possible, if rows are `aligned`.  Tokens
    outside of `tokens` are not read: they are `outside` in the last row, and 0 in the others.
    """
    dtype = rows[0].dtype
    if const_expr(aligned and count * dtype.width >= 32):
        words = [Int32(0)] * (len(rows) * piece_words(dtype, count))
        if whole and active:
            words = _load_whole(rows, token, piece_words(dtype, count))
        else:
            words = _load_inside(rows, token, tokens, active, count, outside)
    else:
        words = _load_inside(rows, token, tokens, active, count, outside)
    return words


def _load_whole(rows: Sequence[cute.Pointer], token: Int32, count: int) -> list[Int32]:
    """Load `count` words of each row from `token` on, by accesses of up to 16 bytes."""
    words = []
    for row in rows:
        pointer = row + token
        for first in range(0, count, 4):
            words += memory.load_words(pointer + first * 32 // row.dtype.width, min(4, count))
    return words


@cute.jit
def _load_inside(
    rows: Sequence[cute.Pointer],
    token: Int32,
    tokens: TokenRange,
    active: Boolean,
    count: cutlass.Constexpr,
    outside: cutlass.Constexpr,
) -> list[Int32]:
    words = [Int32(0)] * (len(rows) * piece_words(rows[0].dtype, count))
    if active:
        for n in cutlass.range_constexpr(len(rows)):
            values = [Float32(0.0)] * count
            for i in cutlass.range_constexpr(count):
                value = Float32(outside if const_expr(n + 1 == len(rows)) else 0.0)
                if token + i >= tokens.begin and token + i < tokens.end:
                    value = memory.load_scalar(rows[n] + (token + i), rows[n].dtype)
                values[i] = value
            size = piece_words(rows[n].dtype, count)
            words[n * size : (n + 1) * size] = pack_piece(values, rows[n].dtype)
    return words


@cute.jit
def store_pieces(
    rows: Sequence[cute.Pointer],
    token: Int32,
    values: Sequence[Sequence[Float32]],
    tokens: TokenRange,
    whole: Boolean,
    active: Boolean,
    aligned: cutlass.Constexpr,
) -> None:
    """Round and store a list of values in each row from `token` on, those inside `tokens`; see `load_pieces`."""
    dtype = rows[0].dtype
    if const_expr(aligned and len(values[0]) * dtype.width >= 32):
        if whole and active:
            for n in cutlass.range_constexpr(len(rows)):
                memory.store(rows[n] + token, values[n], dtype, min(16, len(values[n]) * dtype.width // 8))
        else:
            _store_inside(rows, token, values, tokens, active)
    else:
        _store_inside(rows, token, values, tokens, active)


@cute.jit
def _store_inside(
    rows: Sequence[cute.Pointer],
    token: Int32,
    values: Sequence[Sequence[Float32]],
    tokens: TokenRange,
    active: Boolean,
) -> None:
    if active:
        for n in cutlass.range_constexpr(len(rows)):
            for i in cutlass.range_constexpr(len(values[n])):
                if token + i >= tokens.begin and token + i < tokens.end:
                    memory.store_scalar(rows[n] + (token + i), values[n][i], rows[n].dtype)

"""Philox-4x32 random numbers, and which bits each element of a state takes.

The mapping from elements to bits is that of `cute_ssm.reference.rounding`.
"""

from typing import Any, NamedTuple

from cutlass import Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op, select_

from cute_ssm.device.asm import pure

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
COLUMNS = 8  # of a row, whose bits come from one call of the generator


class Product(NamedTuple):
    """The two words of a 64-bit product."""

    high: Uint32
    low: Uint32


class RoundKey(NamedTuple):
    """The two words of the key of one round."""

    low: Uint32
    high: Uint32


class RowCounter(NamedTuple):
    """The three words of the counter that all elements of a row share; the first word counts elements."""

    head: Int32
    slot_low: Int32
    slot_high_and_token: Int32


class RowRandom(NamedTuple):
    """What the random bits of the rows of a head are drawn from."""

    keys: list[RoundKey]
    counter: RowCounter


@dsl_user_op
def _xor3(a: Uint32, b: Uint32, c: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    return Uint32(pure(T.i32(), [a, b, c], "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", loc, ip))


@dsl_user_op
def _product(a: Uint32, multiplier: int, *, loc: Any = None, ip: Any = None) -> Product:
    """Return a product with a constant."""
    kinds = llvm.StructType.get_literal([T.i32()] * 2)
    text = f"{{ .reg .b64 p; mul.wide.u32 p, $2, {multiplier:#x}; mov.b64 {{$1, $0}}, p; }}"
    both = pure(kinds, [a], text, "=r,=r,r", loc, ip)
    return Product(*(Uint32(llvm.extractvalue(T.i32(), both, [i], loc=loc, ip=ip)) for i in range(2)))


def round_keys(seed: Int64, rounds: int) -> list[RoundKey]:
    """Return the keys of all rounds.  Compute them once per seed: they cost a quarter of a call."""
    k0, k1 = Uint32(Int64(seed)), Uint32(Int64(seed) >> 32)
    return [
        RoundKey(k0 + Uint32(i * _WEYL[0] & 0xFFFFFFFF), k1 + Uint32(i * _WEYL[1] & 0xFFFFFFFF)) for i in range(rounds)
    ]


def philox(keys: list[RoundKey], c0: Int32, c1: Int32, c2: Int32, c3: Int32) -> list[Int32]:
    """Return the four random words of the counter (c0, c1, c2, c3)."""
    c0, c1 = Uint32(c0), Uint32(c1)
    c2, c3 = Uint32(c2), Uint32(c3)
    for key in keys:
        a, b = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c2 = _xor3(b.high, c1, key.low), _xor3(a.high, c3, key.high)
        c1, c3 = b.low, a.low
    return [Int32(c) for c in (c0, c1, c2, c3)]


def row_counter(slot: Int64, head: Int32, token: Int32) -> RowCounter:
    """Return the counter of the rows of a head.

    `slot` is the slot that is written; `token` is the index of the token in its sequence.
    """
    low = Int32(Int64(slot))
    high = Int32(Int64(slot) >> 32) << 16
    return RowCounter(Int32(head), low, high | Int32(token) & 0xFFFF)


def words(keys: list[RoundKey], counter: RowCounter, row: Int32, column: Int32, count: int, dstate: int) -> list[Int32]:
    """Return random words for `count` columns of a row from `column` on, two columns a word, as `convert` takes them.

    `count` is a power of two or a multiple of 8; `column` is a multiple of `count`.  The bits of a single column are
    in the low half of the word.
    """
    groups = -(-dstate // COLUMNS)
    first = Int32(row) * groups + Int32(column) // COLUMNS
    drawn: list[Int32] = []
    for i in range(0, count, COLUMNS):
        drawn += philox(keys, first + i // COLUMNS, *counter)
    if count >= COLUMNS:
        return drawn
    skip = Int32(column) % COLUMNS // 2  # the first of the four words that is used
    step = max(count // 2, 1)
    chosen = drawn[:step]
    for start in range(step, COLUMNS // 2, step):
        chosen = [Int32(select_(skip == start, other, word)) for other, word in zip(drawn[start:], chosen)]
    return chosen if count > 1 else [Int32(Uint32(chosen[0]) >> Uint32(Int32(column) % 2 * 16))]

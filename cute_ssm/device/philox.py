"""Philox-4x32, and which of its bits an element takes: the mapping of `cute_ssm.reference.rounding`."""

from cutlass import Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op, select_

from cute_ssm.device.asm import pure

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
COLUMNS = 8  # columns of a row that one call serves


@dsl_user_op
def _xor3(a, b, c, *, loc=None, ip=None):
    return Uint32(pure(T.i32(), [a, b, c], "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", loc, ip))


@dsl_user_op
def _product(a, multiplier, *, loc=None, ip=None):
    """(high word, low word) of a product with a Python int."""
    kinds = llvm.StructType.get_literal([T.i32()] * 2)
    text = f"{{ .reg .b64 p; mul.wide.u32 p, $2, {multiplier:#x}; mov.b64 {{$1, $0}}, p; }}"
    both = pure(kinds, [a], text, "=r,=r,r", loc, ip)
    return [Uint32(llvm.extractvalue(T.i32(), both, [i], loc=loc, ip=ip)) for i in range(2)]


def round_keys(seed, rounds):
    """The keys of all rounds, of a 64-bit `seed`: once per seed, because they cost a quarter of a call."""
    k0, k1 = Uint32(Int64(seed)), Uint32(Int64(seed) >> 32)
    return [(k0 + Uint32(i * _WEYL[0] & 0xFFFFFFFF), k1 + Uint32(i * _WEYL[1] & 0xFFFFFFFF)) for i in range(rounds)]


def philox(keys, c0, c1, c2, c3):
    """The four words (`Int32`) of a counter under `round_keys`."""
    c0, c1, c2, c3 = (Uint32(c) for c in (c0, c1, c2, c3))
    for k0, k1 in keys:
        (a_high, a_low), (b_high, b_low) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = _xor3(b_high, c1, k0), b_low, _xor3(a_high, c3, k1), a_low
    return [Int32(c) for c in (c0, c1, c2, c3)]


def place(slot, head, token):
    """The three words of the counter that a row shares, from the 64-bit slot that is written."""
    low = Int32(Int64(slot))
    high = Int32(Int64(slot) >> 32) << 16
    return Int32(head), low, high | Int32(token) & 0xFFFF


def words(keys, place, row, column, count, dstate):
    """Random words of `count` columns of a row from `column` on, as `convert` takes them: two columns a word.

    `count` is a power of two or a multiple of 8, and `column` a multiple of it.  Of a single column, the bits are in
    the low half of the word.
    """
    groups = -(-dstate // COLUMNS)
    first = Int32(row) * groups + Int32(column) // COLUMNS
    drawn = []
    for i in range(0, count, COLUMNS):
        drawn += philox(keys, first + i // COLUMNS, *place)
    if count >= COLUMNS:
        return drawn
    skip = Int32(column) % COLUMNS // 2  # which of the four words come first
    step = max(count // 2, 1)
    chosen = drawn[:step]
    for start in range(step, COLUMNS // 2, step):
        chosen = [Int32(select_(skip == start, other, word)) for other, word in zip(drawn[start:], chosen)]
    return chosen if count > 1 else [Int32(Uint32(chosen[0]) >> Uint32(Int32(column) % 2 * 16))]

"""Logic, shift, bit-field, counting and packed dot-product instructions.

PTX ISA: "Logic and Shift Instructions", "bfe, bfi, bmsk, szext, popc, clz, brev, bfind, fns, dp4a, dp2a, prmt".
"""

from __future__ import annotations

import numpy as np

from ..decode import KIND_OF_TYPE, imm, op, type_of
from ..errors import UnsupportedInstruction
from ..nodes import Imm

U32, U64, S64 = np.uint32, np.uint64, np.int64


def unsigned(kind):
    return "u" + kind[1:]


# ---------------------------------------------------------------- logic and shifts
@op("and", "or", "xor")
def logic(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.op]
    return dec.alu(fn, ins.operands[0], k, [(a, k) for a in ins.operands[1:]])


@op("not")
def logical_not(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    return dec.alu(np.invert, ins.operands[0], k, [(ins.operands[1], k)])


@op("cnot")
def cnot(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    return dec.alu(lambda a: a == 0, ins.operands[0], k, [(ins.operands[1], k)], False)


@op("shl", "shr")
def shift(dec, ins):
    """Shift amounts beyond the width behave as the width (PTX clamps them)."""
    kind = type_of(ins)
    k = KIND_OF_TYPE[kind]
    if ins.op == "shl":
        k = unsigned(k)
    bits = int(k[1:])
    dtype = np.dtype(f"{k[0].replace('s', 'i')}{bits // 8}").type
    d, a, amount = ins.operands
    ufunc = np.left_shift if ins.op == "shl" else np.right_shift
    if isinstance(amount, Imm):
        count = amount.value & 0xFFFFFFFF
        if count >= bits:
            if k[0] == "u":
                return dec.alu(lambda x: np.zeros_like(x), d, k, [(a, k)], False)
            count = bits - 1
        fixed = Imm("i", count)
        return dec.alu(ufunc, d, k, [(a, k), (fixed, k)])

    def run(x, n):
        clipped = np.minimum(n, U32(bits - 1)).astype(dtype)
        out = ufunc(x, clipped)
        return out if k[0] == "s" else np.where(n >= bits, dtype(0), out)

    return dec.alu(run, d, k, [(a, k), (amount, "u32")], False)


@op("shf")
def funnel(dec, ins):
    """shf.{l,r}.{clamp,wrap}.b32 d, lo, hi, count"""
    left, wrap = "l" in ins.mods, "wrap" in ins.mods
    d, lo, hi, count = ins.operands

    def run(low, high, n):
        n = np.asarray(n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
        pair = (np.asarray(high).astype(U64) << U64(32)) | np.asarray(low).astype(U64)
        return ((pair << n) >> U64(32)).astype(U32) if left else (pair >> n).astype(U32)

    return dec.alu(run, d, "u32", [(lo, "u32"), (hi, "u32"), (count, "u32")], False)


@op("lop3")
def lop3(dec, ins):
    if "BOOL" in ins.name or len(ins.operands) != 5:
        raise UnsupportedInstruction("lop3.BoolOp")
    table = imm(ins.operands[4])

    def run(a, b, c):
        terms = []
        for i in range(8):
            if table >> i & 1:
                terms.append((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        if not terms:
            return U32(0)
        out = terms[0]
        for term in terms[1:]:
            out = out | term
        return out

    return dec.alu(run, ins.operands[0], "u32", [(a, "u32") for a in ins.operands[1:4]], False)


@op("prmt")
def prmt(dec, ins):
    mode = next((m for m in ins.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    d, a, b, c = ins.operands
    if mode:
        raise UnsupportedInstruction(f"prmt.{mode}")
    if isinstance(c, Imm):
        picks = [(c.value >> 4 * i) & 0xF for i in range(4)]

        def run(x, y):
            out = U32(0)
            for i, pick in enumerate(picks):
                byte = ((x if (pick & 7) < 4 else y) >> U32(8 * (pick & 3))) & U32(0xFF)
                if pick & 8:
                    byte = (byte >> U32(7)) * U32(0xFF)
                out = out | (byte << U32(8 * i))
            return out

        return dec.alu(run, d, "u32", [(a, "u32"), (b, "u32")], False)

    def run_dynamic(x, y, sel):
        pair = (np.asarray(y).astype(U64) << U64(32)) | np.asarray(x).astype(U64)
        out = U64(0)
        for i in range(4):
            pick = (np.asarray(sel) >> U32(4 * i)).astype(U64)
            byte = (pair >> ((pick & U64(7)) * U64(8))) & U64(0xFF)
            byte = np.where(pick & U64(8), (byte >> U64(7)) * U64(0xFF), byte)
            out = out | (byte << U64(8 * i))
        return out.astype(U32)

    return dec.alu(run_dynamic, d, "u32", [(a, "u32"), (b, "u32"), (c, "u32")], False)


@op("bfe")
def bfe(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    bits = int(k[1:])
    d, a, pos, length = ins.operands

    def run(x, p, n):
        x = np.asarray(x)
        p, n = (np.asarray(v).astype(U64) & U64(0xFF) for v in (p, n))
        if k[0] == "u":
            wide = x.astype(U64)
            out = np.where(p < 64, wide >> np.minimum(p, U64(63)), U64(0))
            return out & np.where(n >= 64, U64(2**64 - 1), (U64(1) << np.minimum(n, U64(63))) - U64(1))
        p, n = p.astype(S64), n.astype(S64)
        wide = x.astype(S64)
        top = np.minimum(p + n, bits)
        keep = np.maximum(top - p, 0)
        shifted = np.where(keep > 0, (wide << np.minimum(64 - top, 63)) >> np.minimum(64 - keep, 63), 0)
        return np.where(n == 0, 0, np.where(keep > 0, shifted, wide >> 63))

    return dec.alu(run, d, k, [(a, k), (pos, "u32"), (length, "u32")], False)


@op("bfi")
def bfi(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    bits = int(k[1:])
    d, a, b, pos, length = ins.operands

    def run(x, y, p, n):
        p, n = (np.asarray(v).astype(U64) & U64(0xFF) for v in (p, n))
        ones = np.where(n >= 64, U64(2**64 - 1), (U64(1) << np.minimum(n, U64(63))) - U64(1))
        mask = np.where(p < bits, ones << np.minimum(p, U64(63)), U64(0))
        field = np.asarray(x).astype(U64) << np.minimum(p, U64(63))
        return (np.asarray(y).astype(U64) & ~mask) | (field & mask)

    return dec.alu(run, d, k, [(a, k), (b, k), (pos, "u32"), (length, "u32")], False)


@op("bmsk")
def bmsk(dec, ins):
    wrap = "wrap" in ins.mods

    def run(p, n):
        p, n = np.asarray(p).astype(U64), np.asarray(n).astype(U64)
        p, n = (p & U64(31), n & U64(31)) if wrap else (np.minimum(p, U64(32)), np.minimum(n, U64(32)))
        return (((U64(1) << n) - U64(1)) << p).astype(U32)

    return dec.alu(run, ins.operands[0], "u32", [(a, "u32") for a in ins.operands[1:]], False)


@op("szext")
def szext(dec, ins):
    signed = type_of(ins) == "s32"

    def run(x, n):
        n = np.asarray(n & U32(31) if "wrap" in ins.mods else np.minimum(n, U32(32))).astype(S64)
        low = np.asarray(x).astype(S64) & ((S64(1) << n) - 1)
        return np.where((n > 0) & ((low >> np.maximum(n - 1, 0)) & 1 > 0), low - (S64(1) << n), low) if signed else low

    return dec.alu(run, ins.operands[0], "u32", [(a, "u32") for a in ins.operands[1:]], False)


def popcount(x):
    return np.bitwise_count(x).astype(U32)


def leading_zeros(x):
    """clz of uint32/uint64 values."""
    x = np.atleast_1d(x).copy()
    bits = x.dtype.itemsize * 8
    shift = 1
    while shift < bits:
        x |= x >> x.dtype.type(shift)
        shift *= 2
    return (bits - np.bitwise_count(x).astype(np.int64)).astype(U32)


def reverse_bits(x):
    dtype = x.dtype.type
    for shift, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        m = dtype(mask & (2 ** (8 * x.dtype.itemsize) - 1))
        x = ((x >> dtype(shift)) & m) | ((x & m) << dtype(shift))
    return x.byteswap()


@op("popc", "clz", "brev")
def bit_counts(dec, ins):
    k = unsigned(KIND_OF_TYPE[type_of(ins)])
    fn = {"popc": popcount, "clz": leading_zeros, "brev": reverse_bits}[ins.op]

    def typed(x):
        return fn(np.atleast_1d(np.ascontiguousarray(x)))

    return dec.alu(typed, ins.operands[0], k if ins.op == "brev" else "u32", [(ins.operands[1], k)], False)


@op("bfind")
def bfind(dec, ins):
    k = KIND_OF_TYPE[type_of(ins)]
    bits = int(k[1:])

    def run(x):
        x = np.atleast_1d(x)
        if k[0] == "s":
            x = np.where(x < 0, ~x, x).view(f"u{bits // 8}")
        clz = leading_zeros(x)
        out = clz if "shiftamt" in ins.mods else U32(bits - 1) - clz
        return np.where(x == 0, U32(0xFFFFFFFF), out)

    return dec.alu(run, ins.operands[0], "u32", [(ins.operands[1], k)], False)


@op("fns")
def fns(dec, ins):
    """fns.b32 d, mask, base, offset: the offset-th set bit from base."""
    d, mask, base, offset = ins.operands

    def one(m, b, o):
        if o == 0:
            return b if m >> b & 1 else 0xFFFFFFFF
        step, left, at = (1, o, b) if o > 0 else (-1, -o, b)
        while 0 <= at < 32:
            left -= m >> at & 1
            if left == 0:
                return at
            at += step
        return 0xFFFFFFFF

    vector = np.vectorize(one, otypes=[U32])
    return dec.alu(
        lambda m, b, o: vector(np.asarray(m, S64), np.asarray(b, S64), np.asarray(o, S64)),
        d,
        "u32",
        [(mask, "u32"), (base, "u32"), (offset, "s32")],
        False,
    )


@op("dp4a", "dp2a")
def dot_packed(dec, ins):
    types = [m for m in ins.mods if m in ("u32", "s32")]
    d, a, b, c = ins.operands

    def parts(x, size, signed):
        x = np.ascontiguousarray(np.atleast_1d(x)).view(f"{'i' if signed else 'u'}{size}").astype(S64)
        return x.reshape((*x.shape[:-1], -1, 4 // size))

    def run4(x, y, z):
        return z + (parts(x, 1, types[0] == "s32") * parts(y, 1, types[1] == "s32")).sum(-1).astype(U32)

    def run2(x, y, z):
        ys = parts(y, 1, types[1] == "s32")
        ys = ys[..., 2:] if "hi" in ins.mods else ys[..., :2]
        return z + (parts(x, 2, types[0] == "s32") * ys).sum(-1).astype(U32)

    return dec.alu(run4 if ins.op == "dp4a" else run2, d, "u32", [(a, "u32"), (b, "u32"), (c, "u32")], False)

"""mov (with packing and unpacking), cvta and isspacep.

PTX ISA: "Data Movement and Conversion Instructions: mov, cvta, isspacep".
"""

from __future__ import annotations

import numpy as np

from ..decode import KIND_OF_TYPE, LOCAL_BASE, SHARED_BASE, op, type_of
from ..nodes import Imm, Mem, Special, Sym, Vec

U64 = np.uint64


def unsigned(kind):
    return "u" + kind[1:]


# ---------------------------------------------------------------- mov
_CLOCKS = ("%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


@op("mov")
def mov(dec, ins):
    """mov, including vector pack/unpack ("Data Movement: mov")."""
    kind = type_of(ins)
    dst, src = ins.operands
    if isinstance(src, Special) and src.name in _CLOCKS:
        put = dec.put(dst, KIND_OF_TYPE[kind])
        divisor, mask = (
            (1 << 32, 0xFFFFFFFF)
            if src.name.endswith("_hi")
            else (1, 0xFFFFFFFF if src.name in ("%clock", "%globaltimer_lo") else 2**64 - 1)
        )
        return lambda S: put(S, np.uint64(S.wave.clock() // divisor & mask))
    if isinstance(dst, Vec):
        return unpack(dec, kind, dst.items, src)
    if isinstance(src, Vec):
        return pack(dec, dst, src.items)
    k = KIND_OF_TYPE[kind]
    if isinstance(src, (Imm, Sym, Mem)):
        if isinstance(dst, Sym):
            return lambda S: None
        value = (
            dec.const(src, "f32" if kind == "f32" and src.kind != "i" else k if k != "h32" else "u32")
            if isinstance(src, Imm)
            else dec.const(src, k)
        )
        index, k2 = dec.row(dst), k if k != "h32" else "u32"
        return lambda S: S.put(k2, index, value)
    if k != "p":
        k = unsigned(k.replace("h", "u"))
    return dec.alu(
        np.positive if k != "p" else np.logical_or, dst, k, [(src, k)] if k != "p" else [(src, "p"), (src, "p")]
    )


def unpack(dec, kind, dsts, src):
    """mov.b32 {lo, hi}, r and friends."""
    width = int(KIND_OF_TYPE[kind][1:])
    get, part = dec.flat(src, f"u{width}"), width // len(dsts)
    puts = [dec.put(d, f"u{max(part, 16)}") for d in dsts]

    def f(S):
        value = np.ascontiguousarray(get(S)).view(f"u{part // 8}").reshape(-1, len(puts))
        for i, put in enumerate(puts):
            put(S, value[:, i])

    return f


def pack(dec, dst, srcs):
    width = dst.width
    part = width // len(srcs)
    gets = [dec.flat(s, f"u{max(part, 16)}") for s in srcs]
    put = dec.put(dst, f"u{width}")

    def f(S):
        value = np.empty((S.n, len(gets)), f"u{part // 8}")
        for i, get in enumerate(gets):
            value[:, i] = get(S)
        put(S, value.view(f"u{width // 8}").reshape(-1))

    return f


@op("cvta")
def cvta(dec, ins):
    """cvta{.to}.space: shared and local windows live at 1<<60 and 2<<60, param at 3<<60."""
    space = next(
        m.split("::")[0] for m in ins.mods if m.split("::")[0] in ("shared", "global", "local", "param", "const")
    )
    d, a = ins.operands
    k = KIND_OF_TYPE[type_of(ins)]
    base = {"shared": SHARED_BASE, "local": LOCAL_BASE}.get(space, 0)
    if "to" in ins.mods:
        mask = 0xFFFFFFFF if base else 2**64 - 1
        return dec.alu(np.bitwise_and, d, k, [(a, k), (Imm("i", mask), k)])
    return dec.alu(np.bitwise_or, d, k, [(a, k), (Imm("i", base), k)])


@op("isspacep")
def isspacep(dec, ins):
    space = ins.mods[0].split("::")[0]
    code = {"global": 0, "const": 0, "shared": 1, "local": 2, "param": 3}[space]
    return dec.alu(
        lambda a: (np.asarray(a) >> U64(60)) == code, ins.operands[0], "p", [(ins.operands[1], "u64")], False
    )

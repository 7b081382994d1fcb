"""The modifiers each opcode may carry.

An instruction with any other modifier is refused when executed: a handler that looks only for the modifiers it knows
would silently ignore the rest.
"""

from __future__ import annotations

INT = "u8 s8 b8 u16 s16 b16 u32 s32 b32 u64 s64 b64 u16x2 s16x2"
FLOAT = "f16 f16x2 bf16 bf16x2 f32 f64"
ROUND = "rn rz rm rp ftz sat"
SPACE = "global shared shared::cta shared::cluster local param param::entry param::func const"
ORDER = "weak volatile relaxed acquire release acq_rel sc mmio cta cluster gpu sys"
CACHE = (
    "nc ca cg cs lu cv wb wt L1::evict_normal L1::evict_first L1::evict_last L1::evict_unchanged L1::no_allocate "
    "L2::evict_normal L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B level::eviction_priority"
)
VECTOR = "v2 v4 v8"
COMPARE = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz pred"
TENSOR = "1d 2d 3d 4d 5d tile tensor bulk async"

_TABLE = {
    "add sub": f"{INT} {FLOAT} f32x2 {ROUND} cc",
    "addc subc": f"{INT} cc",
    "mul": f"{INT} {FLOAT} f32x2 {ROUND} lo hi wide",
    "mad madc": f"{INT} f32 f64 {ROUND} lo hi wide cc",
    "mul24 mad24": "u32 s32 lo hi",
    "fma": f"{FLOAT} f32x2 {ROUND} relu",
    "sad": INT,
    "div": f"{INT} f32 f64 {ROUND} approx full",
    "rem": INT,
    "abs neg": f"{INT} {FLOAT} ftz",
    "min max": f"{INT} {FLOAT} ftz NaN relu xorsign abs",
    "copysign": "f32 f64",
    "rcp sqrt rsqrt sin cos lg2 ex2 tanh": f"{FLOAT} {ROUND} approx",
    "testp": "finite infinite number notanumber normal subnormal f32 f64",
    "and or xor not cnot": f"pred {INT}",
    "shl shr": INT,
    "shf": "l r clamp wrap b32",
    "lop3": "b32",
    "prmt": "b32 f4e b4e rc8 ecl ecr rc16",
    "bfe bfi": INT,
    "bmsk": "clamp wrap b32",
    "szext": "clamp wrap u32 s32",
    "popc clz brev": "b32 b64",
    "bfind": f"{INT} shiftamt",
    "fns": "b32",
    "dp4a dp2a": "u32 s32 lo hi",
    "setp set": f"{INT} {FLOAT} {COMPARE}",
    "selp slct": f"{INT} {FLOAT} ftz",
    "mov": f"pred {INT} {FLOAT}",
    "cvt": f"{INT} {FLOAT} tf32 e4m3x2 e5m2x2 e4m3x4 e5m2x4 {ROUND} rni rzi rmi rpi rna rs satfinite relu pack",
    "cvta": f"to u32 u64 {SPACE}",
    "isspacep": SPACE,
    "ld ldu": f"{INT} {FLOAT} {SPACE} {ORDER} {CACHE} {VECTOR} b128",
    "st": f"{INT} {FLOAT} {SPACE} {ORDER} {CACHE} {VECTOR} b128 async mbarrier::complete_tx::bytes",
    "prefetch prefetchu": f"{SPACE} L1 L2 L2::evict_last L2::evict_normal tensormap",
    "applypriority": "global L2::evict_normal",
    "discard": "global L2",
    "createpolicy": f"fractional range cvt {CACHE} L2::evict_unchanged b64 global",
    "fence membar": (
        "proxy alias async async::generic async.global async.shared::cta async.shared::cluster global "
        "shared::cta shared::cluster mbarrier_init release acquire acq_rel sc cta cluster gpu sys gl "
        "sync_restrict::shared::cta sync_restrict::shared::cluster tensormap::generic"
    ),
    "griddepcontrol": "wait launch_dependents",
    "setmaxnreg": "inc dec sync aligned u32",
    "nanosleep": "u32",
    "pmevent": "mask",
    "mapa getctarank": f"{INT} {SPACE}",
    "atom red": (
        f"{INT} {FLOAT} {SPACE} {ORDER} {VECTOR} add inc dec and or xor exch cas min max noftz L2::cache_hint b128"
    ),
    "cp": (
        f"{TENSOR} {SPACE} {CACHE} commit_group wait_group wait_all read bulk_group mbarrier arrive noinc b64 prefetch "
        "L2 mbarrier::complete_tx::bytes multicast::cluster reduce add min max and or xor inc dec noftz "
        "u32 s32 u64 s64 b32 f16 bf16 f32 f64"
    ),
    "bar barrier": "sync arrive red popc and or cta warp cluster wait aligned u32 pred acquire release relaxed",
    "mbarrier": (
        "init inval arrive arrive_drop expect_tx complete_tx test_wait try_wait pending_count parity noComplete "
        f"{SPACE} {ORDER} b64"
    ),
    "bra brx": "uni idx",
    "ret exit trap brkpt call": "uni",
    "shfl": "sync up down bfly idx b32",
    "vote": "sync all any uni ballot pred b32",
    "activemask": "b32",
    "match": "sync all any b32 b64",
    "redux": "sync add min max and or xor u32 s32 b32",
    "elect": "sync",
    "ldmatrix stmatrix movmatrix": "sync aligned m8n8 x1 x2 x4 trans shared shared::cta b16",
    "mma": ("sync aligned row col m16n8k4 m16n8k8 m16n8k16 m16n8k32 f16 bf16 tf32 f32 s32 e4m3 e5m2 s8 u8 satfinite"),
}
ALLOWED = {op: frozenset(mods.split()) for ops, mods in _TABLE.items() for op in ops.split()}


def unknown(ins):
    """Modifiers of an instruction that its opcode's handler does not know."""
    allowed = ALLOWED.get(ins.op)
    return [] if allowed is None else [m for m in ins.mods if m not in allowed]

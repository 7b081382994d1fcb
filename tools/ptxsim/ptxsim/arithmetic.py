"""What the hardware's arithmetic may get wrong and NumPy does not: all parameters, each with its source.

A session computes ``exact`` or ``hardware``.  Exact: approximate functions are rounded to nearest.  Hardware: their
results are any that the documents allow.  Every representable number within the documented error of the true result is
equally likely, chosen by a hash of the operand's bits, so that equal operands always give equal results.  No real chip
errs like this: its errors are smaller and systematic.  What holds here for several seeds, and with all errors at one
end, holds for any chip that its documents describe.

The documents (PTX ISA 9, and the tables of error bounds in the CUDA C++ Programming Guide) state the same errors for
all architectures that the emulator runs.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import UnsupportedInstruction
from .numerics import bf16_to_f32, f32_to_bf16

F32, F64, I64, U32, U64 = np.float32, np.float64, np.int64, np.uint32, np.uint64
INFINITY = float("inf")


class Error(NamedTuple):
    """Largest error of an instruction, for operands of some magnitudes.

    ``kind``: ``ulp`` of the true result; ``rounded``: ulp, counted from the correctly rounded result; ``relative``;
    ``absolute``.  ``low``, ``high``: it holds for ``low <= |operand| < high``, of a division's divisor.
    """

    kind: str
    size: float
    source: str
    low: float = 0.0
    high: float = INFINITY


# ------------------------------------------------------------------------------------------ approximate functions
_EX2 = "PTX ISA, Floating Point Instructions: ex2; the Programming Guide has 2 ulp for exp2f too"
_RCP = "PTX ISA, Floating Point Instructions: rcp; the Programming Guide has 1 ulp for 1/x without -prec-div"
_LG2 = "PTX ISA, Floating Point Instructions: lg2; the Programming Guide has 2 ulp for __log2f outside [0.5, 2]"
_SIN = "PTX ISA, Floating Point Instructions: sin, cos; the Programming Guide has 2^-21.41 for __sinf in [-pi, pi]"
_DIV = "PTX ISA, Floating Point Instructions: div; the Programming Guide has 2 ulp for __fdividef and x/y too"
_TRIGONOMETRIC = (
    Error("absolute", 2.0**-20.5, _SIN, high=2 * np.pi),
    Error("absolute", 2.0**-14.7, _SIN, low=2 * np.pi, high=100 * np.pi),
    Error("absolute", 1.0, "PTX ISA: no guarantee beyond 100 pi; taken as 1", low=100 * np.pi),
)
# (instruction, type) -> its errors: the first whose range holds the operand counts.  Zero, infinity and NaN as operands
# have the results of the documents' tables, exactly.  Nothing says that powers of two have exact reciprocals, integers
# exact powers, or 1 the logarithm 0: they err like other numbers here.
APPROXIMATE: dict[tuple[str, str], tuple[Error, ...]] = {
    ("ex2", "f32"): (Error("rounded", 2, _EX2),),
    ("rcp", "f32"): (Error("ulp", 1, _RCP),),
    ("sqrt", "f32"): (Error("relative", 2.0**-23, "PTX ISA, Floating Point Instructions: sqrt"),),
    ("rsqrt", "f32"): (Error("relative", 2.0**-22.9, "PTX ISA, Floating Point Instructions: rsqrt"),),
    ("lg2", "f32"): (
        Error("relative", 2.0**-22, _LG2, high=0.5),
        Error("absolute", 2.0**-22, _LG2, low=0.5, high=2.0),
        Error("relative", 2.0**-22, _LG2, low=2.0),
    ),
    ("sin", "f32"): _TRIGONOMETRIC,
    ("cos", "f32"): _TRIGONOMETRIC,
    ("tanh", "f32"): (
        Error("relative", 0.0, "PTX ISA, Floating Point Instructions: tanh: subnormals pass through", high=2.0**-126),
        Error("relative", 2.0**-11, "PTX ISA, Floating Point Instructions: tanh", low=2.0**-126),
    ),
    ("tanh", "f16"): (Error("absolute", 2.0**-10.987, "PTX ISA, Half Precision Instructions: tanh"),),
    ("tanh", "bf16"): (Error("absolute", 2.0**-8, "PTX ISA, Half Precision Instructions: tanh"),),
    ("ex2", "f16"): (Error("relative", 2.0**-9.9, "PTX ISA, Half Precision Instructions: ex2"),),
    ("ex2", "bf16"): (Error("relative", 2.0**-7, "PTX ISA, Half Precision Instructions: ex2"),),
    ("div.approx", "f32"): (Error("ulp", 2, _DIV),),
    ("div.full", "f32"): (Error("ulp", 2, _DIV),),
}
LARGEST_DIVISOR = 2.0**126  # div.approx: beyond it a quotient is zero, and that of an infinity NaN (PTX ISA, div)


# ------------------------------------------------------------------------------------------ sums of tensor cores
# [KM] F. A. Khattak, M. Mikaitis, "Accurate Models of NVIDIA Tensor Cores", ACM TACO, doi 10.1145/3830409, with models
#      and results of GPUs: https://github.com/north-numerical-computing/MATLAB-tensor-core, commit b12b5a7
# [XW] P. Xie et al., "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores", arXiv 2511.10909, with
#      its model: https://github.com/microsoft/MMA-Sim, commit c785138
# [DS] DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv 2412.19437, section 3.3.2: "around 14 bits"
# [CU] https://github.com/NVIDIA/cutlass/issues/1986
class TensorSum(NamedTuple):
    """How an instruction adds its products and its accumulator, all at once.  `tensorcore` computes it.

    Each addend is cut to `fraction` bits below the largest exponent of all, which counts as `lowest` at least; that of
    a product is the sum of its factors' exponents.  The sum of these is exact.  A float32 result keeps `result` bits
    behind its leading one, the rest is cut off; a float16 result (`half`) is rounded to nearest even.  `widened`: the
    instruction is two of float16, the second of which adds to the first, and an addition of the accumulator.
    """

    fraction: int
    result: int = 23
    lowest: int = -133
    half: bool = False
    widened: bool = False


# [KM] and [XW] agree on all figures for H100 and B200 but `lowest`, which [KM] alone has.  All K products of an
# instruction are added at once.  [KM] counts `fraction` from float32's 23 bits: "2 extra alignment bits".
_WIDE, _HALF = TensorSum(25), TensorSum(25, lowest=-21, half=True)
_NARROW = TensorSum(13, result=13)  # 8-bit floats in wgmma [KM, XW, DS]; the accumulator is cut, too
_FLOATS = {("f16", False): _WIDE, ("f16", True): _HALF, ("bf16", False): _WIDE, ("tf32", False): _WIDE}
# No mma.sync of 8-bit floats on Hopper [CU] or Blackwell: ptxas 13.0 writes conversions to float16, two HMMA, the first
# of the lower halves of all registers, and FADD or HADD2, on sm_90a, sm_100a and sm_103a.  [XW] leaves the instruction
# out.  [KM] models it as one sum, which its own results contradict; they are those of the machine code, bit for bit.
_MMA = _FLOATS | {
    (kind, half): figures._replace(widened=True)
    for kind in ("e4m3", "e5m2")
    for half, figures in ((False, _WIDE), (True, _HALF))
}
# (architecture, instruction) -> (type of A, float16 result) -> figures.  Nobody has measured sm_103a: it is taken to be
# as sm_100a, whose machine instructions it has.
TENSOR_SUMS: dict[tuple[str, str], dict[tuple[str, bool], TensorSum]] = {
    ("90", "mma"): _MMA,
    ("90", "wgmma"): _FLOATS | {("e4m3", False): _NARROW, ("e5m2", False): _NARROW},
    ("100", "mma"): _MMA,
    ("103", "mma"): _MMA,
}


# ------------------------------------------------------------------------------------------ grids of numbers
class Grid(NamedTuple):
    """Numbers of a type: bits of its mantissa, exponent of the smallest normal one, and (from, to) ordered integers."""

    mantissa: int
    smallest: int
    largest: int  # ordered integer of the largest finite number
    order: Callable  # float64 -> ordered integer of the number that it rounds to
    value: Callable  # ordered integer -> float32


def _ordered(bits, width):
    """Sign and magnitude -> integers that neighbours in value differ by one in; both zeros are 0."""
    bits = np.asarray(bits).astype(I64)
    sign = 1 << (width - 1)
    return np.where(bits >= sign, sign - bits, bits)


def _bits(order, width):
    return np.where(order < 0, (1 << (width - 1)) - order, order)


GRIDS = {
    "f32": Grid(
        23,
        -126,
        0x7F7FFFFF,
        lambda x: _ordered(x.astype(F32).view(U32), 32),
        lambda n: _bits(n, 32).astype(U32).view(F32),
    ),
    "f16": Grid(
        10,
        -14,
        0x7BFF,
        lambda x: _ordered(x.astype(np.float16).view(np.uint16), 16),
        lambda n: _bits(n, 16).astype(np.uint16).view(np.float16).astype(F32),
    ),
    "bf16": Grid(
        7,
        -126,
        0x7F7F,
        lambda x: _ordered(f32_to_bf16(x.astype(F32)), 16),
        lambda n: bf16_to_f32(_bits(n, 16).astype(np.uint16)),
    ),
}


def rounded(want, grid):
    """float64 -> float32 values of a type, to nearest."""
    if grid is GRIDS["f32"]:
        return want.astype(F32)
    if grid is GRIDS["f16"]:
        return want.astype(np.float16).astype(F32)
    return bf16_to_f32(f32_to_bf16(want.astype(F32)))


def ulp(values, grid):
    """Distance between neighbours of a type in the binade of each value."""
    exponent = np.where(values == 0, grid.smallest, np.frexp(values)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, grid.smallest) - grid.mantissa)


def mixed(*words):
    """A hash of 32-bit words, 32 bits wide (the finaliser of MurmurHash3 after each)."""
    state = np.zeros(1, U32)  # an array, whose products wrap silently
    for word in words:
        state = state ^ np.asarray(word, U32)
        state = (state ^ (state >> U32(16))) * U32(0x85EBCA6B)
        state = (state ^ (state >> U32(13))) * U32(0xC2B2AE35)
        state = state ^ (state >> U32(16))
    return state


# ------------------------------------------------------------------------------------------ the arithmetic of a session
@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a session computes what NumPy and the hardware compute differently.

    Attributes
    ----------
    name : str
        ``"exact"`` or ``"hardware"``.
    scale : float
        Documented errors are multiplied by it; sums of tensor cores are cut as many bits earlier as it has, to the
        nearest power of two.  0: results are those of ``exact``.
    seed : int
        Chooses among the results that the errors allow.
    early : int
        Sums of tensor cores are cut so many bits earlier than documented; functions err as documented.
    lean : str
        ``"spread"``: any result within the error; ``"low"``, ``"high"``: always the lowest, the highest one.
    """

    name: str = "exact"
    scale: float = 1.0
    seed: int = 0
    lean: str = "spread"
    early: int = 0

    def __post_init__(self):
        if self.name not in ("exact", "hardware"):
            raise ValueError(f"arithmetic must be 'exact' or 'hardware', got {self.name!r}")
        if self.lean not in ("spread", "low", "high"):
            raise ValueError(f"lean must be 'spread', 'low' or 'high', got {self.lean!r}")
        if not self.scale >= 0:
            raise ValueError(f"scale must be at least 0, got {self.scale}")

    @property
    def exact(self):
        return self.name == "exact"

    def tensor_sum(self, target, instruction, kind, half):
        """`TensorSum` of ``"mma"`` or ``"wgmma"`` by the type of A; None where sums are exact but for their rounding.

        ``half``: accumulator and result are float16.
        """
        if self.exact or self.scale == 0:
            return None
        number = "".join(c for c in target.split(",")[0] if c.isdigit())
        figures = TENSOR_SUMS.get((number, instruction), {}).get((kind, half))
        if figures is None:
            raise UnsupportedInstruction(
                f"arithmetic='hardware': no source tells how {instruction} of {target} adds products of {kind} to "
                f"{'f16' if half else 'f32'}"
            )
        lost = round(np.log2(self.scale)) + self.early
        return figures._replace(fraction=figures.fraction - lost, result=figures.result - max(lost, 0))

    def approximation(self, op, kind, function):
        """A float32 function of the last operand, or quotient of two, as ``op`` computes it for values of a type.

        ``function`` maps float64 to float64.  Results are float32 numbers that the type represents.
        """
        grid = GRIDS[kind]
        if self.exact:
            return lambda *args: rounded(function(*[np.asarray(a, F64) for a in args]), grid)
        if (op, kind) not in APPROXIMATE:
            raise UnsupportedInstruction(f"no error of {op}.{kind} is documented")
        errors, start = APPROXIMATE[op, kind], zlib.crc32(f"{op}.{kind}.{self.seed}".encode())

        def run(*args):
            args = [np.asarray(a, F32) for a in args]
            wide = [a.astype(F64) for a in args]
            want = np.asarray(function(*wide))
            out = self._allowed(want, wide[-1], errors, grid, [U32(start), *(a.view(U32) for a in args)])
            if op == "div.approx":
                lost = (np.abs(wide[1]) > LARGEST_DIVISOR) & np.isfinite(wide[1]) & ~np.isnan(wide[0])
                out = np.where(lost, np.where(np.isinf(wide[0]), F32(np.nan), np.copysign(F32(0), want)), out)
            return np.asarray(out, F32)

        return run

    def _allowed(self, want, operand, errors, grid, words):
        """One of the numbers of the type within the errors of ``want``."""
        near = rounded(want, grid)
        size = np.zeros(want.shape)
        for kind, bound, _, low, high in errors:
            here = (np.abs(operand) >= low) & (np.abs(operand) < high)
            unit = {
                "ulp": lambda: ulp(want, grid),
                "rounded": lambda: ulp(near.astype(F64), grid),
                "relative": lambda: np.abs(want),
                "absolute": lambda: np.ones(want.shape),
            }[kind]()
            size = np.where(here, self.scale * bound * unit, size)
        center = near.astype(F64) if errors[0].kind == "rounded" else want
        lowest, highest = center - size, center + size
        first, last = grid.order(lowest), grid.order(highest)
        first = first + (grid.value(first) < lowest)
        last = last - (grid.value(last) > highest)
        first, last = np.maximum(first, -grid.largest), np.minimum(last, grid.largest)
        if errors[0].kind != "absolute":  # no such error changes a sign
            first = np.where(want >= 0, np.maximum(first, 0), first)
            last = np.where(want <= 0, np.minimum(last, 0), last)
        count = np.maximum(last - first + 1, 0)
        if self.lean == "spread":
            drawn = (mixed(*words).astype(U64) * count.astype(U64) >> U64(32)).astype(I64)
        else:
            drawn = 0 if self.lean == "low" else count - 1
        found = np.copysign(grid.value(first + drawn), np.where(first + drawn == 0, want, first + drawn))
        fixed = (count == 0) | (operand == 0) | ~np.isfinite(operand) | ~np.isfinite(near)
        return np.where(fixed, near, found).reshape(want.shape)


EXACT, HARDWARE = Arithmetic("exact"), Arithmetic("hardware")


def of(value):
    """An `Arithmetic`, or that of a name."""
    return value if isinstance(value, Arithmetic) else Arithmetic(value)

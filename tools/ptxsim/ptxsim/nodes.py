"""What a parsed PTX module consists of: operands, instructions, variables, kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    """A declared register; ``width`` is 1 (predicate), 16, 32, 64 or 128 bits."""

    name: str
    width: int


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate.  ``kind`` is 'i' (integer), 'f32' or 'f64' (value holds the IEEE bits)."""

    kind: str
    value: int

    def as_float(self) -> float:
        if self.kind == "f32":
            return struct.unpack("<f", struct.pack("<I", self.value))[0]
        if self.kind == "f64":
            return struct.unpack("<d", struct.pack("<Q", self.value))[0]
        return float(self.value)


@dataclass(frozen=True)
class Sym:
    """The address of a variable, a function or a label name."""

    name: str


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Mem:
    """``[base + offset]`` or, for tensor copies, ``[base, {c0, c1, ...}]``."""

    base: object
    offset: int = 0
    coords: tuple | None = None


@dataclass(frozen=True)
class Not:
    """``!%p``"""

    item: object


@dataclass(frozen=True)
class Pair:
    """``a|b`` (destination register | predicate)."""

    first: object
    second: object


@dataclass
class Instr:
    op: str
    mods: tuple
    operands: list
    pred: Reg | None
    pred_neg: bool
    line: int
    text: str
    pc: int = -1

    @property
    def name(self) -> str:
        return ".".join((self.op, *self.mods))

    @property
    def ordered(self) -> bool:
        """Does the instruction take part in the ordering of memory?"""
        return not {"volatile", "acquire", "release", "relaxed", "acq_rel", "mmio"}.isdisjoint(self.mods)


@dataclass
class Var:
    """A variable in .param/.shared/.local/.global/.const space."""

    name: str
    space: str
    align: int
    size: int  # bytes; 0 for an extern array
    extern: bool = False
    init: bytes | None = None
    offset: int = 0  # within its space
    relocs: list = field(default_factory=list)  # (offset, symbol) addresses inside ``init``


@dataclass
class Kernel:
    name: str
    params: list
    instrs: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    shared: list = field(default_factory=list)
    local: list = field(default_factory=list)
    reqntid: tuple | None = None
    maxntid: tuple | None = None
    reqnctapercluster: tuple | None = None
    branch_tables: dict = field(default_factory=dict)
    is_entry: bool = True
    ret_params: list = field(default_factory=list)

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.size for p in self.params), default=0)


@dataclass
class Module:
    kernels: dict
    functions: dict
    globals: list  # .global and .const variables
    shared: list  # module-scope .shared variables
    target: str = ""
    version: str = ""


TYPE_BYTES = {
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
    "pred": 1,
}

"""Fetching of instructions: a cache of each sub-partition, one of the SM, then the L2 or DRAM.

The unit is the basic block of the PTX, in as many bytes as its machine instructions have.  A warp that enters a block
waits until its first instructions are there, and if they come more slowly than a warp can issue them, for the rest.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

from .constants import Machine

STEP = 16  # bytes of a machine instruction
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes, of machine opcodes


REGISTER = re.compile(r"\bR(\d+)\b")


class Load(NamedTuple):
    """A load of global memory in machine code.

    ``n_bytes`` per lane; ``at``: instructions before it; ``awaited``: earlier loads, by their number, whose results are
    used before it.
    """

    n_bytes: int
    at: int
    awaited: tuple[int, ...] = ()


class MachineCode(NamedTuple):
    """What is known of a kernel's machine code.

    ``instructions`` leaves padding out; ``spills`` are those that access spilled registers (LDL, STL).  ``straight``:
    there are no loops.  ``loads`` are those of global memory, in order.
    """

    code_bytes: int
    instructions: int
    spills: int = 0
    straight: bool = False
    loads: tuple[Load, ...] = ()

    @classmethod
    def of(cls, kernel) -> MachineCode:
        """Return that of a ``ptxsim.sass.KernelCode``."""
        spills = sum(instruction.base in ("LDL", "STL") for instruction in kernel.code)
        return cls(kernel.code_bytes, len(kernel.code), spills, not kernel.loops, loads_of(kernel.code))

    @property
    def spill_share(self) -> float:
        """Share of the instructions that access spilled registers."""
        return self.spills / self.instructions


def loads_of(code) -> tuple[Load, ...]:
    """Return the loads of global memory in machine instructions, in order."""
    found: list[Load] = []
    holds: dict[int, int] = {}  # register -> load whose result it gets
    awaited: set[int] = set()
    for at, each in enumerate(code):
        registers = [int(number) for number in REGISTER.findall(each.operands)]
        awaited.update(holds.pop(register) for register in registers if register in holds)
        if each.base == "LDG":
            n_bytes = width_of(each.opcode)
            holds.update(dict.fromkeys(range(registers[0], registers[0] + -(-n_bytes // 4)), len(found)))
            found.append(Load(n_bytes, at, tuple(sorted(awaited))))
    return tuple(found)


def width_of(opcode: str) -> int:
    """Return how many bytes a load of global memory gives each lane, by its machine opcode."""
    parts = opcode.split(".")
    return next((n for name, n in WIDTHS.items() if name in parts), 4)


class CodeCache:
    """The instruction caches of one SM.

    Parameters
    ----------
    machine : Machine
    blocks : dict
        Machine code bytes of each basic block, by the number of its first instruction.
    state : str
        ``"warm"``: the SM's cache holds as much of the code as it can; ``"l2"``: the L2 holds it; ``"cold"``: DRAM.
    """

    def __init__(self, machine: Machine, blocks: dict[int, int], state: str):
        self.machine, self.blocks = machine, blocks
        self.near = [OrderedDict() for _ in range(machine.schedulers)]  # block -> bytes
        self.held = [0] * machine.schedulers
        self.shared, self.shared_held = OrderedDict(), 0  # block -> (bytes, arrival of its last instruction)
        self.port = self.stream = 0.0
        self.latency = machine.dram_latency if state == "cold" else machine.l2_latency
        self.needed = state != "warm" or sum(blocks.values()) > machine.code_l0_bytes
        if state == "warm":
            for block, n_bytes in blocks.items():
                if self.shared_held + n_bytes <= machine.code_l1_bytes:
                    self.shared[block] = (n_bytes, 0.0)
                    self.shared_held += n_bytes

    def enter(self, scheduler: int, block: int, follows: bool, t: float) -> float:
        """Return when a warp may run a block that it reaches at ``t``; ``follows``: it lies behind its last one."""
        near = self.near[scheduler]
        if block in near:
            near.move_to_end(block)
            return t
        machine, n_bytes = self.machine, self.blocks[block]
        if n_bytes <= machine.code_l0_bytes:
            near[block] = n_bytes
            self.held[scheduler] += n_bytes
            while self.held[scheduler] > machine.code_l0_bytes:
                self.held[scheduler] -= near.popitem(last=False)[1]
        known = self.shared.get(block)
        if known is None:
            rate = machine.code_ahead / self.latency
            start = max(t, self.stream)
            self.stream = start + n_bytes / rate
            first = start if follows else start + self.latency
            arrival = first + n_bytes / rate
            if n_bytes <= machine.code_l1_bytes:
                self.shared[block] = (n_bytes, arrival)
                self.shared_held += n_bytes
                while self.shared_held > machine.code_l1_bytes:
                    self.shared_held -= self.shared.popitem(last=False)[1][0]
        else:
            self.shared.move_to_end(block)
            start = max(t, self.port)
            self.port = start + n_bytes / machine.code_l1_rate
            first = start if follows else start + machine.code_l1_latency
            arrival = max(known[1], first)
        return max(first, arrival - n_bytes / STEP)

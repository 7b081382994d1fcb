"""Lower PTX to what the scoreboard needs: pipe, latency, issue slots, registers read and written.

ptxas reorders the instructions of a basic block: loads move up, uses move down.  `schedule` imitates it by list
scheduling on the longest path, within a window, and keeps dependences through registers and memory.
"""

from __future__ import annotations

import functools
import re
import weakref
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from ptxsim.nodes import Mem, Not, Pair, Reg, Special, Vec

from .code import STEP, MachineCode
from .constants import SLOTS, Machine

PREDICATED = 64  # S: instructions that a branch skips, at most, for ptxas to predicate them
WIDE = ("b64", "s64", "u64")
NO_RESULT = frozenset("st stmatrix red bar barrier fence membar cp bra brx ret exit trap prefetch prefetchu discard "
    "griddepcontrol setmaxnreg nanosleep applypriority pmevent brkpt".split())  # fmt: skip
CONTROLS = frozenset("setmaxnreg nanosleep prefetch prefetchu discard createpolicy pmevent".split())
LOGIC = frozenset("and or xor not lop3".split())
COMPARE = frozenset("setp set selp slct min max".split())
SPECIALS = frozenset("rcp sqrt rsqrt sin cos lg2 ex2 tanh".split())
INT_ALU = frozenset("shr shf prmt bfi bmsk szext fns addc subc sad neg abs".split())
HALVES = frozenset("f16 bf16".split())
ONCE = frozenset("sfu ex2 bits convert widen".split())  # classes whose slots beyond the first are on other pipes
BITS = frozenset("popc clz brev bfind".split())


@dataclass
class Op:
    """A lowered PTX instruction.

    ``kind`` selects the method of `Replay` that executes it.  ``occupancy`` is how long all its machine instructions
    together hold ``pipe``; ``latency`` is the time from the issue of the last of its ``slots`` to the result.  It may
    go to a second pipe ``other``.
    """

    pc: int
    text: str
    kind: str
    pipe: str
    occupancy: float
    latency: float
    slots: int
    sources: tuple
    results: tuple
    space: str = ""  # of a memory instruction
    amount: int = 0  # of a wait: groups that may stay pending
    other: str = ""


class Place(NamedTuple):
    """Where a load stands in the machine code: issue slots before it, and loads whose results are used before it."""

    slots: float = 0.0
    awaited: frozenset[int] = frozenset()


ANYWHERE = Place()


class Words(NamedTuple):
    """Halves of 32-bit words.

    ``joined``: conversions to 16 bits whose result is the second half of a word, of which the first half is one too:
    one machine instruction makes both.  ``high``: registers that are the high half of a word.
    """

    joined: frozenset[int]
    high: frozenset[str]


def space_of(ins):
    """Return the state space of a memory instruction."""
    for mod in ins.mods:
        name = mod.split("::")[0]
        if name in ("global", "shared", "local", "param", "const"):
            return name
    return "generic"


class Lowering:
    """The lowered instructions of a program for a machine, scheduled by basic block."""

    def __init__(self, program, machine: Machine):
        self.kernel, self.machine = program.kernel, machine
        self.program = weakref.proxy(program)  # which may be a key of the lowerings
        self.names, self.blocks, self.counts, self.skips = {}, {}, {}, {}
        self.ops = [self.lower(ins) for ins in program.kernel.instrs]
        self.places: dict[int, Place] = {}

    def follow(self, code: MachineCode | None) -> None:
        """Let loads of global memory stand where the machine code has them, if that has no loops.

        ptxas delays loads so that their results do not all need registers at once; which of them wait, registers alone
        do not say.  Loads of equal width are told apart by their order only.
        """
        places: dict[int, Place] = {}
        if code is not None and code.straight and code.loads:
            mine = self.scheduled_loads()
            growth = self.growth(code)
            numbers: dict[int, list[int]] = {}  # bytes per lane -> loads of the machine code
            for number, load in enumerate(code.loads):
                numbers.setdefault(load.n_bytes, []).append(number)
            pcs = {
                number: pc
                for width, known in numbers.items()
                if len(known) == len(mine.get(width, ()))
                for number, pc in zip(known, mine[width])
            }
            for number, pc in pcs.items():
                load = code.loads[number]
                places[pc] = Place(load.at / growth, frozenset(pcs[n] for n in load.awaited if n in pcs))
        if places != self.places:
            self.places, self.blocks = places, {}

    def scheduled_loads(self) -> dict[int, list[int]]:
        """Return the loads of global memory by bytes per lane, in the order of a schedule that nothing delays."""
        found: dict[int, list[int]] = {}
        for op in schedule([op for op in self.ops if self.skipped(op.pc) is None], self.machine.window):
            if op.kind == "memory" and op.space == "global" and op.text.split(".")[0].endswith("ld"):
                found.setdefault(bytes_per_lane(op.text), []).append(op.pc)
        return found

    def block(self, block, stop):
        """Return the scheduled ops from the start of ``block`` to before the instruction ``stop``.

        Branches in between have become predicates, see `joined`.
        """
        known = self.blocks.get((block.pc, stop))
        if known is None:
            ops = [op for op in self.ops[block.pc : stop] if self.skipped(op.pc) is None]
            before = sum(op.slots for op in self.ops[: block.pc] if self.skipped(op.pc) is None)
            known = self.blocks[block.pc, stop] = schedule(ops, self.machine.window, self.places, before)
        return known

    def skipped(self, pc):
        """Return where the branch at ``pc`` leads if ptxas predicates what it skips instead, else None.

        So it does with short code that only computes.
        """
        if pc not in self.skips:
            ins, target = self.kernel.instrs[pc], None
            if ins.op == "bra" and ins.pred is not None:
                target = self.kernel.labels[ins.operands[0].name]
                short = pc < target <= pc + 1 + PREDICATED
                if not short or any(op.kind != "math" for op in self.ops[pc + 1 : target]):
                    target = None
            self.skips[pc] = target
        return self.skips[pc]

    def joined(self, visits, first):
        """Return the last of the visits from ``first`` on that are one basic block of the machine code."""
        last, join = first, -1
        while last + 1 < len(visits):
            visit = visits[last]
            target = self.skipped(visit.stop - 1) if visit.stop == visit.block.next_pc else None
            if target is not None:
                join = max(join, target)
            elif visit.stop != join:
                break
            if not visit.stop <= visits[last + 1].block.pc <= join:
                break
            last += 1
        return last

    @functools.cached_property
    def words(self):
        """How the kernel makes 32-bit words of 16-bit halves, and halves of words."""
        producers, joined, high = {}, set(), set()
        for ins in self.kernel.instrs:
            if ins.op == "mov" and len(ins.operands) == 2:
                into, out_of = ins.operands
                if isinstance(into, Vec) and len(into.items) == 2:
                    high.add(getattr(into.items[1], "name", None))
                if isinstance(out_of, Vec) and len(out_of.items) == 2:
                    made = [producers.get(getattr(item, "name", None)) for item in out_of.items]
                    if None not in made and made[0] != made[1]:
                        joined.add(max(made))
            narrows = ins.op == "cvt" and "f32" in ins.mods and any(m in HALVES for m in ins.mods)
            if narrows and ins.mods[-1] == "f32" and isinstance(ins.operands[0], Reg):
                producers[ins.operands[0].name] = ins.pc
        return Words(frozenset(joined), frozenset(high))

    def slots(self, block, stop):
        """Return the issue slots of ``block`` up to the instruction ``stop``."""
        known = self.counts.get((block.pc, stop))
        if known is None:
            known = self.counts[block.pc, stop] = sum(op.slots for op in self.ops[block.pc : stop])
        return known

    def growth(self, code: MachineCode | None):
        """Return machine instructions per issue slot of the PTX, where every one of them runs once; else 1."""
        if code is None or not code.straight:
            return 1.0
        return code.instructions / max(sum(op.slots for op in self.ops if self.skipped(op.pc) is None), 1)

    def block_bytes(self, code: MachineCode | None):
        """Return the bytes of each basic block that ran; ``code`` is shared out by issue slots."""
        step = STEP * self.machine.code_growth
        if code:
            step = code.code_bytes / max(sum(op.slots for op in self.ops), 1)
        return {pc: round(step * self.slots(block, block.next_pc)) for pc, block in self.program.blocks.items()}

    # ------------------------------------------------------------ operands
    def register(self, name):
        return self.names.setdefault(name, len(self.names))

    def collect(self, operand, out):
        """Append the registers of an operand to ``out``."""
        if isinstance(operand, Reg):
            out.append(self.register(operand.name))
        elif isinstance(operand, Vec):
            for item in operand.items:
                self.collect(item, out)
        elif isinstance(operand, Mem):
            self.collect(operand.base, out)
            for item in operand.coords or ():
                self.collect(item, out)
        elif isinstance(operand, Pair):
            self.collect(operand.first, out)
            self.collect(operand.second, out)
        elif isinstance(operand, Not):
            self.collect(operand.item, out)

    def lower(self, ins):
        machine, operands = self.machine, list(ins.operands)
        results, sources = [], []
        writes = ins.op not in NO_RESULT and operands and not isinstance(operands[0], Mem)
        if ins.op == "bar" and "red" in ins.mods:
            writes = True
        if ins.op == "wgmma":
            writes = isinstance(operands[0], Vec) if operands else False
        for i, operand in enumerate(operands):
            self.collect(operand, results if i == 0 and writes else sources)
        if ins.pred is not None:
            sources.append(self.register(ins.pred.name))
            sources.extend(results)  # a predicated-off instruction keeps the old value
        kind, pipe, occupancy, latency, space, amount, other = "math", "alu", 2.0, 4.5, "", 0, ""
        name, slots = self.classify(ins)
        if name in machine.pipes:
            chosen = machine.pipes[name]
            pipe, occupancy, latency, other = chosen.name, chosen.occupancy * slots, chosen.latency, chosen.other
            if name in ONCE:  # one of its slots is on the pipe; the others prepare its operand and its result
                occupancy, latency = chosen.occupancy, latency + (slots - 1) * (machine.pipes["fp32"].latency - 1)
        elif name == "free":
            pipe, occupancy, latency = "none", 0, 0
        elif name == "mma":
            pipe, (occupancy, latency) = "tensor", self.matrix(ins)
        else:
            kind, pipe, occupancy, latency = name, "none", 0, 0
            space = space_of(ins)
            if "wait_group" in ins.mods:
                amount = ins.operands[0].value
        if kind in ("memory", "matrix"):
            pipe, occupancy = "lsu", 1
        return Op(
            ins.pc,
            ins.text,
            kind,
            pipe,
            occupancy,
            latency,
            slots,
            tuple(sources),
            tuple(results),
            space,
            amount,
            other,
        )

    # ------------------------------------------------------------ classes
    def classify(self, ins):
        """Return the class and the issue slots of an instruction."""
        op, mods = ins.op, ins.mods
        wide = any(m in WIDE for m in mods)
        if op in ("ld", "ldu", "st", "atom", "red"):
            space = space_of(ins)
            if space in ("param", "const") and op == "ld":
                return "free", SLOTS["ld.param"]
            return "memory", 1
        if op in ("ldmatrix", "stmatrix"):
            return "matrix", 1
        if op == "cp":
            return self.copy_class(mods), 1
        if op == "mbarrier":
            return "mbarrier", 1
        if op in ("bar", "barrier"):
            return ("warp barrier" if "warp" in mods else "barrier"), 1
        if op in ("fence", "membar"):
            far = (op == "membar" and "cta" not in mods) or bool({"gpu", "sys"} & set(mods))
            return ("far fence" if far and "proxy" not in mods else "fence"), 1
        if op in ("bra", "brx", "ret", "exit", "call", "trap"):
            return "branch", 1
        if op == "griddepcontrol":
            return ("dependency wait" if "wait" in mods else "dependents"), 1
        if op in CONTROLS:
            return "control", 1
        if op == "wgmma":
            waits = "wait_group" in mods
            return ("wgmma wait" if waits else "wgmma" if "mma_async" in mods else "control"), 1
        if op == "mma":
            return "mma", 1
        if op == "shfl":
            return "shuffle", 1
        if op in ("vote", "match", "elect", "activemask"):
            return "vote", 1
        if op == "redux":
            return "redux", 1
        return self.arithmetic(ins, op, mods, wide)

    def copy_class(self, mods):
        """Return the class of a cp instruction."""
        bulk = "bulk" in mods
        if "prefetch" in mods:
            return "control"
        if "commit_group" in mods:
            return "bulk commit" if bulk else "commit"
        if "wait_group" in mods or "wait_all" in mods:
            if bulk:
                return "bulk wait read" if "read" in mods else "bulk wait"
            return "wait all" if "wait_all" in mods else "wait"
        if bulk:
            return "bulk"
        return "mbarrier" if "mbarrier" in mods else "memory"

    def arithmetic(self, ins, op, mods, wide):
        """Arithmetic, moves and conversions."""
        types = [m for m in mods if re.fullmatch(r"(pred|[busf]\d+(x2)?|bf16(x2)?|e[45]m[32](x[24])?|tf32)", m)]
        if op == "mov":
            if any(isinstance(o, Special) for o in ins.operands):
                return "special", 1
            return "free", SLOTS["mov"]
        if op in ("cvta", "mapa", "isspacep", "getctarank"):
            return "free", SLOTS["cvta"]
        if op == "cvt":
            return self.conversion(ins, types)
        floats = {"f32", "f16", "f16x2", "bf16", "bf16x2", "f32x2"} & set(types)
        if op in SPECIALS:
            exact = "rn" in mods
            if exact:
                return "sfu", SLOTS["sqrt.f32"] if op == "sqrt" else SLOTS["div.f32"]
            slots = 1 if "ftz" in mods or "f32" not in mods or op not in ("ex2", "lg2") else SLOTS[op]
            return "ex2" if op == "ex2" else "sfu", slots
        if op == "div":
            if "f32" in types:
                return "sfu", SLOTS["div.approx"] if "approx" in mods or "full" in mods else SLOTS["div.f32"]
            return "int", SLOTS["div.64" if wide else "div.32"]
        if op == "rem":
            return "int", SLOTS["div.64" if wide else "div.32"]
        if "f64" in types:
            return "fp64", 1
        if op in COMPARE:
            many = SLOTS["setp.64" if op in ("setp", "set") else "selp.64" if op in ("selp", "slct") else "minmax.64"]
            return "compare", many if wide else 1
        if floats:
            if "f32x2" in floats:
                return "fp32x2", 1
            return ("fp32" if "f32" in floats else "half"), 1
        if op in ("mul", "mad"):
            if wide and "wide" not in mods:
                return "imad", SLOTS["mul.64" if op == "mul" else "mad.64"]
            return "imad.hi" if "hi" in mods else "imad", 1
        if op in LOGIC:
            return "int", SLOTS["logic.64"] if wide else 1
        if op in INT_ALU:
            return "int", SLOTS["shift.64"] if wide else 1
        if op in ("add", "sub"):
            return ("int", SLOTS["add.64"]) if wide else ("add", 1)
        if op == "shl":
            return ("int", SLOTS["shift.64"]) if wide else ("add", 1)
        if op in BITS:
            return "bits", SLOTS["bfind"] if op in ("bfind", "clz") else 1
        if op == "bfe":
            return "int", SLOTS["bfe"]
        if op in ("dp4a", "dp2a"):
            return "imad", 1
        return "int", 1

    def conversion(self, ins, types):
        """cvt: widening is a move or a shift, packing a cheap instruction, the rest on the slow pipe."""
        first, last = types[0] if types else "b32", types[-1] if types else "b32"
        integers = all(t[0] in "usb" and t[1:].isdigit() for t in (first, last))
        if integers:
            wide = "64" in first or "64" in last
            return ("free", SLOTS["cvt.64"]) if wide and last != "s32" else ("int", 1)
        halves = {"f16", "bf16", "f16x2", "bf16x2"}
        if first == "f32" and last == "bf16":  # a shift; a high half is brought down first
            high = any(getattr(operand, "name", None) in self.words.high for operand in ins.operands[1:])
            return "widen", SLOTS["cvt.bf16.high"] if high else 1
        if first == "f32" and last in halves:
            return "half", 1
        if ins.pc in self.words.joined:
            return "free", SLOTS["cvt.joined"]
        if first in halves or "x2" in first or "x4" in first:
            return ("unpack" if first in halves and last.startswith("e") else "pack"), 1
        if first == "f32" and last == "f32":
            return "convert", 1
        if first == "tf32":
            return "int", 4
        return "convert", 1

    def wgmma_share(self, pc):
        """Return how many m16n8k16 products a quarter of a wgmma amounts to."""
        ins = self.kernel.instrs[pc]
        shape = next(m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m))
        m, n, k = map(int, re.findall(r"\d+", shape))
        bits = 32 if "tf32" in ins.mods else 8 if {"e4m3", "e5m2", "s8", "u8"} & set(ins.mods) else 16
        return m * n * k * bits / 4 / (16 * 8 * 16 * 16)

    def matrix(self, ins):
        """Return occupancy and latency of an mma, by its shape and operand width."""
        shape = next(m for m in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", m))
        m, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        bits = 32 if "tf32" in ins.mods else 8 if {"e4m3", "e5m2", "s8", "u8"} & set(ins.mods) else 16
        share = m * n * k * bits / (16 * 8 * 16 * 16)
        machine = self.machine
        return machine.mma_clocks * share, machine.mma_latency * (0.5 + 0.5 * min(1.0, share))


def bytes_per_lane(text: str) -> int:
    """Return how many bytes a PTX load gives each lane."""
    mods = re.sub(r"^@\S+\s+", "", text).split()[0].split(".")
    bits = next(int(m[1:]) for m in reversed(mods) if re.fullmatch(r"[busf]\d+", m))
    return bits // 8 * next((int(m[1:]) for m in mods if re.fullmatch(r"v\d", m)), 1)


def schedule(ops, window, places=MappingProxyType({}), before=0.0):
    """Return the ops of a basic block as a compiler orders them; control and synchronisation ops do not move.

    ``places`` say where some of them stand, by their number; ``before`` are the issue slots before the block.  Such an
    op moves up only where the warp would otherwise wait for a load that it does not follow in the machine code.
    """
    out, start = [], 0

    def add(part):
        nonlocal before
        out.extend(_list_schedule(part, window, places, before))
        before += sum(op.slots for op in part)

    for i, op in enumerate(ops):
        if op.kind not in ("math", "memory", "matrix"):
            add(ops[start:i])
            out.append(op)
            before += op.slots
            start = i + 1
    add(ops[start:])
    return out


def _list_schedule(ops, window, places, before):
    """Schedule what can issue first, then by longest path, among the next ``window`` ops whose inputs are scheduled.

    Times are those of the warp alone: when results are there, and when pipes are free.
    """
    n = len(ops)
    if n < 3:
        return list(ops)
    at = before
    writer, readers = {}, {}
    last_store, loads = {}, {}  # by state space
    after, missing = [[] for _ in range(n)], [0] * n

    def edge(a, b):
        if a is not None and a != b and b not in after[a]:
            after[a].append(b)
            missing[b] += 1

    for i, op in enumerate(ops):
        for r in op.sources:
            edge(writer.get(r), i)
            readers.setdefault(r, []).append(i)
        for r in op.results:
            edge(writer.get(r), i)
            for j in readers.pop(r, ()):
                edge(j, i)
            writer[r] = i
        if op.kind in ("memory", "matrix"):
            space = op.space if op.kind == "memory" else "shared"
            if op.results and not op.text.startswith("atom"):
                edge(last_store.get(space), i)
                loads.setdefault(space, []).append(i)
            else:
                edge(last_store.get(space), i)
                for j in loads.pop(space, ()):
                    edge(j, i)
                last_store[space] = i
    height, waits = [0.0] * n, [0.0] * n
    for i in range(n - 1, -1, -1):
        op = ops[i]
        wait = op.latency
        if op.kind == "memory" and op.results:
            wait = 30 if op.space == "shared" else 400
        elif op.kind == "matrix":
            wait = 33
        waits[i] = wait
        height[i] = op.slots + wait + max((height[j] for j in after[i]), default=0)

    def moves_up(late, other):
        """Whether a load goes before the wait for the result of another op."""
        other = ops[other]
        loads = other.kind == "memory" and other.space == "global"
        return loads and other.pc not in places[ops[late].pc].awaited

    done, out, first = [False] * n, [], 0
    now, arrives, cause, free = 0.0, [0.0] * n, [-1] * n, {}  # cause: the op whose result comes last
    while len(out) < n:
        while done[first]:
            first += 1
        best = late = None
        chosen = ()
        for i in range(first, min(n, first + window)):
            if done[i] or missing[i]:
                continue
            op = ops[i]
            if places.get(op.pc, ANYWHERE).slots > at:
                if late is None or places[op.pc].slots < places[ops[late].pc].slots:
                    late = i
                continue
            start = max(now, arrives[i])
            if op.occupancy:
                start = max(start, min(free.get(op.pipe, 0.0), free.get(op.other or op.pipe, 0.0)))
            key = (start, -height[i])
            if best is None or key < chosen:
                best, chosen = i, key
        if best is None or (late is not None and arrives[best] > now and moves_up(late, cause[best])):
            best = late
        op = ops[best]
        now = max(now, arrives[best])
        if op.occupancy:
            pipe = min((op.pipe, op.other or op.pipe), key=lambda name: free.get(name, 0.0))
            now = max(now, free.get(pipe, 0.0))
            free[pipe] = now + op.occupancy
        at += op.slots
        now += op.slots
        done[best] = True
        out.append(op)
        for j in after[best]:
            missing[j] -= 1
            if now + waits[best] > arrives[j]:
                arrives[j], cause[j] = now + waits[best], best
    return out

"""Issue slots of the machine code of a launch, from what the emulator counted of its PTX.

The emulator knows how often warps executed every PTX instruction; the machine code has other instructions, but the same
accesses, products, shuffles and special functions, each with the PTX line it comes from.  `issued` asks how often the
basic blocks of the machine code may have been executed such that

- every basic block's accesses, and the like, are executed as often as those of the PTX;
- warps enter a block as often as they leave blocks before it, where they do not diverge; where they may, both sides of
  a branch can be executed;
- a branch is executed at most as often as the one of the PTX that it comes from;
- waits succeed at the first try, and warps that the PTX keeps together do not diverge.

What these leave open makes the least and the greatest number differ.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from .decode import CONTROL
from .sass import DisassemblerError, Flow, Instruction, KernelCode, flow_of

MISMATCH = 0.02  # of the accesses: above, the two codes do not correspond
_EPSILON = 1e-5  # of a solved goal, so that it can be kept to
_MEMORY = {"LDG": "ldg", "STG": "stg", "LDS": "lds", "STS": "sts"}
_SINGLE = {
    "HMMA": "mma", "IMMA": "mma", "QMMA": "mma", "MUFU": "special", "SHFL": "shuffle", "LDSM": "ldmatrix",
    "STSM": "stmatrix", "UBLKCP": "bulk", "UTMALDG": "bulk", "UTMASTG": "bulk",
}  # fmt: skip
_PTX_SINGLE = {"mma": "mma", "shfl": "shuffle", "ldmatrix": "ldmatrix", "stmatrix": "stmatrix"}
_SPECIAL = {"ex2", "rcp", "lg2", "rsqrt", "sqrt", "tanh", "sin", "cos"}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Slots(NamedTuple):
    """Warp instructions that a launch issued: between `least` and `most`.

    ``mismatch`` is the share of accesses on which the two codes do not agree.
    """

    least: int
    most: int
    mismatch: float


def issued(launch: Any, code: KernelCode, lines: Mapping[int, int]) -> Slots | None:
    """Return the issue slots of a launch of the emulator, or None if its PTX and machine code do not correspond.

    Parameters
    ----------
    launch : ptxsim.Launch
        Run with counters.
    code : KernelCode
        Of the kernel, from `sass.of_kernel`.
    lines : mapping of int to int
        Of the same kernel, from `sass.lines_of`.
    """
    name = launch.program.kernel.name
    if name != code.name:
        raise ValueError(f"code: expected that of the kernel of the launch, {name}, got {code.name}")
    return Equations(Counted(launch), code, lines).bounds()


class Counted:
    """What the emulator counted of a launch, by line and by basic block of the PTX.

    Attributes
    ----------
    warps, lanes : Counter
        Executions of each line by warps, and by their lanes.
    block : dict of int to int
        Basic block of each line.
    branches : dict of int to bool
        Lines of conditional branches, and whether all lanes of a warp go the same way.
    classes : dict of (int, str) to (int, int)
        By basic block and kind, the executions and what one of the block has, of accesses in bytes of a lane; those
        that are predicated are left out.
    kinds : set of (int, str)
        The same, and those that are predicated.
    """

    def __init__(self, launch: Any):
        self.total = math.prod(launch.grid) * -(-math.prod(launch.block) // 32)
        self.issued = launch.counters.warp_instructions
        self.warps: Counter[int] = Counter()
        self.lanes: Counter[int] = Counter()
        program, counters = launch.program, launch.counters
        for pc, warps in counters.block_warps.items():
            for each in program.blocks[pc].instrs:
                self.warps[each.line] += warps
                self.lanes[each.line] += counters.block_lanes[pc]
        self.whole = all(self.lanes[line] == 32 * warps for line, warps in self.warps.items())
        instructions, labels = program.kernel.instrs, program.kernel.labels
        self.block: dict[int, int] = {}
        self.branches: dict[int, bool] = {}
        self.classes: dict[tuple[int, str], tuple[int, int]] = {}
        self.kinds: Set[tuple[int, str]]
        predicated: set[tuple[int, str]] = set()
        start = None
        for number, each in enumerate(instructions):
            if start is None or number in program.leaders:
                start = number
            self.block[each.line] = start
            if each.op in CONTROL:
                start = None
            if each.op == "bra" and each.pred is not None:
                after = [*instructions[number + 1 : number + 2]]
                after += [
                    instructions[at] for name, at in labels.items() if name in each.text and at < len(instructions)
                ]
                sides = [each.line, *(other.line for other in after)]
                self.branches[each.line] = all(self.lanes[line] == 32 * self.warps[line] for line in sides)
            found = _of_ptx(each)
            if found is not None:
                key = (self.block[each.line], found[0])
                count, once = self.classes.get(key, (0, 0))
                self.classes[key] = count + found[1] * self.warps[each.line], once + found[1]
                if each.pred is not None:
                    predicated.add(key)
        self.kinds = self.classes.keys() | predicated
        for key in predicated:
            del self.classes[key]


def _of_ptx(each: Any) -> tuple[str, int] | None:
    """Kind of a PTX instruction that the machine code has one for one, and the bytes of a lane or 1."""
    if each.op in ("ld", "st"):
        space = "s" if any(part.startswith("shared") for part in each.mods) else "g" if "global" in each.mods else ""
        if not space:
            return None
        vector = next((_VECTORS[part] for part in each.mods if part in _VECTORS), 1)
        bits = next(int(part[1:]) for part in reversed(each.mods) if part[0] in "bufs" and part[1:].isdigit())
        return f"{each.op}{space}", vector * bits // 8
    if each.op in _SPECIAL and "approx" in each.mods:
        return "special", 1
    if each.op == "cp" and "bulk" in each.mods and not {"commit_group", "wait_group", "prefetch"} & set(each.mods):
        return "bulk", 1
    return (_PTX_SINGLE[each.op], 1) if each.op in _PTX_SINGLE else None


def _of_sass(each: Instruction) -> tuple[str, int] | None:
    if each.base in _MEMORY:
        return _MEMORY[each.base], next((_WIDTHS[part] for part in each.opcode.split(".") if part in _WIDTHS), 4)
    return (_SINGLE[each.base], 1) if each.base in _SINGLE else None


class Equations:
    """Linear equations over the executions of basic blocks and edges, in units of all warps of the launch."""

    def __init__(self, counted: Counted, code: KernelCode, lines: Mapping[int, int]):
        self.counted, self.code, self.lines = counted, code, lines
        self.flow: Flow = flow_of(code.code)
        self.spins = {
            start for start, block in self.flow.blocks.items() if any(each.base == "NANOSLEEP" for each in block)
        }
        retries = {
            (tail, loop.start) for loop in code.loops if loop.blocks & self.spins and len(loop.blocks) <= 2
            for tail in loop.blocks
        }  # fmt: skip
        self.blocks = [start for start in self.flow.blocks if start not in self.flow.cold]
        self.column = {start: number for number, start in enumerate(self.blocks)}
        self.edges = [
            (tail, head) for tail in self.blocks for head in self.flow.edges[tail]
            if head in self.column and (tail, head) not in retries
        ]  # fmt: skip
        self.n = len(self.blocks) + len(self.edges)
        self.slack: list[int] = []  # of accesses
        self.extra: list[int] = []  # of branches
        self.equal: list[tuple[dict[int, float], float]] = []
        self.most: list[tuple[dict[int, float], float]] = []  # sums that are at most a number
        self._graph()
        self._branches()
        self._accesses()

    def _strict(self, start: int) -> bool:
        """Whether a warp leaves a block as a whole."""
        last = self.flow.blocks[start][-1]
        if self.counted.whole or last.base != "BRA" or (not last.predicate and "," not in last.operands):
            return True
        if last.opcode.startswith("BRA.U") or last.predicate.lstrip("@!").startswith("UP"):
            return True
        return self.counted.branches.get(self.lines.get(last.address, 0), False)

    def _graph(self) -> None:
        entering, leaving = defaultdict(list), defaultdict(list)
        for number, (tail, head) in enumerate(self.edges, len(self.blocks)):
            leaving[tail].append(number)
            entering[head].append(number)
        calls = defaultdict(list)
        for start, target in self.flow.calls.items():
            if start in self.column:
                calls[target].append(self.column[start])
        strict = {start: self._strict(start) for start in self.blocks}
        joins = self._joins(strict)
        for start in self.blocks:
            own = self.column[start]
            into = {own: 1.0, **{edge: -1.0 for edge in entering[start]}}
            for call in calls[start]:
                into[call] = into.get(call, 0.0) - 1.0
            if joins[start]:
                self.equal.append((into, 1.0 if start == 0 else 0.0))
            else:
                self.most.append((into, 1.0 if start == 0 else 0.0))
                self.most += [({edge: 1.0, own: -1.0}, 0.0) for edge in entering[start]]
            last, out = self.flow.blocks[start][-1], leaving[start]
            if not out:
                continue
            through = {own: 1.0, **{edge: -1.0 for edge in out}}
            if last.base == "EXIT":
                self.most += [({edge: 1.0, own: -1.0}, 0.0) for edge in out]
            elif strict[start]:
                self.equal.append((through, 0.0))
            else:
                self.most.append((through, 0.0))
                self.most += [({edge: 1.0, own: -1.0}, 0.0) for edge in out]
        for first, second in self._equivalent():
            self.equal.append(({self.column[first]: 1.0, self.column[second]: -1.0}, 0.0))

    def _dominators(self, backwards: bool) -> tuple[Any, dict[int, int]]:
        import networkx

        graph = networkx.DiGraph()
        graph.add_nodes_from(self.blocks)
        graph.add_edges_from(self.edges)
        root = 0
        if backwards:
            ends = [start for start in self.blocks if self.flow.blocks[start][-1].base in ("EXIT", "RET")]
            graph.add_edges_from((start, -1) for start in ends)
            graph, root = graph.reverse(), -1
        above = {node: up for node, up in networkx.immediate_dominators(graph, root).items() if up not in (None, node)}
        return graph, above

    def _joins(self, strict: dict[int, bool]) -> dict[int, bool]:
        """Blocks that a warp enters as a whole: none between them and their immediate dominator may divide it."""
        graph, above = self._dominators(backwards=False)
        found = {}
        for start in self.blocks:
            region, todo = {above.get(start, start)}, list(graph.predecessors(start))
            while todo:
                node = todo.pop()
                if node not in region:
                    region.add(node)
                    todo += graph.predecessors(node)
            found[start] = all(strict[node] for node in region)
        return found

    def _equivalent(self) -> Iterable[tuple[int, int]]:
        """Pairs of blocks of the same loops of which each execution of one has one of the other."""
        _, above = self._dominators(backwards=False)
        _, below = self._dominators(backwards=True)
        inside = {start: {loop.start for loop in self.code.loops if start in loop.blocks} for start in self.blocks}
        for start, up in above.items():
            if below.get(up) == start and inside[start] == inside[up]:
                yield start, up

    def _branches(self) -> None:
        found: dict[int, dict[int, float]] = defaultdict(dict)
        for start in self.blocks:
            last = self.flow.blocks[start][-1]
            line = self.lines.get(last.address, 0)
            if last.base == "BRA" and line in self.counted.branches and start not in self.spins:
                found[line][self.column[start]] = 1.0
        for line, terms in found.items():
            self.most.append(({**terms, self._slack(self.extra): -1.0}, self.counted.warps[line] / self.counted.total))

    def _accesses(self) -> None:
        """Sums over blocks of the machine code, with a slack, are those of a block of the PTX."""
        found: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        copies: dict[int, dict[int, float]] = defaultdict(dict)
        predicated = set()
        serial = {start: loop for loop in self.code.lane_loops for start in loop.blocks}
        for start in self.blocks:
            for each in self.flow.blocks[start]:
                kind = _of_sass(each)
                if kind is None or each.address not in self.lines:
                    continue
                key = (self.counted.block.get(self.lines[each.address], -1), kind[0])
                if start in serial:  # the loop is entered once for the warp
                    for number, (tail, head) in enumerate(self.edges, len(self.blocks)):
                        if head == serial[start].start and tail not in serial[start].blocks:
                            found[key][number] += kind[1]
                    copies[self.lines[each.address]][self.column[start]] = 1.0
                else:
                    found[key][self.column[start]] += kind[1]
                if each.predicate:
                    predicated.add(key)
        self.accesses = 0.0
        strange = sum(sum(terms.values()) for key, terms in found.items() if key not in self.counted.kinds)
        self.strange = strange / max(1.0, sum(sum(terms.values()) for terms in found.values()))
        for key, (count, once) in self.counted.classes.items():
            if key not in found:
                continue
            terms, wanted = dict(found[key]), count / self.counted.total
            if sum(terms.values()) < once:  # some were merged or found superfluous
                if len(terms) > 1 or key in predicated:
                    continue
                wanted *= sum(terms.values()) / once
            self.accesses += wanted
            less = {column: -n for column, n in terms.items()}
            self.most.append(({**less, self._slack(self.slack): -1.0}, -wanted))
            if key not in predicated:
                self.most.append(({**terms, self._slack(self.slack): -1.0}, wanted))
        for line, terms in copies.items():  # an iteration for every lane
            wanted = self.counted.lanes[line] / self.counted.total
            self.most.append(({**terms, self._slack(self.slack): -1.0}, wanted))
            self.most.append(({**dict.fromkeys(terms, -1.0), self._slack(self.slack): -1.0}, -wanted))

    def _slack(self, kind: list[int]) -> int:
        kind.append(self.n)
        self.n += 1
        return self.n - 1

    def bounds(self) -> Slots | None:
        """Solve: least mismatch first, of accesses and of branches; then fewest waits; then least and most slots."""
        mismatch, branches, spins, slots = (np.zeros(self.n) for _ in range(4))
        mismatch[self.slack], branches[self.extra] = 1.0, 1.0
        for start, column in self.column.items():
            slots[column] = len(self.flow.blocks[start])
            spins[column] = start in self.spins
        for goal in (mismatch, branches, spins):
            best = self._least(goal)
            if best is None:
                return None
            if goal is mismatch:
                share = best / max(1.0, self.accesses) + self.strange
            self.most.append(
                ({int(at): float(goal[at]) for at in np.flatnonzero(goal)}, best + _EPSILON * max(1.0, best))
            )
        least, most = self._least(slots), self._least(-slots)
        if least is None or most is None or share > MISMATCH:
            return None
        total = self.counted.total
        return Slots(round(least * total), round(-most * total), round(share, 4))

    def _least(self, goal: np.ndarray) -> float | None:
        try:
            from scipy.optimize import linprog
        except ImportError:
            raise DisassemblerError("slots of machine code: expected scipy, found none; pip install scipy") from None
        (most, bound), (equal, value) = self._matrix(self.most), self._matrix(self.equal)
        done = linprog(goal, most, bound, equal, value, bounds=(0, None), method="highs")
        return float(done.fun) if done.status == 0 else None

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> tuple[Any, np.ndarray]:
        from scipy.sparse import csr_matrix

        places = [(row, column, value) for row, (terms, _) in enumerate(rows) for column, value in terms.items()]
        row, column, value = zip(*places, strict=True)
        return csr_matrix((value, (row, column)), (len(rows), self.n)), np.array([bound for _, bound in rows])

"""Machine code of compiled kernels, read with ``nvdisasm``: instructions, loops, spills, code size.

Nothing runs here.  `of_kernel` takes a compiled kernel of the emulator, `of_cubin` a cubin, `of_object` an object file
or anything else that holds a fat binary.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cubin
from .errors import PtxError

STEP = 16  # bytes of an instruction, on sm_70 and newer
TOOL, DISTRIBUTION = "nvdisasm", "nvidia-cuda-nvdisasm"
REMEDY = f"pip install {DISTRIBUTION}, or put the {TOOL} of a CUDA Toolkit from 13.0 on the PATH"
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of a local access; 4 bytes without a suffix
_LINE = re.compile(r"//## File \"\.nv_debug_ptx_txt\", line (\d+)")
_ADDRESS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+\S")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)")
_TARGET = re.compile(r"0x[0-9a-f]+$")


class DisassemblerError(PtxError):
    """What reads machine code is missing or failed, or printed what is not known here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction.

    Attributes
    ----------
    address : int
        Offset in the kernel's code.
    predicate : str
        Such as ``"@!P0"``, or nothing.
    opcode, operands : str
        With all modifiers, such as ``"LDG.E.128"``; branch targets are offsets in the kernel's code.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch, call or reconvergence leads."""
        found = _TARGET.search(self.operands)
        return int(found.group(), 16) if found else None


@dataclass(frozen=True, slots=True)
class Loop:
    """A natural loop, inner ones included; an irreducible cycle counts as one loop.

    Attributes
    ----------
    start : int
        Address of its first instruction, the one that every iteration passes.
    instructions : int
        All of them, on whatever path through the loop.
    opcodes : Counter
        Basic opcodes, such as ``"FFMA"``, by number of instructions.
    blocks : frozenset of int
        Addresses of its basic blocks.
    per_lane : bool
        Whether it is what ptxas makes of an instruction of the uniform datapath whose operands differ among lanes: a
        loop with an iteration for every active lane, or for every distinct value.  A bulk copy that several lanes
        issue is such a loop.
    """

    start: int
    instructions: int
    opcodes: Counter[str]
    blocks: frozenset[int]
    per_lane: bool = False

    @property
    def code_bytes(self) -> int:
        """Bytes of its instructions."""
        return STEP * self.instructions


@dataclass(frozen=True)
class KernelCode:
    """What the machine code of a kernel is made of.

    Attributes
    ----------
    name : str
        Of the kernel.
    arch : int
        Compute capability times ten, such as 90 for sm_90a.
    registers : int
        Of a thread.
    frame_bytes : int
        Local memory of a thread: spilled registers, and arrays that are not in registers.
    code : tuple of Instruction
        All of them; behind the last one, `code_bytes` counts padding.
    code_bytes : int
        Size of the kernel's code section.
    loops : tuple of Loop
        The largest first.  Paths on which a warp leaves convergence (``BRA.DIV``), and padding, belong to none.
    """

    name: str
    arch: int
    registers: int
    frame_bytes: int
    code: tuple[Instruction, ...]
    code_bytes: int
    loops: tuple[Loop, ...]

    @property
    def issue_slots(self) -> int:
        """Instructions, padding left out: the slots of a warp that passes each of them once."""
        return len(self.code)

    @property
    def largest_loop(self) -> Loop | None:
        """The loop of most instructions."""
        return self.loops[0] if self.loops else None

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """Basic opcodes, such as ``"LDG"``, by number of instructions."""
        return Counter(each.base for each in self.code)

    @property
    def local_loads(self) -> int:
        """Loads from local memory (LDL)."""
        return self.opcodes["LDL"]

    @property
    def local_stores(self) -> int:
        """Stores to local memory (STL)."""
        return self.opcodes["STL"]

    @property
    def spill_bytes(self) -> int:
        """Bytes that a thread stores to local memory and loads from it if it passes each instruction once.

        For a kernel without arrays in local memory these are the spill stores and loads that ptxas reports.
        """
        return sum(_width(each) for each in self.code if each.base in ("LDL", "STL"))

    @property
    def lane_loops(self) -> tuple[Loop, ...]:
        """The loops with an iteration for every active lane, in the order of the code."""
        return tuple(sorted((loop for loop in self.loops if loop.per_lane), key=lambda loop: loop.start))

    def facts(self) -> dict[str, Any]:
        """Return the figures as plain numbers, for a result file."""
        largest = self.largest_loop
        return {
            "registers": self.registers,
            "issue_slots": self.issue_slots,
            "code_bytes": self.code_bytes,
            "largest_loop_bytes": largest.code_bytes if largest else 0,
            "local_loads": self.local_loads,
            "local_stores": self.local_stores,
            "local_bytes": self.spill_bytes,
            "frame_bytes": self.frame_bytes,
            "lane_loops": [loop.instructions for loop in self.lane_loops],
        }


# --------------------------------------------------------------------------------------------------------- what to read
def of_kernel(kernel: Any) -> dict[str, KernelCode]:
    """Return the machine code of a ``ptxsim.CompiledKernel``, by name of kernel.

    Raises
    ------
    DisassemblerError
        There is no ``nvdisasm``, or it cannot be read.
    """
    return of_cubin(cubin_of(kernel))


def of_object(data: bytes) -> dict[str, KernelCode]:
    """Return the machine code in the bytes of anything that holds a fat binary with one architecture's code."""
    return of_cubin(_only_image(data))


def cubin_of(kernel: Any) -> bytes:
    """Return the cubin of a ``ptxsim.CompiledKernel``."""
    return _only_image(kernel._image.host.module)


def _only_image(data: bytes) -> bytes:
    images = cubin.images(cubin.of_object(data))
    if len(images) != 1:
        raise ValueError(f"data: expected a fat binary with the code of one architecture, got {len(images)}")
    return images[0].elf


@functools.lru_cache(maxsize=64)
def of_cubin(data: bytes) -> dict[str, KernelCode]:
    """Return the machine code of the kernels in the bytes of a cubin, by name.

    Raises
    ------
    DisassemblerError
        There is no ``nvdisasm``, or it cannot be read.
    """
    known = cubin.kernels(data)
    try:
        about, functions = json.loads(disassembled(data, "-json"))
        arch = 10 * about["SM"]["version"]["major"] + about["SM"]["version"]["minor"]
        listed = {each["function-name"]: (each["length"], _instructions(each)) for each in functions}
        missing = known.keys() - listed.keys()
        if missing:
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DisassemblerError(
            f"expected the JSON that {TOOL} 13 prints, got something else from {disassembler()} "
            f"({type(error).__name__}: {error}); {REMEDY}"
        ) from None
    found = {}
    for name, kernel in known.items():
        length, code = listed[name]
        found[name] = KernelCode(name, arch, kernel.registers, kernel.frame, code, length, loops_of(code))
    return found


def lines_of(data: bytes) -> dict[str, dict[int, int]]:
    """Return, for each kernel of a cubin, the line of the PTX that every address of its code comes from.

    The code must have been compiled with line information, as `ptxsim.compile` does.
    """
    found: dict[str, dict[int, int]] = {}
    lines: dict[int, int] = {}
    line = 0
    for text in disassembled(data, "-gp").splitlines():
        if section := _FUNCTION.match(text):
            lines, line = found.setdefault(section.group(1), {}), 0
        elif said := _LINE.search(text):
            line = int(said.group(1))
        elif (at := _ADDRESS.match(text)) and line:
            lines[int(at.group(1), 16)] = line
    return found


# ----------------------------------------------------------------------------------------------------- the disassembler
@functools.cache
def disassembler() -> str:
    """Return the path of ``nvdisasm``: that of the Python package, else that on the PATH.

    Raises
    ------
    DisassemblerError
        There is none.
    """
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.stem == TOOL and Path(str(file.locate())).is_file():
            return str(file.locate())
    found = shutil.which(TOOL)
    if found is None:
        raise DisassemblerError(f"machine code: expected {TOOL}, found none; {REMEDY}")
    return found


def disassembled(data: bytes, *options: str) -> str:
    """Return what ``nvdisasm -c`` prints of a cubin."""
    with tempfile.TemporaryDirectory(prefix="ptxsim-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(data)
        done = subprocess.run([disassembler(), "-c", *options, str(path)], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().replace(folder, "")[:400]
        raise DisassemblerError(f"{disassembler()} failed with {done.returncode}: {said}; {REMEDY}")
    return done.stdout


def _instructions(function: dict[str, Any]) -> tuple[Instruction, ...]:
    """The instructions of a function, without the endless loop and the NOPs that fill its section."""
    code = [
        Instruction(STEP * number, each.get("predicate", ""), each["opcode"], each.get("operands", ""))
        for number, each in enumerate(function["sass-instructions"])
    ]
    if len(code) * STEP != function["length"]:
        raise ValueError(f"{len(code)} instructions in {function['length']} bytes")
    while code and code[-1].base == "NOP":
        code.pop()
    if code and code[-1].base == "BRA" and code[-1].target == code[-1].address:
        code.pop()
    return tuple(code)


def _width(access: Instruction) -> int:
    return next((_WIDTHS[part] for part in access.opcode.split(".") if part in _WIDTHS), 4)


# ----------------------------------------------------------------------------------------------- the control-flow graph
@dataclass(frozen=True)
class Flow:
    """The control-flow graph of a kernel.

    Attributes
    ----------
    blocks : dict of int to tuple of Instruction
        Basic blocks by the address of their first instruction.
    edges : dict of int to tuple of int
        Addresses of the blocks that may follow each block; a call is followed by the instruction behind it.
    calls : dict of int to int
        Blocks that end with a call, and the function they call.
    cold : frozenset of int
        Blocks that only warps reach whose lanes have diverged (``BRA.DIV``).
    """

    blocks: dict[int, tuple[Instruction, ...]]
    edges: dict[int, tuple[int, ...]]
    calls: dict[int, int]
    cold: frozenset[int]


def flow_of(code: tuple[Instruction, ...]) -> Flow:
    """Return the control-flow graph of a kernel's code.

    Raises
    ------
    DisassemblerError
        The code has branches whose targets are in registers.
    """
    ways = {each.address: tuple(_ways(each)) for each in code}
    end = code[-1].address + STEP if code else 0
    heads = {0, *(each.address + STEP for each in code if len(ways[each.address]) != 1 or _leaves(each))}
    heads |= {target for each in code if each.base in ("BRA", "CALL") and (target := each.target) is not None}
    starts = sorted(head for head in heads if head < end)
    blocks, edges, calls = {}, {}, {}
    for start, stop in zip(starts, [*starts[1:], end]):
        block = code[start // STEP : stop // STEP]
        blocks[start] = block
        edges[start] = tuple(dict.fromkeys(target for target in ways[block[-1].address] if target < end))
        if block[-1].base == "CALL" and block[-1].target is not None:
            calls[start] = block[-1].target
    warm = _reached(blocks, edges, calls, diverged=False)
    return Flow(blocks, edges, calls, frozenset(_reached(blocks, edges, calls, diverged=True) - warm))


def _leaves(each: Instruction) -> bool:
    return each.base in ("BRA", "CALL", "RET", "EXIT", "BRX", "JMX", "JMP")


def _ways(each: Instruction) -> Iterator[int]:
    """Addresses of the instructions that may follow one."""
    if each.base in ("BRX", "JMX", "JMP"):
        raise DisassemblerError(f"{each.opcode} at {each.address:#x}: branches through registers are not followed")
    conditional = each.predicate not in ("", "@PT", "@UPT") or (each.base == "BRA" and "," in each.operands)
    if each.base not in ("BRA", "RET", "EXIT") or conditional:
        yield each.address + STEP
    if each.base == "BRA":
        target = each.target
        if target is None:
            raise DisassemblerError(f"{each.opcode} {each.operands} at {each.address:#x}: expected a target")
        yield target


def _reached(
    blocks: dict[int, tuple[Instruction, ...]], edges: dict[int, tuple[int, ...]], calls: dict[int, int], diverged: bool
) -> set[int]:
    """Blocks that the entry reaches, with or without the far side of ``BRA.DIV``."""
    found, todo = set(), [0] if blocks else []
    while todo:
        start = todo.pop()
        if start in found:
            continue
        found.add(start)
        last, after = blocks[start][-1], edges[start]
        if not diverged and last.opcode.startswith("BRA.DIV"):
            after = tuple(target for target in after if target != last.target)
        todo += after
        todo += [calls[start]] if start in calls else []
    return found


def loops_of(code: tuple[Instruction, ...]) -> tuple[Loop, ...]:
    """Return the loops of a kernel's code, the largest first."""
    import networkx

    flow = flow_of(code)
    graph = networkx.DiGraph()
    graph.add_nodes_from(set(flow.blocks) - flow.cold)
    for start in graph:
        graph.add_edges_from((start, after) for after in flow.edges[start] if after not in flow.cold)
    bodies: dict[int, set[int]] = {}
    for root in dict.fromkeys([0, *flow.calls.values()]):
        if root not in graph:
            continue
        above = networkx.immediate_dominators(graph, root)
        own = graph.subgraph({root, *above})
        for tail, head in own.edges:
            if _dominates(above, head, tail):
                body = {head, tail} if tail != head else {head}
                body |= _backwards(own, tail, head)
                bodies.setdefault(head, set()).update(body)
        covered = networkx.DiGraph(own)
        covered.remove_edges_from([(t, h) for t, h in own.edges if _dominates(above, h, t)])
        for cycle in networkx.strongly_connected_components(covered):  # irreducible ones
            if len(cycle) > 1:
                bodies.setdefault(min(cycle), set()).update(cycle)
    loops = [_loop(head, body, flow) for head, body in bodies.items()]
    return tuple(sorted(loops, key=lambda loop: (-loop.instructions, loop.start)))


def _dominates(above: dict[int, int], head: int, node: int) -> bool:
    while node != head:
        node, below = above.get(node), node
        if node is None or node == below:  # the root, which versions of networkx note in different ways
            return False
    return True


def _backwards(graph: Any, tail: int, head: int) -> set[int]:
    """Blocks from which `tail` is reached without passing `head`."""
    found, todo = {head}, [tail]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += graph.predecessors(node)
    return found


def _loop(head: int, body: Iterable[int], flow: Flow) -> Loop:
    instructions = [each for start in body for each in flow.blocks[start]]
    opcodes = Counter(each.base for each in instructions)
    per_lane = any(each.opcode.startswith("BRA.U.ANY") and each.target == head for each in instructions)
    return Loop(head, len(instructions), opcodes, frozenset(body), per_lane)

"""Recordings of launches on disk: what `gpumodel.Trace` saw, without tensors, so that a model can replay it later.

A recording is JSON, compressed.  It holds the PTX, because a replay lowers it; keep recordings of other projects'
kernels out of repositories.
"""

from __future__ import annotations

import bisect
import gzip
import hashlib
import json
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import ptxsim
from ptxsim.launch import load
from ptxsim.ptxas import KernelInfo

from .. import trace as tracing
from ..code import Load, MachineCode
from ..model import resident_ctas
from ..trace import Trace, Visit

EVENTS = {kind.__name__: kind for kind in tracing.Event.__args__}
FORMAT = 5  # of the files
LEAST_CTAS = 16  # of an SM that are recorded, if there are as many
WAVES = 3  # of resident CTAs that are recorded


@dataclass
class RecordedLaunch:
    """A launch as a replay needs it.

    ``all_ctas`` is how many CTAs the SM has; the record may hold fewer, ``ctas``, from the first one on.  ``together``
    is how many different sectors the first CTA of every SM read, relative to the sum of what each read, by the first
    line of a region.
    """

    program: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    block_threads: int
    smem_total: int
    cluster_size: int
    pdl: bool
    registers: int
    all_ctas: int
    ctas: int
    ptx: str = field(repr=False)
    code: MachineCode
    together: dict[int, float]
    trace: Trace = field(repr=False, default=None)  # type: ignore[assignment]
    parts: dict[int, RecordedLaunch] = field(repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.program.kernel.name

    @property
    def scale(self) -> float:
        """CTAs of the SM, relative to those of the record."""
        return self.all_ctas / self.ctas

    def first(self, ctas: int) -> RecordedLaunch:
        """Return the launch with a record of its first CTAs alone."""
        if ctas >= self.ctas:
            return self
        if ctas not in self.parts:
            shorter = RecordedLaunch(**{**vars(self), "ctas": ctas, "trace": None, "parts": {}})
            warps = {w: visits for w, visits in self.trace.warps.items() if w < ctas * self.trace.warps_per_cta}
            shorter.trace = trace_of(shorter, warps, self.trace.state)
            self.parts[ctas] = shorter
        return self.parts[ctas]


@dataclass
class Recording:
    """The launches of a call.  Stands for a session where the model takes one."""

    launches: list[RecordedLaunch]

    @property
    def functions(self) -> list[Any]:
        """What the model asks for the registers of kernels."""
        return [
            types.SimpleNamespace(kernels=[KernelInfo(launch.name, launch.registers, 0, 0, 0)])
            for launch in self.launches
        ]  # fmt: skip


def trace_of(launch: RecordedLaunch, warps: dict[int, list[Visit]], state: dict[str, Any]) -> Trace:
    """Return a trace that is complete, of ``warps``; ``state``: its other attributes."""
    trace = Trace.__new__(Trace)
    trace.__dict__.update({**state, "launch": launch, "warps": warps, "state": state})
    return trace


# ------------------------------------------------------------------------------------------------------------ recording
def first_ctas(sms: int, whole: bool) -> Callable[[Any], np.ndarray]:
    """Return a filter for the emulator: the CTAs of SM 0, or as many as its first waves have; and each SM's first."""

    def pick(launch: Any) -> np.ndarray:
        if launch.cluster_size > 1:
            raise ValueError(f"clusters: expected launches without them, got {launch.cluster_size} CTAs per cluster")
        mine = np.arange(0, int(np.prod(launch.grid)), sms)
        mine = mine if whole else mine[: most_ctas(launch)]
        return np.concatenate([mine, np.arange(1, min(sms, int(np.prod(launch.grid))))])

    return pick


def most_ctas(launch: Any) -> int:
    """Return how many CTAs of an SM are recorded: a few times as many as can be resident by their threads."""
    from ..constants import H200

    resident = resident_ctas(H200, 16, launch.smem_total - 1024, launch.block_threads)
    return max(LEAST_CTAS, WAVES * resident)


def options(sms: int, whole: bool = False) -> dict[str, Any]:
    """Return options of ``ptxsim`` for a recording; ``whole``: of all CTAs of the SM."""
    return {"trace": Trace, "ctas": first_ctas(sms, whole), "wave_lanes": None, "sm_count": sms}


def recording_of(session: Any, sms: int) -> Recording:
    """Return the launches of a session that ran with `options`."""
    found = []
    for launch in session.launches:
        function = function_of(session, launch)
        registers = function.kernels[0].registers
        mine = len(range(0, int(np.prod(launch.grid)), sms))
        trace, others = launch.trace, min(sms, int(np.prod(launch.grid))) - 1
        ran = {warp // trace.warps_per_cta for warp in trace.warps}
        ctas = max(ran) + 1 - others
        warps = {warp: visits for warp, visits in trace.warps.items() if warp < ctas * trace.warps_per_cta}
        recorded = RecordedLaunch(
            launch.program, launch.grid, launch.block, launch.block_threads, launch.smem_total, launch.cluster_size,
            launch.pdl, registers, mine, ctas, function.ptx,
            code_of(function), together_of(trace, ctas),
        )  # fmt: skip
        recorded.trace = trace_of(recorded, warps, plain(launch.trace))
        found.append(recorded)
    if not found:
        raise ValueError("the call launched no kernel")
    return Recording(found)


def function_of(session: Any, launch: Any) -> Any:
    """Return the compiled function that made a launch: named by Triton's launches, found by kernel for CuTe DSL."""
    if hasattr(launch, "function"):
        return launch.function
    (function,) = (
        f for f in session.functions if [kernel.name for kernel in f.kernels] == [launch.program.kernel.name]
    )
    return function


def together_of(trace: Trace, ctas: int) -> dict[int, float]:
    """Return `RecordedLaunch.together`: the CTAs behind the first ``ctas`` are the first ones of the other SMs."""
    each: dict[int, dict[int, dict[int, int]]] = {}  # region -> CTA -> line -> sectors
    starts = sorted(tracing.Region(*region).lines for region in trace.regions)
    firsts = [first for first, _ in starts]
    for warp, visits in trace.warps.items():
        cta = warp // trace.warps_per_cta
        if 0 < cta < ctas:
            continue
        for event in (event for visit in visits for events in visit.events.values() for event in events):
            if not isinstance(event, (tracing.GlobalAccess, tracing.BulkCopy)):
                continue
            if not getattr(event, "load", getattr(event, "mode", "") == "read"):
                continue
            for line, mask in event.lines:
                region = firsts[bisect.bisect_right(firsts, line) - 1]
                lines = each.setdefault(region, {}).setdefault(cta, {})
                lines[line] = lines.get(line, 0) | mask
    found = {}
    for region, by_cta in each.items():
        union: dict[int, int] = {}
        for lines in by_cta.values():
            for line, mask in lines.items():
                union[line] = union.get(line, 0) | mask
        total = sum(mask.bit_count() for lines in by_cta.values() for mask in lines.values())
        found[region] = sum(mask.bit_count() for mask in union.values()) / total
    return found


def code_of(function: Any) -> MachineCode:
    """Return what the machine code of a compiled function's kernel is made of."""
    from ptxsim import sass

    if isinstance(function, ptxsim.CompiledKernel):
        data = sass.cubin_of(function)
    else:
        data = function.cubin
        _disassembler_of_triton()
    (kernel,) = sass.of_cubin(data).values()
    return MachineCode.of(kernel)


def _disassembler_of_triton() -> None:
    """Put the folder of Triton's disassembler on the PATH."""
    from triton import knobs

    folder = str(Path(knobs.nvidia.cuobjdump.path).parent)
    if folder not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], folder])


def plain(trace: Trace) -> dict[str, Any]:
    """Return the attributes of a trace that JSON can hold."""
    found = {}
    for name, value in vars(trace).items():
        if name in ("launch", "warps", "copies") or name.startswith("_"):
            continue
        try:
            found[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


# ----------------------------------------------------------------------------------------------------------------- disk
def as_json(recording: Recording) -> dict[str, Any]:
    """Return a recording as types of JSON."""
    launches = []
    for launch in recording.launches:
        warps = {
            str(warp): [[visit.block.pc, visit.stop, events_as_json(visit.events)] for visit in visits]
            for warp, visits in launch.trace.warps.items()
        }
        fields = {k: v for k, v in vars(launch).items() if k not in ("program", "trace", "parts")}
        launches.append({**fields, "kernel": launch.name, "state": launch.trace.state, "warps": warps})
    return {"launches": launches}


def events_as_json(events: dict[int, list[Any]]) -> dict[str, list[Any]]:
    return {str(pc): [[type(event).__name__, *event] for event in found] for pc, found in events.items()}


def from_json(data: dict[str, Any]) -> Recording:
    """Return a recording from what `as_json` made."""
    launches = []
    for found in data["launches"]:
        found = dict(found)
        kernel, state, warps = found.pop("kernel"), found.pop("state"), found.pop("warps")
        program = load(found["ptx"]).program(kernel)
        *code, loads = found["code"]
        found["code"] = MachineCode(*code, tuple(Load(n, at, tuple(awaited)) for n, at, awaited in loads))
        found["together"] = {int(line): share for line, share in found["together"].items()}
        found["grid"], found["block"] = tuple(found["grid"]), tuple(found["block"])
        launch = RecordedLaunch(program=program, **found)
        launch.trace = trace_of(launch, {int(w): [visit_of(program, v) for v in visits] for w, visits in warps.items()},
                                state)  # fmt: skip
        launches.append(launch)
    return Recording(launches)


def visit_of(program: Any, found: list[Any]) -> Visit:
    pc, stop, events = found
    visit = Visit(program.blocks.get(pc) or program.build_block(pc))
    visit.stop = stop
    visit.events = {int(at): [EVENTS[name](*restored(name, fields)) for name, *fields in listed]
                    for at, listed in events.items()}  # fmt: skip
    return visit


def restored(name: str, fields: list[Any]) -> list[Any]:
    """Return the fields of an event, with tuples where it has them."""
    lines = EVENTS[name]._fields.index("lines") if "lines" in EVENTS[name]._fields else None
    return [
        tuple(tracing.Line(*line) for line in value) if i == lines
        else tuple(map(tuple, value)) if isinstance(value, list) else value
        for i, value in enumerate(fields)
    ]  # fmt: skip


class Cache:
    """A folder of recordings."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: dict[str, Any]) -> Path:
        """Return the file of what ``key`` describes, for the code that makes recordings now."""
        code = "".join(digest(Path(module.__file__)) for module in (tracing, *_sources()))
        text = json.dumps([FORMAT, key, code], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json.gz"

    def get(self, key: dict[str, Any]) -> Recording | None:
        """Return a recording, or None."""
        path = self.path(key)
        if not path.exists():
            return None
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return from_json(json.load(file))

    def put(self, key: dict[str, Any], recording: Recording) -> None:
        """Keep a recording."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(key)
        partial = path.with_suffix(".part")
        with gzip.open(partial, "wt", encoding="utf-8", compresslevel=4) as file:
            json.dump({"of": key, **as_json(recording)}, file)
        partial.replace(path)


def _sources() -> list[Any]:
    import ptxsim.counters

    return [ptxsim.counters]


def digest(path: Path) -> str:
    """Return a digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

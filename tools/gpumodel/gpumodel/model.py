"""From recorded launches to microseconds: the CTAs of an SM, and its share of the memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, fields, replace
from weakref import WeakKeyDictionary

import numpy as np

import ptxsim

from .code import MachineCode
from .constants import MACHINES, Machine
from .lower import Lowering
from .memory import Residency
from .replay import Replay, Setting, Timing
from .trace import LINE, SECTOR, Region, Trace

REGISTERS = 128  # of a kernel for which ptxas reported none
REPLAYED = tuple(  # constants that only a replay reads: machines that differ in these alone share lowered code
    entry.name for entry in fields(Machine)
    if entry.name not in ("name", "arch", "pipes", "mma_clocks", "mma_latency", "window", "code_growth")
)  # fmt: skip
SMALL_BYTES = 4 << 20  # G: of a tensor that lies in the L2 when a model calls an operator
FOLLOWS = 4000.0  # G: clocks that a call's first launch starts early, at most, if it follows another one
_lowered: WeakKeyDictionary = WeakKeyDictionary()  # program -> {machine: Lowering}


@dataclass
class KernelTime:
    """The modelled run of a launch on the SM with the most CTAs."""

    name: str
    grid: tuple
    block: tuple
    registers: int
    shared_bytes: int
    resident_ctas: int  # of an SM at a time
    active_sms: int
    clocks: float
    timing: Timing
    trace: Trace = field(repr=False)

    @property
    def limits(self) -> dict[str, float]:
        """Clocks that each resource alone needs."""
        return {
            "issue": self.timing.slots / 4,
            "shared memory": self.timing.shared,
            "tensor": self.timing.tensor / 4,
        }


@dataclass
class Modelled:
    """The modelled time of a call.  ``fitted`` says whether the machine's constants were fitted to measurements."""

    machine: str
    us: float
    kernels: list[KernelTime]
    bytes: int  # that the call must move
    roof_us: float  # time of a copy that moves as many bytes
    exact: bool = True  # False: extrapolated
    fitted: bool = False

    @property
    def of_roof(self) -> float:
        """Bandwidth of the call, relative to that of a large copy."""
        return self.roof_us / self.us


def machine_of(name: str | Machine) -> Machine:
    """Return a machine by name, such as ``"H200"``, or by compile target; of several, the first of `MACHINES`."""
    if isinstance(name, Machine):
        return name
    for machine in MACHINES.values():
        if name in (machine.name, machine.arch):
            return machine
    raise ValueError(f"machine: expected one of {', '.join(MACHINES)} or a target, got {name!r}")


def resident_ctas(machine: Machine, registers: int, shared_bytes: int, threads: int) -> int:
    """Return how many CTAs are resident on an SM at a time.

    Parameters
    ----------
    machine : Machine
    registers : int
        Registers per thread.
    shared_bytes : int
        Shared memory of a CTA, without what the system reserves.
    threads : int
        Threads of a CTA.
    """
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 16) * 32 // machine.register_unit) * machine.register_unit
    by_registers = machine.registers // per_warp // warps
    by_shared = machine.shared_bytes // (shared_bytes + machine.shared_per_cta)
    return max(1, min(by_registers, by_shared, machine.max_warps // warps, machine.max_ctas))


def of_one_sm(machine: Machine) -> Callable:
    """Return a filter for ``ptxsim`` that selects the CTAs of SM 0, where CTAs are distributed round-robin."""

    def pick(launch):
        if launch.cluster_size > 1:
            raise ValueError(f"clusters: expected launches without them, got {launch.cluster_size} CTAs per cluster")
        return np.arange(0, int(np.prod(launch.grid)), machine.sms)

    return pick


def record(run: Callable[[], object], machine: Machine):
    """Run a call in the emulator and return the session, whose launches have a `Trace` of the CTAs of one SM."""
    with ptxsim.emulate(arch=machine.arch, **sampling(machine)) as session:
        run()
    return session


def sampling(machine: Machine) -> dict:
    """Return the emulator's options that record the CTAs of one SM."""
    return {"trace": Trace, "ctas": of_one_sm(machine), "wave_lanes": None, "sm_count": machine.sms}


def resources(session) -> dict[str, int]:
    """Return the registers per thread of each kernel of a session, by name."""
    return {kernel.name: kernel.registers for function in session.functions for kernel in function.kernels}


def lowered(program, machine: Machine) -> Lowering:
    """Return the lowered code of a program, which is kept."""
    key = replace(machine, **dict.fromkeys(REPLAYED, 0))
    known = _lowered.setdefault(program, {})
    if key not in known:
        known[key] = Lowering(program, machine)
    return known[key]


@dataclass(frozen=True)
class Conditions:
    """What a call meets on the GPU.  The default is how a kernel that runs alone in a CUDA graph is measured.

    Attributes
    ----------
    data : str
        What the L2 holds of the call's arguments.  ``"cold"``: nothing; what the call itself writes or reads, its later
        launches find there.  ``"warm"``: what is left of the same call on the same arguments just before, as in a
        benchmark that repeats it: all of them up to `Machine.l2_near_bytes`, less of larger ones, nothing from
        `Machine.l2_bytes`.  ``"activations"``: tensors of up to `SMALL_BYTES`, which kernels just before have written,
        and none of the larger ones: a call in a model.
    code : str
        Where the code is.  ``"warm"``: in the instruction caches of the SMs, as far as it fits, as when a kernel is
        repeated.  ``"l2"``: in the L2.  ``"cold"``: in DRAM, as when a model's other kernels and weights have come
        between.
    launch : str
        ``"graph"``: in a CUDA graph; ``"stream"``: launched one by one; ``"profiler"``: in a graph on an idle GPU, from
        the start of the first kernel to the end of the last one as a profiler (CUPTI) records them.
    follows : bool
        Whether the first launch follows a kernel that lets it start early, if it has the attribute for it
        (programmatic dependent launch).  Of the launches of a call, each follows the one before.
    """

    data: str = "cold"
    code: str = "warm"
    launch: str = "graph"
    follows: bool = False

    def __post_init__(self) -> None:
        known = {
            "data": ("cold", "activations", "warm"),
            "code": ("warm", "l2", "cold"),
            "launch": ("graph", "stream", "profiler"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")


ALONE = Conditions()


def time_launch(
    launch,
    registers: int,
    machine: Machine,
    total_bytes: int | None = None,
    timeline: bool = False,
    in_l2: Container[int] = frozenset(),
    setting: Setting | None = None,
) -> KernelTime:
    """Model one recorded launch.

    Parameters
    ----------
    launch : ptxsim launch
        Recorded with the options of `sampling`.
    registers : int
        Registers per thread.
    machine : Machine
    total_bytes : int, optional
        Bytes that the whole launch must move.  The SM gets a share of the DRAM bandwidth in proportion to its part of
        these bytes, so that an SM with more work is not slowed by idle ones.  Default: an equal share.
    timeline : bool
        Keep every wait of every warp, for `timeline.life_of`.
    in_l2 : container of int
        Numbers of the 128-byte lines of the record that the L2 holds when the launch starts: of data that an earlier
        launch left there, or that another SM reads as well.  Default: none but those of ``setting``.
    setting : Setting, optional
        What the launch meets.  Default: nothing in the L2, its code in the instruction caches.
    """
    setting = setting or Setting()
    if in_l2:
        setting = replace(setting, residency=setting.residency._replace(lines=in_l2))
    ctas = int(np.prod(launch.grid))
    active = min(machine.sms, ctas)
    shared = launch.smem_total - 1024
    resident = resident_ctas(machine, registers, shared, launch.block_threads)
    l2_rate = min(machine.l2_port, machine.l2_share * machine.sms / active)
    footprint = launch.trace.footprint
    of_gpu = machine.dram_rate_of(footprint.read, footprint.written, footprint.bulk)
    rate = of_gpu / active
    if total_bytes:
        mine = footprint.read + footprint.written
        rate = max(rate, min(machine.l2_port, of_gpu * mine / max(total_bytes, mine)))
    replay = Replay(
        launch.trace, lowered(launch.program, machine), machine, resident, rate, l2_rate, timeline, setting, active
    )
    timing = replay.run()
    name, grid, block = launch.program.kernel.name, tuple(launch.grid), tuple(launch.block)
    start = machine.cta_start
    return KernelTime(
        name, grid, block, registers, shared, resident, active, timing.clocks + start, timing, launch.trace
    )


def bytes_of(trace: Trace) -> int:
    """Return the bytes of the distinct sectors that the recorded CTAs read, plus those that they write."""
    return trace.footprint.read + trace.footprint.written


def time_call(
    run: Callable[[], object],
    machine: str | Machine = "H200",
    total_bytes: int | None = None,
    timeline: bool = False,
    conditions: Conditions = ALONE,
    codes: Mapping[str, MachineCode] | None = None,
) -> Modelled:
    """Model a call: emulate the CTAs of one SM, and replay them.

    Parameters
    ----------
    run : callable
        Makes the call on CPU tensors.  Only the CTAs of one SM run, so its results are incomplete.
    machine : str or Machine
        A name of ``gpumodel.MACHINES``, such as ``"H200"``, or a target.
    total_bytes : int, optional
        Bytes that the call must move.  Default: what its launches move.
    timeline : bool
        Keep every wait of every warp, for `timeline.life_of`.
    conditions : Conditions
        Caches, and the way of launching.
    codes : mapping, optional
        The machine code of kernels, by name.  Without it, spills are not seen, and the size of the code is estimated.
    """
    machine = machine_of(machine)
    return time_session(record(run, machine), machine, total_bytes, timeline, conditions, codes)


def time_session(
    session,
    machine: Machine,
    total_bytes: int | None = None,
    timeline: bool = False,
    conditions: Conditions = ALONE,
    codes: Mapping[str, MachineCode] | None = None,
) -> Modelled:
    """Model the launches of a session that was opened with the options of `sampling`; arguments as of `time_call`."""
    registers = resources(session)
    held = L2(session.launches, machine, conditions)
    kernels, us = [], 0.0
    for launch in session.launches:
        name = launch.program.kernel.name
        depends_until = 0.0
        follows = getattr(launch, "pdl", False) and (kernels or conditions.follows)
        if follows:
            depends_until = overlap(kernels[-1], launch, machine) if kernels else FOLLOWS
        setting = Setting(held.residency(launch), conditions.code, (codes or {}).get(name), depends_until)
        kernel = time_launch(launch, registers.get(name, REGISTERS), machine, total_bytes, timeline, setting=setting)
        kernels.append(kernel)
        us += machine.microseconds(kernel.clocks - min(depends_until, kernel.clocks))
        us += launch_us(machine, conditions, len(kernels) == 1, follows)
    if total_bytes is None:
        total_bytes = sum(bytes_of(kernel.trace) * kernel.active_sms for kernel in kernels)
    roof = machine.microseconds(total_bytes / machine.dram_rate)
    return Modelled(machine.name, us, kernels, total_bytes, roof, fitted=machine.fitted)


def launch_us(machine: Machine, conditions: Conditions, first: bool, follows: bool) -> float:
    """Return the microseconds of a launch itself; ``follows``: it starts early, behind the one before."""
    if first and conditions.launch == "profiler":
        return machine.profiler_us
    if follows:
        return machine.pdl_launch_us
    return machine.stream_launch_us if conditions.launch == "stream" else machine.launch_us


def overlap(before: KernelTime, launch, machine: Machine) -> float:
    """Return how many clocks of a dependent launch pass before the end of the kernel ``before``.

    It may start when all CTAs of that have executed ``griddepcontrol.launch_dependents``, or ended, and where one of
    its CTAs finds room beside them.
    """
    timing = before.timing
    threads = before.resident_ctas * int(np.prod(before.block)) + launch.block_threads
    shared = before.resident_ctas * (before.shared_bytes + machine.shared_per_cta) + launch.smem_total
    if threads > 32 * machine.max_warps or shared > machine.shared_bytes:
        return 0.0
    return timing.clocks - timing.triggers_at


class L2:
    """What the L2 holds of the arguments of a call's launches, under ``conditions``."""

    def __init__(self, launches, machine: Machine, conditions: Conditions):
        self.data, self.machine = conditions.data, machine
        touched = {}  # (first, last) address -> bytes
        for launch in launches:
            active = min(machine.sms, int(np.prod(launch.grid)))
            for region, held, _ in uses(launch.trace):
                size = min(region.end - region.base, held * active)
                touched[region[:2]] = max(touched.get(region[:2], 0), size)
        total = sum(touched.values())
        room = (machine.l2_bytes - total) / (machine.l2_bytes - machine.l2_near_bytes)
        self.share = min(1.0, max(0.0, room))
        self.near = total <= machine.l2_near_bytes
        self.found = []  # (first, last) addresses that earlier launches of the call have touched

    def residency(self, launch) -> Residency:
        """Return what a launch finds, the next one of the call."""
        ranges = []
        for region in map(Region._make, launch.trace.regions):
            small = region.end - region.base <= SMALL_BYTES
            earlier = any(first < region.end and region.base < last for first, last in self.found)
            if earlier or self.data == "warm" or (self.data == "activations" and small):
                ranges.append(region.lines)
        self.found += [region[:2] for region, _, _ in uses(launch.trace)]
        active, shared = min(self.machine.sms, int(np.prod(launch.grid))), []
        for region, _, read in uses(launch.trace):
            share = (region.end - region.base) / (read * active)
            if share < 1:
                together = getattr(launch, "together", {}).get(region.lines[0], 0.0)
                shared.append((*region.lines, share, min(1.0, share / together) if together else 1.0))
        return Residency(tuple(ranges) if self.share else (), self.share, self.near, shared=tuple(shared))


def uses(trace: Trace):
    """Yield the regions that the SM's CTAs touch, and the bytes of lines and of sectors that they touch there.

    Where a launch has a record of some of them, its ``scale`` says how many times as many CTAs the SM has.
    """
    scale = getattr(trace.launch, "scale", 1.0)
    for region in map(Region._make, trace.regions):
        first, last = region.lines
        mine = [use for use in trace.footprint.tensors.values() if use.first <= last and first <= use.last]
        if mine:
            touched = (sum(u.lines for u in mine) << LINE, sum(u.sectors for u in mine) << SECTOR)
            yield region, *(min(int(n * scale), last - first + 1 << LINE) for n in touched)


def is_steady(first: Modelled, second: Modelled, machine: Machine) -> bool:
    """Whether both calls fill the GPU, so that more work adds time in proportion.

    It is so if the grid is fixed and loops, or if every SM gets at least twice as many CTAs as are resident.
    """
    for small, large in zip(first.kernels, second.kernels):
        loops = small.grid == large.grid and small.active_sms == machine.sms
        if not loops and int(np.prod(small.grid)) < 2 * small.resident_ctas * machine.sms:
            return False
    return True

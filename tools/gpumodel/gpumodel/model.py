"""From recorded launches to microseconds: the CTAs of an SM, and its share of the memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np

import ptxsim

from .constants import MACHINES, Machine
from .lower import Lowering
from .replay import Replay, Timing
from .trace import BulkCopy, GlobalAccess, Trace

REGISTERS = 128  # of a kernel for which ptxas reported none
REPLAYED = (  # constants that only a replay reads: machines that differ in these alone share lowered code
    "barrier", "branch", "cta_interval", "cta_start", "dram_bytes", "dram_efficiency", "dram_latency", "l1_latency",
    "l2_latency", "l2_port", "l2_share", "launch_us", "lines_per_clock", "shared_latency", "store_latency",
)  # fmt: skip
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
    """Return a machine by name (``"H200"``, ``"B200"``) or by compile target (``"sm_90a"``, ``"sm_100a"``)."""
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


def time_launch(
    launch,
    registers: int,
    machine: Machine,
    total_bytes: int | None = None,
    timeline: bool = False,
    in_l2: Container[int] = frozenset(),
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
        Numbers of the 128-byte lines (addresses divided by 128) that the L2 holds when the launch starts: of data that
        an earlier launch left there, or that another SM reads as well.  Default: none.
    """
    ctas = int(np.prod(launch.grid))
    active = min(machine.sms, ctas)
    shared = launch.smem_total - 1024
    resident = resident_ctas(machine, registers, shared, launch.block_threads)
    rate = machine.dram_rate / active
    lowering = lowered(launch.program, machine)
    l2_rate = min(machine.l2_port, machine.l2_share * machine.sms / active)
    if total_bytes:
        mine = bytes_of(launch.trace)
        rate = max(rate, min(machine.l2_port, machine.dram_rate * mine / max(total_bytes, mine)))
    timing = Replay(launch.trace, lowering, machine, resident, rate, l2_rate, timeline, in_l2).run()
    name, grid, block = launch.program.kernel.name, tuple(launch.grid), tuple(launch.block)
    start = machine.cta_start
    return KernelTime(
        name, grid, block, registers, shared, resident, active, timing.clocks + start, timing, launch.trace
    )


def bytes_of(trace: Trace) -> int:
    """Return the bytes of the distinct sectors that the recorded CTAs read, plus those that they write."""
    read, written = {}, {}
    modes = {"read": (read,), "write": (written,), "atomic": (read, written)}
    for visits in trace.warps.values():
        for event in (event for visit in visits for events in visit.events.values() for event in events):
            if isinstance(event, GlobalAccess):
                mode = event.mode
            elif isinstance(event, BulkCopy):
                mode = "read" if event.load else "write"
            else:
                continue
            for into in modes[mode]:
                for line in event.lines:
                    into[line.number] = into.get(line.number, 0) | line.mask
    return 32 * sum(mask.bit_count() for into in (read, written) for mask in into.values())


def time_call(
    run: Callable[[], object], machine: str | Machine = "H200", total_bytes: int | None = None, timeline: bool = False
) -> Modelled:
    """Model a call: emulate the CTAs of one SM, and replay them.

    Parameters
    ----------
    run : callable
        Makes the call on CPU tensors.  Only the CTAs of one SM run, so its results are incomplete.
    machine : str or Machine
        ``"H200"``, ``"B200"``, or a target.
    total_bytes : int, optional
        Bytes that the call must move.  Default: what its launches move.
    timeline : bool
        Keep every wait of every warp, for `timeline.life_of`.
    """
    machine = machine_of(machine)
    return time_session(record(run, machine), machine, total_bytes, timeline)


def time_session(session, machine: Machine, total_bytes: int | None = None, timeline: bool = False) -> Modelled:
    """Model the launches of a session that was opened with the options of `sampling`."""
    registers = resources(session)
    kernels = [
        time_launch(launch, registers.get(launch.program.kernel.name, REGISTERS), machine, total_bytes, timeline)
        for launch in session.launches
    ]
    clocks = sum(kernel.clocks for kernel in kernels)
    if total_bytes is None:
        total_bytes = sum(bytes_of(kernel.trace) * kernel.active_sms for kernel in kernels)
    us = machine.microseconds(clocks) + machine.launch_us * len(kernels)
    roof = machine.microseconds(total_bytes / machine.dram_rate)
    return Modelled(machine.name, us, kernels, total_bytes, roof, fitted=machine.fitted)


def is_steady(first: Modelled, second: Modelled, machine: Machine) -> bool:
    """Whether both calls fill the GPU, so that more work adds time in proportion.

    It is so if the grid is fixed and loops, or if every SM gets at least twice as many CTAs as are resident.
    """
    for small, large in zip(first.kernels, second.kernels):
        loops = small.grid == large.grid and small.active_sms == machine.sms
        if not loops and int(np.prod(small.grid)) < 2 * small.resident_ctas * machine.sms:
            return False
    return True

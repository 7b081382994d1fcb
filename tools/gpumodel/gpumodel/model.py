"""From launches to microseconds: which CTAs an SM gets, what share of the memory it gets, and when a call is steady."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np

import ptxsim

from .constants import MACHINES, Machine
from .lower import Lowering
from .replay import Replay, Timing
from .trace import BulkCopy, GlobalAccess, Trace

REGISTERS = 128  # of a kernel for which ptxas reported none
_lowered: WeakKeyDictionary = WeakKeyDictionary()  # program -> {machine: Lowering}


@dataclass
class KernelTime:
    """The modelled run of one launch on the busiest SM."""

    name: str
    grid: tuple
    block: tuple
    registers: int
    shared_bytes: int
    places: int  # CTAs that fit an SM
    active_sms: int
    clocks: float
    timing: Timing
    trace: Trace = field(repr=False)

    @property
    def limits(self) -> dict[str, float]:
        """Clocks that each resource alone would need."""
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
    roof_us: float  # of a copy of as many bytes
    exact: bool = True  # False: extrapolated
    fitted: bool = False

    @property
    def of_roof(self) -> float:
        """Share of the copy's bandwidth that the call reaches."""
        return self.roof_us / self.us


def machine_of(name: str | Machine) -> Machine:
    """A machine by its name, ``"H200"`` or ``"B200"``, or by its target."""
    if isinstance(name, Machine):
        return name
    for machine in MACHINES.values():
        if name in (machine.name, machine.arch):
            return machine
    raise ValueError(f"machine: expected one of {', '.join(MACHINES)} or a target, got {name!r}")


def places(machine: Machine, registers: int, shared_bytes: int, threads: int) -> int:
    """CTAs that are resident on an SM together; ``shared_bytes`` without the reserved kilobyte."""
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 16) * 32 // machine.register_unit) * machine.register_unit
    by_registers = machine.registers // per_warp // warps
    by_shared = machine.shared_bytes // (shared_bytes + machine.shared_per_cta)
    return max(1, min(by_registers, by_shared, machine.max_warps // warps, machine.max_ctas))


def of_one_sm(machine: Machine) -> Callable:
    """Filter for ``ptxsim``: the CTAs that SM 0 gets if CTAs are dealt out in turn."""

    def pick(launch):
        if launch.cluster_size > 1:
            raise ValueError(f"clusters: expected launches without them, got {launch.cluster_size} CTAs per cluster")
        return np.arange(0, int(np.prod(launch.grid)), machine.sms)

    return pick


def record(run: Callable[[], object], machine: Machine):
    """Run a call in the emulator and return its session; each launch has a `Trace` of the CTAs of one SM."""
    with ptxsim.emulate(arch=machine.arch, **sampling(machine)) as session:
        run()
    return session


def sampling(machine: Machine) -> dict:
    """Options of the emulator to record the CTAs of one SM."""
    return {"trace": Trace, "ctas": of_one_sm(machine), "wave_lanes": None, "sm_count": machine.sms}


def resources(session) -> dict[str, int]:
    """Registers by kernel name."""
    return {kernel.name: kernel.registers for function in session.functions for kernel in function.kernels}


def time_launch(
    launch, registers: int, machine: Machine, total_bytes: int | None = None, timeline: bool = False
) -> KernelTime:
    """Replay one recorded launch on one SM.

    ``total_bytes``: what the whole launch must move.  The SM gets the share of the DRAM that it has of these bytes,
    so that uneven work does not idle the memory; without it, an equal share.
    """
    ctas = int(np.prod(launch.grid))
    active = min(machine.sms, ctas)
    shared = launch.smem_total - 1024
    resident = places(machine, registers, shared, launch.block_threads)
    rate = machine.dram_rate / active
    known = _lowered.setdefault(launch.program, {})
    if machine not in known:
        known[machine] = Lowering(launch.program, machine)
    l2_rate = min(machine.l2_port, machine.l2_share * machine.sms / active)
    if total_bytes:
        mine = bytes_of(launch.trace)
        rate = max(rate, min(machine.l2_port, machine.dram_rate * mine / max(total_bytes, mine)))
    timing = Replay(launch.trace, known[machine], machine, resident, rate, l2_rate, timeline).run()
    name, grid, block = launch.program.kernel.name, tuple(launch.grid), tuple(launch.block)
    start = machine.cta_start
    return KernelTime(
        name, grid, block, registers, shared, resident, active, timing.clocks + start, timing, launch.trace
    )


def bytes_of(trace: Trace) -> int:
    """Distinct sectors that the recorded CTAs read, and those that they write, in bytes."""
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
    """Model a call as it is: emulate the CTAs of one SM, replay them.

    Parameters
    ----------
    run : callable
        Makes the call, on CPU tensors that exist already.  Its results are those of one SM's CTAs only.
    machine : str or Machine
        ``"H200"``, ``"B200"``, or a target.
    total_bytes : int, optional
        Bytes that the call must move; default: what its launches moved.
    timeline : bool
        Keep every wait of every warp, for `timeline.life_of`.
    """
    machine = machine_of(machine)
    return time_session(record(run, machine), machine, total_bytes, timeline)


def time_session(session, machine: Machine, total_bytes: int | None = None, timeline: bool = False) -> Modelled:
    """Model the launches of a session whose options were those of `sampling`."""
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
    """Whether more work only makes SMs that are full take longer: a fixed grid loops, or places are taken twice."""
    for small, large in zip(first.kernels, second.kernels):
        loops = small.grid == large.grid and small.active_sms == machine.sms
        if not loops and int(np.prod(small.grid)) < 2 * small.places * machine.sms:
            return False
    return True

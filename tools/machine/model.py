"""From a call to microseconds: which CTAs an SM gets, what of the memory it gets, and how large calls are scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

import ptxsim
from cute_ssm import arch as archs
from cute_ssm import runtime, tuning, workloads
from cute_ssm.errors import describe

from .constants import MACHINES, Machine
from .lower import Lowering
from .replay import Replay, Timing
from .trace import Trace

EXACT_BYTES = 1 << 20  # that an SM moves and that are replayed; more are extrapolated
EXACT_TOKENS = 256  # of a sequence that are replayed, for operators that take long ones
SMALL = 1 << 24  # bytes of arguments that get values


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
            raise ValueError("clusters: expected none, got some; the model knows CTAs that share nothing")
        return np.arange(0, int(np.prod(launch.grid)), machine.sms)

    return pick


def record(run: Callable[[], object], machine: Machine, **config: int):
    """Run a call in the emulator and return its session; each launch has a `Trace` of the CTAs of one SM."""
    with ptxsim.emulate(arch=machine.arch, **sampling(machine)) as session, tuning.override(**config):
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
    lowering = launch.program.__dict__.setdefault("lowered", {}).get(machine)
    if lowering is None:
        lowering = launch.program.lowered[machine] = Lowering(launch.program, machine)
    l2_rate = min(machine.l2_port, machine.l2_share * machine.sms / active)
    if total_bytes:
        mine = bytes_of(launch.trace)
        rate = max(rate, min(machine.l2_port, machine.dram_rate * mine / max(total_bytes, mine)))
    timing = Replay(launch.trace, lowering, machine, resident, rate, l2_rate, timeline).run()
    name, grid, block = launch.program.kernel.name, tuple(launch.grid), tuple(launch.block)
    start = machine.cta_start
    return KernelTime(
        name, grid, block, registers, shared, resident, active, timing.clocks + start, timing, launch.trace
    )


def bytes_of(trace: Trace) -> int:
    """Distinct sectors that the recorded CTAs read, and those that they write, in bytes."""
    read, written = {}, {}
    for visits in trace.warps.values():
        for visit in visits:
            for events in visit.events.values():
                for what in events:
                    if what[0] == "global":
                        modes, lines = what[1], what[3]
                    elif what[0] == "copy":
                        modes, lines = "read" if what[5] else "write", what[3]
                    else:
                        continue
                    for into in (read,) if modes == "read" else (written,) if modes == "write" else (read, written):
                        for line, mask in lines:
                            into[line] = into.get(line, 0) | mask
    return 32 * sum(mask.bit_count() for into in (read, written) for mask in into.values())


def time_call(
    run: Callable[[], object], machine: str | Machine = "H200", total_bytes: int | None = None, timeline: bool = False,
    **config: int,
) -> Modelled:  # fmt: skip
    """Model a call as it is: emulate the CTAs of one SM, replay them.

    Parameters
    ----------
    run : callable
        Makes the call, on CPU tensors that exist already.  Its results are those of one SM's CTAs only.
    machine : str or Machine
        ``"H200"``, ``"B200"``, or a target.
    total_bytes : int, optional
        Bytes that the call must move (``floor_bytes`` of a `workloads.Call`); default: what its launches moved.
    timeline : bool
        Keep every wait of every warp.
    **config
        Fields of the config to override.
    """
    machine = machine_of(machine)
    return time_session(record(run, machine, **config), machine, total_bytes, timeline)


def time_session(session, machine: Machine, total_bytes: int | None = None, timeline: bool = False) -> Modelled:
    """Model the launches of a session whose options were those of `sampling`."""
    registers = resources(session)
    kernels = [
        time_launch(launch, registers.get(launch.program.kernel.name, 128), machine, total_bytes, timeline)
        for launch in session.launches
    ]
    clocks = sum(kernel.clocks for kernel in kernels)
    if total_bytes is None:
        total_bytes = sum(bytes_of(kernel.trace) * kernel.active_sms for kernel in kernels)
    us = machine.microseconds(clocks) + machine.launch_us * len(kernels)
    roof = machine.microseconds(total_bytes / machine.dram_rate)
    return Modelled(machine.name, us, kernels, total_bytes, roof, fitted=machine.fitted)


def arguments(op: str, keys: Mapping[str, int | str], seed: int = 0):
    """A declared call whose small arguments are random; states, which decide about no branch, stay as they are."""
    call = workloads.build(op, keys, fill=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in call.arguments.items():
        small = isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() * value.itemsize < SMALL
        if small and name not in call.written and value.itemsize > 1:
            stored = value.as_strided([n if s else 1 for n, s in zip(value.shape, value.stride())], value.stride())
            values = torch.randn(stored.shape, generator=generator)
            stored.copy_(-values.abs() if name == "A" else values)
    return call


def chosen(op: str, keys: Mapping[str, int | str], machine: Machine) -> dict[str, int]:
    """Fields of the configs that a call would get on a machine."""
    call = workloads.build(op, keys, fill=False)
    with runtime.planned(archs.by_name(machine.arch), machine.sms) as plan:
        call.run()
    return {name: value for _, config, _ in plan.kernels for name, value in dataclasses.asdict(config).items()}


def replayed(
    op: str, keys: Mapping[str, int | str], machine: Machine, config: Mapping[str, int], exact: int = EXACT_BYTES
):
    """A declared call, or the largest that is replayed whole, and the config fields that the declared one would get."""
    key, batch = requests(op, keys)
    large = largest(op, keys, machine, exact)
    if batch <= large:
        return arguments(op, keys), dict(config)
    with tuning.override(**config):
        fields = chosen(op, keys, machine)
    return arguments(op, {**keys, key: large}), fields


def requests(op: str, keys: Mapping[str, int | str]) -> tuple[str, int]:
    """The parameter that holds a call's number of requests, and that number."""
    key = workloads.batch_key(op)
    value = keys.get(key, workloads.parameters(op)[key])
    try:
        return key, int(value)
    except ValueError:
        raise ValueError(describe(key, "a number of requests", repr(value))) from None


def largest(op: str, keys: Mapping[str, int | str], machine: Machine, exact: int = EXACT_BYTES) -> int:
    """Requests of the largest call that is replayed whole."""
    one, two = (floor_bytes(op, keys, size) for size in (1, 2))
    return max(2, int(exact * machine.sms / (two - one)))


def floor_bytes(op: str, keys: Mapping[str, int | str], size: int) -> int:
    """Bytes that a call with ``size`` requests must move."""
    return workloads.build(op, {**keys, workloads.batch_key(op): size}, fill=False).floor_bytes


def time_op(
    op: str, keys: Mapping[str, int | str], machine: str | Machine = "H200", config: Mapping[str, int] | None = None,
    exact: int = EXACT_BYTES,
) -> Modelled:  # fmt: skip
    """Model a declared call of any size.

    Parameters
    ----------
    op, keys
        As for `cute_ssm.workloads.build`.
    machine : str or Machine
        As for `time_call`.
    config : mapping, optional
        Fields of the config to override.
    exact : int
        Bytes per SM up to which a call is replayed whole.  A larger one is in its steady state: with its config, calls
        with as many requests as make ``exact`` bytes per SM and half of them are replayed, and their times continued in
        a straight line, though never below the roof.  ``exact`` is doubled until both fill the GPU.
        Of operators on long sequences, `EXACT_TOKENS` tokens and half of them are replayed, likewise.
    """
    machine = machine_of(machine)
    long = int(keys.get("length", workloads.parameters(op).get("length", 0)))
    if long > EXACT_TOKENS:
        return _continued(op, keys, machine, config or {}, exact, long)

    def at(size, limit):
        call, fields = replayed(op, keys, machine, config or {}, limit)
        if size is not None:
            call = arguments(op, {**keys, workloads.batch_key(op): size})
        return time_call(call.run, machine, call.floor_bytes, **fields)

    return scaled(at, op, keys, machine, exact)


def _continued(
    op: str, keys: Mapping[str, int | str], machine: Machine, config: Mapping[str, int], exact: int, long: int
) -> Modelled:
    """Model a call on long sequences from shorter ones: tokens are a loop."""
    with tuning.override(**config):
        fields = chosen(op, keys, machine)
    half, whole = (
        time_op(op, {**keys, "length": length}, machine, fields, exact) for length in (EXACT_TOKENS // 2, EXACT_TOKENS)
    )
    total = floor_bytes(op, keys, requests(op, keys)[1])
    roof = machine.microseconds(total / machine.dram_rate)
    us = whole.us + (whole.us - half.us) / (EXACT_TOKENS // 2) * (long - EXACT_TOKENS)
    return dataclasses.replace(whole, us=max(us, roof), bytes=total, roof_us=roof, exact=False)


def scaled(
    at: Callable[[int | None, int], Modelled], op: str, keys: Mapping[str, int | str], machine: Machine,
    exact: int = EXACT_BYTES,
) -> Modelled:  # fmt: skip
    """Model a call of any size from calls that are replayed whole.

    ``at(size, limit)`` models the call with ``size`` requests; or, if that is None, as many as it has or make ``limit``
    bytes per SM, whichever is less.
    """
    batch = requests(op, keys)[1]
    while True:
        large = largest(op, keys, machine, exact)
        second = at(None, exact)
        if batch <= large:
            return second
        small = large // 2
        first = at(small, exact)
        if is_steady(first, second, machine):
            break
        exact *= 2
    total = floor_bytes(op, keys, batch)
    roof = machine.microseconds(total / machine.dram_rate)
    copied = roof * (batch - large) / batch
    us = second.us + max((second.us - first.us) / (large - small) * (batch - large), copied)
    return dataclasses.replace(second, us=max(us, roof), bytes=total, roof_us=roof, exact=False)


def is_steady(first: Modelled, second: Modelled, machine: Machine) -> bool:
    """Whether more work only makes SMs that are full take longer: a fixed grid loops, or places are taken twice."""
    for small, large in zip(first.kernels, second.kernels):
        loops = small.grid == large.grid and small.active_sms == machine.sms
        if not loops and int(np.prod(small.grid)) < 2 * small.places * machine.sms:
            return False
    return True

"""Modelled times of points: recorded once, replayed for every set of constants that is tried."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import ptxsim

from ..constants import MACHINES, Machine
from ..fit import Observation
from ..model import Conditions, KernelTime, launch_us, resident_ctas, time_session
from .kernels import KERNELS, Call
from .points import Point
from .recordings import Cache, RecordedLaunch, Recording, options, recording_of

HELD = 120  # recordings in memory
LAUNCHES = ("launch_us", "stream_launch_us", "profiler_us", "pdl_launch_us")


class Library:
    """The recordings of points: from a cache, or made when they are first needed.

    Parameters
    ----------
    peers : Path
        Folder of the packages that the kernels come from.
    cache : Path
        Folder of recordings.
    """

    def __init__(self, peers: Path, cache: Path):
        self.peers, self.cache = peers, Cache(cache)
        self.held: OrderedDict[str, Recording] = OrderedDict()
        self.replayed: dict[tuple[str, Conditions, Machine], float] = {}

    def recording(self, point: Point) -> Recording:
        """Return a point's recording."""
        key = point.recorded
        name = str(self.cache.path(key))
        if name not in self.held:
            found = self.cache.get(key)
            if found is None:
                call = KERNELS[point.kernel].make(self.peers, point.keys)
                found = recorded(call, MACHINES[point.gpu])
                self.cache.put(key, found)
            self.held[name] = found
            while len(self.held) > HELD:
                self.held.popitem(last=False)
        return self.held[name]

    def modelled(self, point: Point, machine: Machine) -> float:
        """Return modelled microseconds of a point.  Machines that differ in their launches alone share a replay."""
        recording, bare = self.recording(point), replace(machine, **dict.fromkeys(LAUNCHES, 0.0))
        key = (str(self.cache.path(point.recorded)), point.conditions, bare)
        if key not in self.replayed:
            self.replayed[key] = time_of(recording, bare, point)
        launches = [launch.pdl and (i > 0 or point.conditions.follows) for i, launch in enumerate(recording.launches)]
        return self.replayed[key] + sum(
            launch_us(machine, point.conditions, i == 0, follows) for i, follows in enumerate(launches)
        )

    def observation(self, point: Point) -> Observation:
        """Return a point as `gpumodel.fit.fit` takes it."""
        return Observation(
            point.name, point.us, lambda machine: self.modelled(point, machine), point.gpu, point.source, point.half
        )


def recorded(call: Call, machine: Machine) -> Recording:
    """Record a call."""
    chosen = options(machine.sms, call.whole)
    if call.language == "CuTe DSL":
        with ptxsim.emulate(arch=machine.arch, **chosen) as session:
            call.run()
        return recording_of(session, machine.sms)
    from ptxsim.triton_hook import emulate_triton

    from .packages import on_cpu

    digits = int("".join(c for c in machine.arch if c.isdigit()))
    with on_cpu(), emulate_triton(arch=digits, **chosen) as session:
        call.run()
    return recording_of(session, machine.sms)


def time_of(recording: Recording, machine: Machine, point: Point) -> float:
    """Return modelled microseconds.

    Of a launch with more CTAs than were recorded, whole waves of the record are replayed, and the others follow at the
    `pace` of these.
    """
    waves = [whole_waves(launch, machine) for launch in recording.launches]
    replayed = [launch.first(ctas) for launch, (ctas, _) in zip(recording.launches, waves)]
    codes = {launch.name: launch.code for launch in replayed}
    modelled = time_session(Recording(replayed), machine, conditions=point.conditions, codes=codes)
    us = modelled.us
    for launch, (ctas, resident), kernel in zip(recording.launches, waves, modelled.kernels):
        if ctas < launch.all_ctas:
            us += machine.microseconds(pace(kernel, resident)) * (launch.all_ctas - ctas)
    return us


def pace(kernel: KernelTime, resident: int) -> float:
    """Return the clocks from CTA to CTA: by the mean starts of the last wave and of one before, or what memory needs.

    Ends of a launch depend on its last CTAs alone, and differ more between records of nearly the same length.  Writes
    delay no start, but queue.
    """
    per_cta = kernel.trace.warps_per_cta
    starts: dict[int, float] = {}
    for warp, (first, _) in kernel.timing.lives.items():
        starts[warp // per_cta] = min(first, starts.get(warp // per_cta, first))
    ordered = sorted(starts.values())
    last = len(ordered) // resident - 1
    before = last // 2
    early, late = (fmean(ordered[wave * resident : (wave + 1) * resident]) for wave in (before, last))
    busy = max(kernel.timing.dram_busy, kernel.timing.port_busy) / len(ordered)
    return max(busy, (late - early) / ((last - before) * resident))


def whole_waves(launch: RecordedLaunch, machine: Machine) -> tuple[int, int]:
    """Return how many CTAs to replay, and how many of them are resident."""
    resident = resident_ctas(machine, launch.registers, launch.smem_total - 1024, launch.block_threads)
    if launch.ctas == launch.all_ctas:
        return launch.ctas, resident
    waves = launch.ctas // resident
    if waves < 2:
        raise ValueError(f"{launch.name}: {launch.ctas} CTAs of an SM are recorded, but {resident} are resident")
    return waves * resident, resident

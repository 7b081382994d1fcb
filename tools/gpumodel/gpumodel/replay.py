"""Replay recorded warps on a model of one SM.

Each of four schedulers issues one instruction per clock.  A warp issues its next instruction, in order, when its
operands are ready, its scheduler and pipe are free, and the mbarrier, barrier or copies that it waits for are
complete.  Shared memory serves one wavefront per clock.  A request to global memory is served by L1, L2 or DRAM
(`memory`); bulk copies also pass through a copy engine, and those that several lanes issue by one instruction are
issued one after the other.  mbarriers count arrivals and bytes as in hardware.  A CTA starts when another one ends, and
not before the dispatcher gets to it.  Instructions are fetched through caches (`code`).

Not modelled: register banks, replays of loads, TLB, partition and channel conflicts, clusters.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from .code import CodeCache, MachineCode
from .constants import Machine
from .memory import NOTHING, Memory, Residency
from .trace import GlobalAccess, SharedAccess

INF = math.inf


class Flight(NamedTuple):
    """A load or copy on its way to the SM: requested at ``start``, complete at ``end``."""

    start: float
    end: float
    n_bytes: int
    tensor: str
    cta: int


class Wait(NamedTuple):
    """An interval in which a warp did not issue."""

    warp: int
    start: float
    end: float
    reason: str


@dataclass
class Mbarrier:
    """A mbarrier in shared memory: arrivals and bytes that its phase still expects, and the warps that wait for it."""

    expected: int  # arrivals of a phase
    pending: int  # of the current one
    tx_bytes: int = 0
    phase: int = 0
    waiting: list[Warp] = field(default_factory=list)


@dataclass
class Barrier:
    """A named barrier of a CTA: ``threads`` is None for all threads."""

    threads: int | None
    arrived: int = 0
    waiting: list[Warp] = field(default_factory=list)


@dataclass
class Timing:
    """The result of a replay, in clocks of one SM."""

    clocks: float = 0.0
    slots: float = 0  # issued
    dram_read: int = 0  # bytes
    dram_write: int = 0
    l2_read: int = 0
    dram_busy: float = 0.0  # clocks of the queue of DRAM, and of the port to the L2
    port_busy: float = 0.0
    shared: int = 0  # wavefronts
    tensor: float = 0.0  # clocks of one sub-partition's pipe, summed
    ctas: int = 0
    triggers_at: float | None = None  # when all CTAs had let the next kernel start, by griddepcontrol or their end
    stalls: Counter[tuple[int, str]] = field(default_factory=Counter)  # (warp of the CTA, reason) -> clocks
    lives: dict[int, tuple[float, float]] = field(default_factory=dict)  # warp -> (first clock, last clock)
    flights: list[Flight] = field(default_factory=list)  # of loads and copies to the SM
    waits: list[Wait] | None = None  # with timeline=True

    def bytes_in_flight(self, tensors=None) -> float:
        """Mean over the run of the bytes on their way to the SM, of ``tensors`` or of all."""
        mine = [flight for flight in self.flights if tensors is None or flight.tensor in tensors]
        total = sum((flight.end - flight.start) * flight.n_bytes for flight in mine)
        return total / self.clocks if self.clocks else 0.0


class Warp:
    """A warp: its position in its record, and its scoreboard."""

    __slots__ = (
        "at", "blocked", "bulk", "bulk_open", "cause", "copies", "cta", "events", "first", "groups", "home", "index",
        "ops", "ready", "since", "stop", "visit", "visits", "wait", "wgmma", "why", "written",
    )  # fmt: skip

    def __init__(self, index, cta, visits, registers):
        self.index, self.cta, self.visits = index, cta, visits
        self.visit, self.at, self.ops, self.events = 0, 0, (), {}
        self.ready, self.why = [0.0] * registers, [""] * registers
        self.since, self.cause, self.blocked, self.wait = 0.0, "", 0.0, None
        self.copies, self.groups = [], []  # arrivals of cp.async: open group, committed groups
        self.bulk_open, self.bulk = [], []  # (source read, written) of bulk stores
        self.wgmma = self.written = 0.0  # until its products, its writes are complete
        self.stop = -1  # end of the block that it ran last


@dataclass(frozen=True)
class Setting:
    """What a launch meets.

    ``residency``: the L2; ``code``: where its code is, see `CodeCache`; ``machine_code``: that, if it is known;
    ``depends_until``: when ``griddepcontrol.wait`` returns, at the earliest.
    """

    residency: Residency = NOTHING
    code: str = "warm"
    machine_code: MachineCode | None = None
    depends_until: float = 0.0


ALONE = Setting()


class Replay:
    """One of ``active`` SMs, with ``resident`` CTAs at a time, ``dram_rate`` and ``l2_rate`` bytes per clock."""

    def __init__(
        self, trace, lowering, machine: Machine, resident, dram_rate, l2_rate, timeline=False, setting=ALONE, active=1
    ):
        self.trace, self.lowering, self.machine = trace, lowering, machine
        self.resident = resident
        self.timing = Timing(waits=[] if timeline else None)
        count = machine.schedulers
        self.pending, self.free = [[] for _ in range(count)], [0.0] * count
        self.load = [0] * count
        self.pipes = [defaultdict(float) for _ in range(count)]
        self.lsu = self.tma = 0.0
        self.events, self.number = [], 0
        launch = trace.launch
        l1_size = max(machine.l1_bytes - resident * launch.smem_total, 8192)
        self.memory = Memory(machine, self.timing, dram_rate, l2_rate, l1_size, setting.residency)
        self.depends_until = setting.depends_until
        machine_code = setting.machine_code
        self.code = CodeCache(machine, lowering.block_bytes(machine_code), setting.code)
        self.spills = machine_code.spill_share if machine_code else 0.0
        self.growth = lowering.growth(machine_code)
        lowering.follow(machine_code)
        threads = launch.block_threads
        self.cta_interval = machine.cta_ns * machine.ghz * active * (1 + machine.cta_threads * (threads - 32) / 992)
        self.dispatched = 0.0  # when the next CTA of this SM may start
        self.mbarriers, self.cells = {}, {}
        self.barriers = {}
        self.warps_per_cta = trace.warps_per_cta
        self.threads = launch.block_threads
        self.alive = {}  # CTA -> warps not done
        self.triggers = {}  # CTA -> when its last warp let the next kernel start
        self.last = 0.0

    # ------------------------------------------------------------ the clock
    def run(self) -> Timing:
        """Replay the whole record."""
        by_cta = defaultdict(list)
        for warp in sorted(self.trace.warps):
            by_cta[warp // self.warps_per_cta].append(warp)
        self.queue = sorted(by_cta.items(), reverse=True)
        self.timing.ctas = len(by_cta)
        for _ in range(min(self.resident, len(self.queue))):
            self.dispatch(0.0)
        pending, free, events = self.pending, self.free, self.events
        schedulers = range(len(free))
        while True:
            when, which = INF, -1
            for s in schedulers:
                if pending[s]:
                    t = pending[s][0][0]
                    if t < free[s]:
                        t = free[s]
                    if t < when:
                        when, which = t, s
            if events and events[0][0] <= when:
                t, _, action, arguments = heappop(events)
                action(t, *arguments)
                continue
            if which < 0:
                break
            ready, _, warp = heappop(pending[which])
            self.issue(warp, which, when, ready)
        stuck = [(w.index, w.cause) for warps in self.alive.values() for w in warps]
        if stuck:
            raise RuntimeError(f"warps that wait for ever: {stuck[:8]}; the record lacks events of these CTAs")
        self.timing.clocks = max(self.last, self.memory.dram)
        ends = {}
        for warp, (_, end) in self.timing.lives.items():
            cta = warp // self.warps_per_cta
            ends[cta] = max(ends.get(cta, 0.0), end)
        self.timing.triggers_at = max(self.triggers.get(cta, end) for cta, end in ends.items())
        return self.timing

    def at(self, t, action, *arguments):
        """Call ``action(t, ...)`` at ``t``."""
        self.number += 1
        heappush(self.events, (t, self.number, action, arguments))

    def dispatch(self, t):
        """Start the next CTA at ``t``, or when the dispatcher gets to it."""
        start = max(t, self.dispatched)
        self.dispatched = start + self.cta_interval
        self.at(start, self.start_cta, *self.queue.pop())

    def start_cta(self, t, cta, indices):
        registers = len(self.lowering.names)
        warps = self.alive[cta] = []
        for index in indices:
            warp = Warp(index, cta, self.trace.warps[index], registers)
            warp.home = min(range(len(self.load)), key=self.load.__getitem__)
            self.load[warp.home] += 1
            warp.first = t
            warps.append(warp)
        self.barriers[cta] = {}
        for warp in tuple(warps):
            self.advance(warp, t)

    def finish(self, warp, t):
        self.load[warp.home] -= 1
        self.timing.lives[warp.index] = (warp.first, t)
        self.last = max(self.last, t)
        warps = self.alive[warp.cta]
        warps.remove(warp)
        for number in list(self.barriers[warp.cta]):
            self.release_barrier(warp.cta, number, t)
        if not warps:
            del self.alive[warp.cta]
            if self.queue:
                self.dispatch(t + self.machine.cta_start)

    # ------------------------------------------------------------ warps
    def advance(self, warp, t):
        """Move the warp to the next instruction that takes an issue slot, and queue it until its operands are ready."""
        ready, why = warp.ready, warp.why
        while True:
            while warp.at >= len(warp.ops):
                if warp.visit >= len(warp.visits):
                    self.finish(warp, t)
                    return
                t = self.enter(warp, t)
            op = warp.ops[warp.at]
            when, cause = t, ""
            for r in op.sources:
                if ready[r] > when:
                    when, cause = ready[r], why[r]
            if op.slots:
                break
            for r in op.results:
                ready[r], why[r] = when, cause
            warp.at += 1
        warp.since, warp.cause = t, cause
        self.number += 1
        heappush(self.pending[warp.home], (when, self.number, warp))

    def enter(self, warp, t):
        """Bring the warp to its next basic block of the machine code, and return when it may run."""
        first, last = warp.visit, self.lowering.joined(warp.visits, warp.visit)
        visits = warp.visits[first : last + 1]
        warp.ops, warp.at = self.lowering.block(visits[0].block, visits[-1].stop), 0
        warp.events = visits[0].events if first == last else {pc: e for v in visits for pc, e in v.events.items()}
        warp.visit = last + 1
        for visit in visits:
            if self.code.needed:
                fetched = self.code.enter(warp.home, visit.block.pc, visit.block.pc == warp.stop, t)
                warp.stop = visit.stop
                if fetched > t:
                    self.stall(warp, t, fetched, "instruction cache")
                    t = fetched
            if self.spills:
                self.lsu = max(self.lsu, t) + self.spills * self.lowering.slots(visit.block, visit.stop)
        return t

    def issue(self, warp, s, t, ready):
        """Issue the warp's next instruction at ``t`` on scheduler ``s``."""
        op = warp.ops[warp.at]
        pipe = self.pipes[s]
        if op.occupancy and op.pipe != "lsu":
            name = op.pipe
            if pipe[name] > t:
                if op.other and pipe[op.other] < pipe[name]:
                    name = op.other
                if pipe[name] > t:
                    self.number += 1
                    if not warp.cause or ready <= warp.since:
                        warp.cause = name + " pipe"
                    heappush(self.pending[s], (pipe[name], self.number, warp))
                    return
            pipe[name] = t + op.occupancy
            if name == "tensor":
                self.timing.tensor += op.occupancy
        elif op.pipe == "lsu" and self.lsu > t + 32:  # its queue is full
            self.number += 1
            warp.cause = "load/store unit busy"
            heappush(self.pending[s], (self.lsu - 32, self.number, warp))
            return
        if t > warp.since:
            waited = max(warp.since, min(t, ready))
            self.stall(warp, warp.since, waited, warp.cause or "issue")
            self.stall(warp, waited, t, "issue" if "pipe" not in warp.cause else warp.cause)
        self.free[s] = t + op.slots * self.growth
        self.timing.slots += op.slots * self.growth
        warp.at += 1
        if op.kind == "math":
            done = t + op.slots - 1 + op.latency
            if op.pipe == "lsu":
                self.lsu = max(self.lsu, t) + 1
            cause = op.pipe
            for r in op.results:
                warp.ready[r], warp.why[r] = done, cause
            self.advance(warp, t + op.slots)
        else:
            getattr(self, "do_" + op.kind.replace(" ", "_"))(warp, op, t)

    def stall(self, warp, start, end, reason):
        if end > start:
            self.timing.stalls[warp.index % self.warps_per_cta, reason] += end - start
            if self.timing.waits is not None:
                self.timing.waits.append(Wait(warp.index, start, end, reason))

    def block(self, warp, t, cause):
        warp.blocked, warp.cause = t, cause

    def unblock(self, warp, t):
        self.stall(warp, warp.blocked, t, warp.cause)
        self.advance(warp, t)

    def result(self, warp, op, done, cause):
        for r in op.results:
            warp.ready[r], warp.why[r] = done, cause

    # ------------------------------------------------------------ memory
    def do_memory(self, warp, op, t):
        """ld, st, atom, red, cp.async."""
        machine, payloads = self.machine, warp.events.get(op.pc)
        done, cause = t + 4, "alu"
        copied = None
        if payloads is None:
            if op.space == "local":
                self.lsu = max(self.lsu, t) + 1
                done, cause = t + machine.l1_latency, "local memory"
        else:
            for event in payloads:
                if isinstance(event, SharedAccess):
                    start = max(self.lsu, t)
                    self.lsu = start + event.wavefronts
                    self.timing.shared += event.wavefronts
                    done, cause = max(done, self.lsu - 1 + machine.shared_latency), "shared memory"
                elif isinstance(event, GlobalAccess):
                    mode, tensor, lines = event
                    n_bytes = sum(line.bytes for line in lines)
                    self.lsu = max(self.lsu, t) + max(len(lines) / machine.lines_per_clock, n_bytes / 128)
                    if mode != "read":
                        warp.written = max(warp.written, self.memory.write(t, lines))
                    if mode == "write":
                        continue
                    queued = machine.load_queue
                    if mode == "atomic":
                        arrival = self.memory.from_l2(t, 32 * len(lines), queued)
                    else:
                        cached = not op.text.startswith("cp.async.cg")
                        arrival = self.memory.read(t, lines, cached, queued)
                    if arrival - t > machine.l1_latency + 1:
                        self.timing.flights.append(Flight(t, arrival, n_bytes, tensor, warp.cta))
                    copied, done, cause = arrival, max(done, arrival), f"load of {tensor}"
        if op.text.startswith("cp."):
            if copied is not None:
                warp.copies.append(copied)
        else:
            self.result(warp, op, done, cause)
        self.advance(warp, t + 1)

    def do_matrix(self, warp, op, t):
        wavefronts = sum(event.wavefronts for event in warp.events.get(op.pc, ()))
        self.lsu = max(self.lsu, t) + wavefronts
        self.timing.shared += wavefronts
        self.result(warp, op, self.lsu - 1 + self.machine.matrix_latency, "shared memory")
        self.advance(warp, t + 1)

    def do_bulk(self, warp, op, t):
        """Bulk copies, linear or by tensor map: the lanes that issue one do so one after the other, in a loop."""
        copies = warp.events.get(op.pc, ())
        if not copies:
            self.advance(warp, t + 1)
            return
        trip = max(self.machine.bulk_slots, self.machine.bulk_trip)
        self.bulk_copy(t, warp, copies[0])
        for i, copy in enumerate(copies[1:], 1):
            self.at(t + i * trip, self.bulk_copy, warp, copy)
        self.at(t + len(copies) * trip, self.advance_at, warp)

    def advance_at(self, t, warp):
        self.advance(warp, t)

    def bulk_copy(self, t, warp, copy):
        """Issue the bulk copy of one lane."""
        machine, memory = self.machine, self.memory
        self.free[warp.home] = max(self.free[warp.home], t) + machine.bulk_slots - 1
        self.timing.slots += machine.bulk_slots - 1
        start = max(self.tma, t)
        self.tma = start + max(machine.tma_copy, copy.n_bytes / machine.tma_rate)
        if copy.load:
            done = memory.read(start, copy.lines, cached=False) + machine.tma_latency
            self.timing.flights.append(Flight(t, done, copy.n_bytes, copy.tensor, warp.cta))
            if copy.cell is not None:
                self.cells.setdefault(copy.cell, set()).add(copy.tensor)
                self.at(done, self.act, ((copy.cell, 0, -copy.n_bytes),))
        else:
            read = start + machine.shared_read_latency + copy.n_bytes / machine.tma_rate
            warp.bulk_open.append((read, memory.write(read, copy.lines)))

    # ------------------------------------------------------------ groups of copies
    def do_commit(self, warp, op, t):
        warp.groups.append(max(warp.copies, default=t))
        warp.copies = []
        self.advance(warp, t + 1)

    def do_wait(self, warp, op, t):
        closed = warp.groups[: len(warp.groups) - op.amount] if op.amount else warp.groups
        self.pause(warp, t, max(closed, default=t), "cp.async")
        del warp.groups[: len(closed)]

    def do_wait_all(self, warp, op, t):
        until = max([*warp.groups, *warp.copies], default=t)
        warp.groups, warp.copies = [], []
        self.pause(warp, t, until, "cp.async")

    def do_bulk_commit(self, warp, op, t):
        if warp.bulk_open:
            warp.bulk.append(tuple(max(times) for times in zip(*warp.bulk_open)))
        elif warp.bulk:
            warp.bulk.append((t, t))
        warp.bulk_open = []
        self.advance(warp, t + 1)

    def do_bulk_wait_read(self, warp, op, t):
        closed = warp.bulk[: len(warp.bulk) - op.amount] if op.amount else warp.bulk
        self.pause(warp, t, max((read for read, _ in closed), default=t), "bulk store")

    def do_bulk_wait(self, warp, op, t):
        closed = warp.bulk[: len(warp.bulk) - op.amount] if op.amount else warp.bulk
        self.pause(warp, t, max((written for _, written in closed), default=t), "bulk store")

    def pause(self, warp, t, until, cause):
        """Continue at ``until``, at the earliest in the next clock."""
        if until > t + 1:
            self.stall(warp, t, until, cause)
        self.advance(warp, max(t + 1, until))

    # ------------------------------------------------------------ synchronisation
    def do_mbarrier(self, warp, op, t):
        acts, waits = {}, []
        for kind, entries in warp.events.get(op.pc, ()):
            if kind == "wait":
                waits += entries
            elif kind == "init":
                for cell, count in entries:
                    self.mbarriers[cell] = Mbarrier(count, count)
            elif kind.startswith("arrive after"):
                until = max([*warp.groups, *warp.copies], default=t)
                for cell, count in entries:
                    if kind.endswith("expected"):
                        self.mbarriers[cell].pending += count
                    self.at(max(until, t), self.act, ((cell, count, 0),))
            else:
                for cell, value in entries:
                    arrivals, tx = acts.get(cell, (0, 0))
                    acts[cell] = (arrivals + value, tx) if kind == "arrive" else (arrivals, tx + value)
        if waits:
            warp.wait = waits
            self.block(warp, t, "")
            self.try_wait(t, warp, self.machine.mbarrier_wait)
            return
        self.lsu = max(self.lsu, t) + 1
        if acts:
            self.act(t, tuple((cell, *both) for cell, both in acts.items()))
        self.result(warp, op, t + self.machine.mbarrier_wait, "mbarrier")
        self.advance(warp, t + 1)

    def try_wait(self, t, warp, latency):
        """Continue if all phases that the warp waits for are complete."""
        for cell, parity in warp.wait:
            barrier = self.mbarriers[cell]
            if barrier.phase == parity:
                tensors = self.cells.get(cell)
                warp.cause = "copy of " + ", ".join(sorted(tensors)) if tensors else "mbarrier"
                barrier.waiting.append(warp)
                return
        if not warp.cause:
            warp.cause = "mbarrier"
        self.stall(warp, warp.blocked, t, warp.cause)
        op = warp.ops[warp.at - 1]
        self.result(warp, op, t + latency, "mbarrier")
        self.advance(warp, t + 1)

    def act(self, t, acts):
        """Apply arrivals and bytes to mbarriers; a completed phase releases the warps that wait for it."""
        for cell, arrivals, tx in acts:
            barrier = self.mbarriers[cell]
            barrier.pending -= arrivals
            barrier.tx_bytes += tx
            if barrier.pending == 0 and barrier.tx_bytes == 0:
                barrier.pending, barrier.phase = barrier.expected, barrier.phase ^ 1
                released, barrier.waiting = barrier.waiting, []
                for warp in released:
                    self.at(t + self.machine.mbarrier_wake, self.try_wait, warp, 1)

    def do_barrier(self, warp, op, t):
        payloads = warp.events.get(op.pc, ())
        if not payloads:  # cluster barriers, and predicated ones
            self.advance(warp, t + 1)
            return
        for use in payloads:
            barrier = self.barriers[warp.cta].setdefault(use.number, Barrier(use.threads))
            barrier.arrived += 32 if use.threads is not None or use.lanes == 32 else use.lanes
            if use.waits:
                self.block(warp, t, f"barrier {use.number}")
                barrier.waiting.append(warp)
            self.release_barrier(warp.cta, use.number, t)
        if not any(use.waits for use in payloads):
            self.advance(warp, t + 1)

    def release_barrier(self, cta, number, t):
        barrier = self.barriers[cta][number]
        threads = barrier.threads
        if threads is None:
            threads = sum(self.lanes(warp) for warp in self.alive[cta])
        if barrier.arrived and barrier.arrived >= threads:
            del self.barriers[cta][number]
            machine = self.machine
            latency = machine.barrier + machine.barrier_warp * (threads // 32)
            for warp in barrier.waiting:
                self.at(t + latency, self.released, warp)

    def released(self, t, warp):
        op = warp.ops[warp.at - 1]
        self.result(warp, op, t, "barrier")
        self.unblock(warp, t)

    def lanes(self, warp):
        """Return the threads of a warp; the last warp of a CTA may have fewer than 32."""
        return min(32, self.threads - 32 * (warp.index % self.warps_per_cta))

    def do_warp_barrier(self, warp, op, t):
        self.pause(warp, t, t + self.machine.warp_barrier, "warp barrier")

    def do_fence(self, warp, op, t):
        self.pause(warp, t, t + self.machine.fence, "fence")

    def do_far_fence(self, warp, op, t):
        self.pause(warp, t, max(t + self.machine.gpu_fence, warp.written), "fence")

    def do_dependency_wait(self, warp, op, t):
        self.pause(warp, t, self.depends_until, "kernel before")

    def do_dependents(self, warp, op, t):
        self.triggers[warp.cta] = t
        self.advance(warp, t + 1)

    def do_branch(self, warp, op, t):
        self.advance(warp, t + self.machine.branch)

    # ------------------------------------------------------------ wgmma
    def do_wgmma(self, warp, op, t):
        machine = self.machine
        pipe = self.pipes[warp.home]
        clocks = machine.mma_clocks * machine.wgmma_share * self.lowering.wgmma_share(op.pc)
        start = max(pipe["tensor"], t)
        pipe["tensor"] = start + clocks
        self.timing.tensor += clocks
        warp.wgmma = start + clocks + machine.mma_latency
        self.advance(warp, t + 1)

    def do_wgmma_wait(self, warp, op, t):
        self.pause(warp, t, warp.wgmma if op.amount == 0 else t, "wgmma")

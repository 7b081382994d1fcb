"""The record of a launch: the blocks that every warp executed, and what their instructions touched.

``ptxsim.emulate(trace=Trace)`` fills one `Trace` per launch, in place of its counters.  A warp's record is a list of
visits.  A `Visit` is a basic block that some lanes of the warp executed, how far, and the events of its memory and
synchronisation instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ptxsim.counters import Counters, changes, distinct

LINE = 7  # log2 of a line's bytes
SECTOR = 5
UNIT = 256  # to which cudaMalloc aligns, at least


class Region(NamedTuple):
    """Addresses of the host that hold an argument of a launch, and what is added to them in its record."""

    base: int
    end: int
    shift: int

    @property
    def lines(self) -> tuple[int, int]:
        """Its first and last line in the record."""
        return self.base + self.shift >> LINE, self.end + self.shift - 1 >> LINE


def regions_of(memory) -> list[Region]:
    """Return where allocations lie in a record, in their order in ``memory``.

    As on a GPU, memory begins at multiples of `UNIT`, and tensors may begin behind that.  The host aligns memory less,
    and chooses addresses by chance; a record depends on the arguments alone.
    """
    origins, ends = {}, {}
    for part, keep in memory.parts:
        storage = getattr(keep, "untyped_storage", None)
        origin = origins[part.base] = storage().data_ptr() if storage else part.base
        ends[origin] = max(ends.get(origin, 0), part.base + part.size)
    start, shifts = 0, {}
    for origin, end in ends.items():
        shifts[origin] = start - origin
        start += -(-(end - origin) // UNIT) * UNIT
    return [Region(a.base, a.end, shifts[origins[a.base]]) for a in memory.allocations]


class Line(NamedTuple):
    """Sectors of a 128-byte line of global memory: bit i of ``mask`` is sector i of 32 bytes."""

    number: int
    mask: int

    @property
    def bytes(self) -> int:
        """Bytes of its sectors."""
        return self.mask.bit_count() << SECTOR


class GlobalAccess(NamedTuple):
    """A load, store or atomic of a warp.  ``mode``: read, write or atomic."""

    mode: str
    tensor: str
    lines: tuple[Line, ...]


class SharedAccess(NamedTuple):
    """A warp's access to shared memory, ``n_bytes`` per lane."""

    wavefronts: int
    n_bytes: int


class MbarrierUse(NamedTuple):
    """What a warp does to mbarriers.

    ``kind``: init, arrive, expect, wait, or "arrive after copies".  ``values`` are (cell, value) pairs: a cell is the
    address of a mbarrier, its value a count, bytes, or the parity of the phase that is waited for.
    """

    kind: str
    values: tuple[tuple[int, int], ...]


class BarrierUse(NamedTuple):
    """The arrival of ``lanes`` lanes at a barrier of ``threads`` threads (None: all of the CTA).

    ``waits``: the lanes also wait until the barrier is complete.
    """

    number: int
    threads: int | None
    waits: bool
    lanes: int


class BulkCopy(NamedTuple):
    """One bulk copy.  ``cell``: the mbarrier that its completion signals, if any; ``load``: into shared memory."""

    n_bytes: int
    tensor: str
    lines: tuple[Line, ...]
    cell: int | None
    load: bool


class TensorUse(NamedTuple):
    """What the recorded CTAs touch of a tensor: its first and last line, and how many lines and sectors."""

    first: int
    last: int
    lines: int
    sectors: int


class Footprint(NamedTuple):
    """Bytes of the distinct sectors that the recorded CTAs read and write, and the tensors they are in.

    ``bulk`` are those that bulk copies read.
    """

    read: int
    written: int
    bulk: int
    tensors: dict[str, TensorUse]


Event = GlobalAccess | SharedAccess | MbarrierUse | BarrierUse | BulkCopy


class Visit:
    """A basic block that a warp executed up to, and without, the instruction ``stop``.

    ``events`` maps the number of a PTX instruction to a list of `Event`.
    """

    __slots__ = ("block", "events", "stop")

    def __init__(self, block):
        self.block, self.stop, self.events = block, block.next_pc, {}


class Trace(Counters):
    """Filled while a launch runs; ``warps`` maps a warp, numbered over the CTAs that ran, to its visits.

    ``regions`` are those of the launch's tensors, once it has accessed one.
    """

    regions: Sequence[Region] = ()
    _footprint: Footprint | None = None

    def __init__(self, launch):
        super().__init__(launch)
        self.warps = {}
        self.copies = None  # addresses of the bulk copies being issued

    @property
    def warps_per_cta(self):
        """Warps of a CTA; warp w belongs to CTA w // warps_per_cta."""
        return -(-self.launch.block_threads // 32)

    # ------------------------------------------------------------ hooks
    def block(self, block, S):
        super().block(block, S)
        warps = self.warps
        for warp in S.warp_ids.tolist():
            visits = warps.get(warp)
            if visits is None:
                visits = warps[warp] = []
            visits.append(Visit(block))

    def interrupted(self, S, pc):
        """The instruction at ``pc`` could not run yet: it and what follows belong to a later visit."""
        for warp in S.warp_ids.tolist():
            self.warps[warp][-1].stop = pc

    def event(self, warp, ins, event: Event):
        """Add an event to the current visit of a warp."""
        self.warps[warp][-1].events.setdefault(ins.pc, []).append(event)

    def global_access(self, S, addr, nbytes, ins, mode, alloc):
        for warp, tensor, lines in self.lines(S.lanes >> 5, addr, alloc):
            self.event(warp, ins, GlobalAccess(mode, tensor, lines))

    def shared_access(self, S, addr, nbytes, ins, mode):
        passes = {8: 2, 16: 4}.get(nbytes, 1)
        self.wavefronts(S, ins, S.lanes * passes >> 5, passes, addr, nbytes)

    def matrix_access(self, S, addr, ins, mode):
        self.wavefronts(S, ins, S.lanes >> 3, 4, addr, 16)

    def wavefronts(self, S, ins, group, per_warp, addr, nbytes):
        """Record each warp's wavefronts, as `Counters` defines them."""
        word = (addr >> 2)[:, None] + np.arange(-(-nbytes // 4))
        key = distinct((group[:, None] << 24 | word & 0xFFFFFF).reshape(-1))
        banks = np.sort((key >> 24) * 32 + (key & 31))
        first = np.flatnonzero(changes(banks))
        counts = np.diff(np.append(first, len(banks)))
        starts = np.flatnonzero(changes(banks[first] >> 5))
        passes = np.maximum.reduceat(counts, starts)
        warps = (banks[first[starts]] >> 5) // per_warp
        for warp in S.warp_ids.tolist():
            self.event(warp, ins, SharedAccess(int(passes[warps == warp].sum()), nbytes))

    def mma(self, ins, warps, flops_per_warp):
        pass

    def mbarrier(self, S, ins, kind, cells, values):
        """Lanes of S act on the mbarriers ``cells``: arrivals and bytes of a warp add up."""
        values = np.broadcast_to(values, cells.shape)
        warps = S.lanes >> 5
        for warp in S.warp_ids.tolist():
            mine = warps == warp
            acts = {}
            for cell, value in zip(cells[mine].tolist(), values[mine].tolist()):
                adds = kind not in ("wait", "init")
                acts[cell] = acts.get(cell, 0) + value if adds else value
            self.event(warp, ins, MbarrierUse(kind, tuple(acts.items())))

    def barrier(self, S, ins, number, threads, waits):
        """Lanes of S arrive at a barrier of ``threads`` threads (None: all of the CTA)."""
        lanes = np.bincount(S.lanes >> 5)
        for warp in S.warp_ids.tolist():
            self.event(warp, ins, BarrierUse(number, threads, waits, int(lanes[warp])))

    def bulk(self, ins, alloc, request, addr, granule, mode):
        self.copies = (request, addr, alloc)

    def copied(self, S, ins, n_bytes, cells, load):
        """Lanes of S have issued one bulk copy each, whose addresses `bulk` was told."""
        touched = {}
        if self.copies is not None:
            request, addr, alloc = self.copies
            touched = {lane: (tensor, lines) for lane, tensor, lines in self.lines(request, addr, alloc)}
        self.copies = None
        for i, lane in enumerate(S.lanes.tolist()):
            tensor, lines = touched.get(i, ("", ()))
            cell = None if cells is None else int(cells[i])
            self.event(lane >> 5, ins, BulkCopy(int(n_bytes[i]), tensor, lines, cell, load))

    @property
    def footprint(self) -> Footprint:
        """The bytes and tensors that the recorded CTAs touch."""
        if self._footprint is None:
            self._footprint = self.sum_up()
        return self._footprint

    def sum_up(self):
        read, written, bulk, tensors = {}, {}, {}, {}
        modes = {"read": (read,), "bulk read": (read, bulk), "write": (written,), "atomic": (read, written)}
        for visits in self.warps.values():
            for event in (event for visit in visits for events in visit.events.values() for event in events):
                if isinstance(event, GlobalAccess):
                    mode = event.mode
                elif isinstance(event, BulkCopy):
                    mode = "bulk read" if event.load else "write"
                else:
                    continue
                masks = tensors.setdefault(event.tensor, {})
                for number, mask in event.lines:
                    masks[number] = masks.get(number, 0) | mask
                    for into in modes[mode]:
                        into[number] = into.get(number, 0) | mask
        uses = {
            name: TensorUse(min(masks), max(masks), len(masks), sum(mask.bit_count() for mask in masks.values()))
            for name, masks in tensors.items()
            if masks
        }
        total = [32 * sum(mask.bit_count() for mask in into.values()) for into in (read, written, bulk)]
        return Footprint(*total, uses)

    # ------------------------------------------------------------ addresses
    def aligned(self, addr, alloc):
        """Return addresses of the host as those of the record."""
        if not self.regions:
            self.regions = regions_of(self.launch.memory)
            self._starts = np.array([region.base for region in self.regions], np.int64)
            self._shifts = np.array([region.shift for region in self.regions], np.int64)
        if alloc is not None:
            return addr + self._shifts[np.searchsorted(self._starts, alloc.base, "right") - 1]
        return addr + self._shifts[np.searchsorted(self._starts, addr, "right") - 1]

    def lines(self, owner, addr, alloc):
        """Yield (owner, tensor, lines) of accesses, grouped by ``owner``."""
        name = self.tensor(alloc, int(addr[0]))
        sectors = distinct(owner << 42 | self.aligned(addr, alloc) >> SECTOR)
        owners, sectors = sectors >> 42, sectors & (1 << 42) - 1
        starts = [*np.flatnonzero(changes(owners)).tolist(), len(owners)]
        for a, b in pairwise(starts):
            masks = {}
            for sector in sectors[a:b].tolist():
                line = sector >> LINE - SECTOR
                masks[line] = masks.get(line, 0) | 1 << (sector & (1 << LINE - SECTOR) - 1)
            yield int(owners[a]), name, tuple(map(Line._make, masks.items()))

    def tensor(self, alloc, address):
        """Name of the tensor at an address."""
        if alloc is None:
            memory = self.launch.memory
            alloc = memory.allocations[int(memory.buffers_of(np.array([address]))[0])]
        if len(alloc.parts) == 1:
            return alloc.parts[0].name
        return alloc.parts[int(alloc.owners(np.array([address]), 1)[0])].name

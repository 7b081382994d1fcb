"""The memory that an SM sees: its L1, the L2 with what it holds when the launch starts, and DRAM.

DRAM and the port to the L2 are queues with a fixed rate.  What a request meets there beyond the bytes before it, which
arrive out of step from all SMs, is `loaded`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, NamedTuple

from .constants import Machine
from .trace import Line

if TYPE_CHECKING:
    from .replay import Timing

INF = math.inf
PARTS = 1024  # hash values
PART_LINES = 5  # log2 of the lines that lie in the same part of the L2: 4 KiB


def spread(number: int) -> int:
    """Return a hash of a number, below `PARTS`."""
    return (number * 0x9E3779B1 >> 15) % PARTS


def loaded(latency: float, depth: float) -> float:
    """Return the clocks that a request waits in addition to ``latency`` and to the bytes queued before it.

    ``depth`` is what is on its way to this SM, as clocks of its share of the bandwidth, relative to ``latency``.
    Little's law with an unloaded latency gives the bandwidth min(1, depth); published curves (source M of the
    constants) reach depth / (1 + depth^3)^(1/3), a round trip of latency * (1 + depth^3)^(1/3).
    """
    return latency * ((1 + depth**3) ** (1 / 3) - max(1.0, depth))


class Residency(NamedTuple):
    """What the L2 holds when a launch starts.

    ``ranges`` are (first, last) lines; ``share`` of their lines are there, and those of ``lines`` are, too.
    ``near``: all are in the near part.  ``shared`` are (first, last, share, early) of lines that other SMs read too:
    the L2 fetches them once, and this SM's share of that is smaller than what it reads.  ``early`` is how many of them
    are not there yet when this SM asks; the CTAs that run at the same time ask for them together.
    """

    ranges: tuple[tuple[int, int], ...] = ()
    share: float = 1.0
    near: bool = True
    lines: Container[int] = frozenset()
    shared: tuple[tuple[int, int, float, float], ...] = ()

    def holds(self, line: int) -> bool:
        """Whether a line is in the L2."""
        if line in self.lines:
            return True
        if not any(first <= line <= last for first, last in self.ranges):
            return False
        return self.share >= 1 or spread(line) < self.share * PARTS

    def part_of(self, line: int) -> float:
        """The share of a line's way from DRAM to the L2 that falls to this SM; 0: the line is there already."""
        for first, last, share, early in self.shared:
            if first <= line <= last:
                return share / early if early >= 1 or spread(line) < early * PARTS else 0.0
        return 1.0


NOTHING = Residency()


class Memory:
    """L1, L2 and DRAM, of which this SM gets ``dram_rate`` and ``l2_rate`` bytes per clock."""

    def __init__(
        self, machine: Machine, timing: Timing, dram_rate: float, l2_rate: float, l1_size: int, residency: Residency
    ):
        self.machine, self.timing, self.residency = machine, timing, residency
        self.dram_rate, self.l2_rate = min(dram_rate, machine.l2_port), min(l2_rate, machine.l2_port)
        self.l1_size = l1_size
        self.dram = self.port = 0.0  # until when they are busy
        self.flying, self.depth = deque(), 0.0  # (end, clocks of the queue) of reads from DRAM, and their sum
        self.seen, self.written = {}, {}  # line -> (sectors, arrival), sectors
        self.l1, self.l1_filled = {}, 0
        self.far = 0 if residency.near else machine.l2_far_share * PARTS
        self.held = bool(residency.ranges or residency.lines)

    def from_dram(self, t: float, n_bytes: int, queued: float = INF, part: float = 1.0) -> float:
        """Return when ``n_bytes`` of DRAM arrive that are requested at ``t``, and wait ``queued`` clocks at most.

        ``part`` of them are fetched for this SM, the others for another one.
        """
        machine, rate, flying = self.machine, self.dram_rate, self.flying
        start = max(t, min(self.dram, t + queued))
        port = max(t, min(self.port, t + queued))
        clocks = n_bytes * part / rate
        self.dram = max(t, self.dram) + clocks
        self.port = max(t, self.port) + n_bytes / machine.l2_port
        self.timing.dram_busy += clocks
        self.timing.port_busy += n_bytes / machine.l2_port
        self.timing.dram_read += n_bytes
        while flying and flying[0][0] <= t:
            self.depth -= flying.popleft()[1]
        self.depth += clocks
        latency = machine.dram_latency
        wait = machine.dram_load * loaded(latency, self.depth / latency)
        end = max(start + clocks, port + n_bytes / machine.l2_port) + latency + wait
        flying.append((end, clocks))
        return end

    def from_l2(self, t: float, n_bytes: int, queued: float = INF, far: bool = False) -> float:
        """Return when ``n_bytes`` of the L2 arrive."""
        machine = self.machine
        port = max(t, min(self.port, t + queued))
        self.port = max(t, self.port) + n_bytes / self.l2_rate
        self.timing.port_busy += n_bytes / self.l2_rate
        self.timing.l2_read += n_bytes
        return port + n_bytes / self.l2_rate + (machine.l2_far_latency if far else machine.l2_latency)

    def read(self, t: float, lines: Iterable[Line], cached: bool, queued: float = INF) -> float:
        """Return when all ``lines`` have arrived; ``cached``: through the L1."""
        done, fresh, again, far, part, seen = t, 0, 0, False, 0.0, self.seen
        touched = []
        for line, mask in lines:
            known, arrival = seen.get(line, (0, 0.0))
            if cached:
                stamp, held = self.l1.get(line, (-INF, 0))
                if self.l1_filled - stamp > self.l1_size:
                    held = 0
                if not mask & ~held:
                    done = max(done, t + self.machine.l1_latency, arrival)
                    continue
                self.l1[line] = (self.l1_filled, held | mask)
                self.l1_filled += 32 * mask.bit_count()
            new = mask & ~known
            mine = self.residency.part_of(line) if new and self.residency.shared else 1.0
            if new and (not mine or (self.held and self.residency.holds(line))):
                seen[line] = (known | mask, arrival)
                new = 0
            if self.far and new != mask and spread(line >> PART_LINES) < self.far:
                far = True
            fresh += 32 * new.bit_count()
            again += 32 * (mask & ~new).bit_count()
            if new:
                touched.append((line, known | mask))
                part = max(part, mine)
            else:
                done = max(done, arrival)
        if fresh:
            arrival = self.from_dram(t, fresh, queued, part)
            done = max(done, arrival)
            for line, mask in touched:
                seen[line] = (mask, arrival)
        if again:
            done = max(done, self.from_l2(t, again, queued, far))
        return done

    def write(self, t: float, lines: Iterable[Line]) -> float:
        """Return when all lines are written.

        Each sector is written to DRAM once, except of lines that the L2 holds from call to call.
        """
        fresh = total = 0
        for line, mask in lines:
            before = self.written.get(line, 0)
            total += 32 * mask.bit_count()
            if not (self.held and self.residency.holds(line)):
                fresh += 32 * (mask & ~before).bit_count()
            self.written[line] = before | mask
            known, arrival = self.seen.get(line, (0, 0.0))
            self.seen[line] = (known | mask, arrival)
        if fresh:
            self.dram = max(t, self.dram) + fresh / self.dram_rate
            self.timing.dram_busy += fresh / self.dram_rate
            self.timing.dram_write += fresh
        port = total * self.machine.l2_write_cost / self.l2_rate
        self.timing.port_busy += port
        self.port = max(t, self.port) + port
        ready = max(self.port, t + total / self.machine.l2_port)
        return (max(self.dram, ready) if fresh else ready) + self.machine.store_latency

"""Conflicting accesses of different CTAs to global memory within one launch.

Per element of every registered tensor: the CTA that last wrote it and the CTA that read it.  CTAs that have used a
global atomic, an acquire or release access or a cluster barrier before the access are trusted to be ordered by it.
"""

from __future__ import annotations

import numpy as np

from .findings import Finding

LIMIT = 1 << 28  # allocations with more bytes are not watched
MANY = -1  # read by more than one CTA


class _Cells:
    """Shadow of one allocation: CTA + 1 of the last writer and of the readers, and the PTX lines."""

    def __init__(self, alloc):
        self.unit = min(part.unit for part in alloc.parts)
        self.base = alloc.base // self.unit * self.unit
        cells = (alloc.end - self.base) // self.unit + 1
        self.writer, self.reader = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.write_line, self.read_line = np.zeros(cells, np.int32), np.zeros(cells, np.int32)


class GlobalShadow:
    """Watches one launch."""

    def __init__(self, launch):
        self.launch, self.found = launch, launch.race_findings
        self.cells = {}
        self.trusted = np.zeros(int(np.prod(launch.grid)), bool)

    def cta_numbers(self, wave, ctas):
        gx, gy, _ = self.launch.grid
        return (wave.cta_ids @ np.array([1, gx, gx * gy]))[ctas]

    def synchronised(self, S):
        """These CTAs used an atomic, acquire, release or cluster barrier."""
        self.trusted[self.cta_numbers(S.wave, S.cta)] = True

    def access(self, S, ctas, addr, nbytes, ins, mode, alloc):
        """``addr``: one address per entry of ``ctas`` (CTAs of the wave)."""
        memory = self.launch.memory
        if alloc is None:
            slot = memory.buffers_of(addr)
            for i in np.unique(slot):
                pick = slot == i
                self.access(S, ctas[pick], addr[pick], nbytes, ins, mode, memory.allocations[i])
            return
        if alloc.size > LIMIT:
            return
        known = self.cells.get(alloc.base)
        if known is None:
            known = self.cells[alloc.base] = _Cells(alloc)
        own = (self.cta_numbers(S.wave, ctas) + 1).astype(np.int32)
        cell = (addr - known.base) // known.unit
        count = nbytes // known.unit
        if count > 1:
            cell, own = (cell[:, None] + np.arange(count)).reshape(-1), np.repeat(own, count)
        checked = ~self.trusted[own - 1]
        writer = known.writer[cell]
        bad = checked & (writer != own) & (writer != 0)
        if mode == "read":
            reader = known.reader[cell]
            known.reader[cell] = np.where((reader == 0) | (reader == own), own, MANY)
            if own[0] != own[-1]:
                known.reader[cell[known.reader[cell] != own]] = MANY
            known.read_line[cell] = ins.line
            self.report("write-read", bad, known, cell, own, writer, known.write_line, ins, S)
            return
        reader = known.reader[cell]
        self.report("write-write", bad, known, cell, own, writer, known.write_line, ins, S)
        self.report(
            "read-write", checked & (reader != own) & (reader != 0), known, cell, own, reader, known.read_line, ins, S
        )
        known.writer[cell] = own
        known.write_line[cell] = ins.line
        if own[0] != own[-1]:
            self.report(
                "write-write",
                checked & (known.writer[cell] != own),
                known,
                cell,
                own,
                known.writer[cell],
                known.write_line,
                ins,
                S,
            )

    def report(self, kind, bad, known, cell, own, other, lines, ins, S):
        if not bad.any():
            return
        at = int(np.flatnonzero(bad)[0])
        earlier = int(lines[cell[at]])
        key = (f"{kind} race between CTAs", earlier, ins.line)
        if key in self.found:
            return
        address = known.base + int(cell[at]) * known.unit
        alloc = self.launch.memory.find(address)
        place = f"{alloc.name!r} + {address - alloc.base}" if alloc else f"0x{address:x}"
        program = self.launch.program
        who = "several CTAs" if other[at] == MANY else f"CTA {self.cta_name(int(other[at]) - 1)}"
        text = (
            f"{kind} race between CTAs on {place}\n"
            f"    earlier: {program.place(earlier)}: {program.text_of(earlier)[:120]}\n             by {who}\n"
            f"    later:   {program.place(ins.line)}: {ins.text[:120]}\n"
            f"             by CTA {self.cta_name(int(own[at]) - 1)}"
        )
        self.found[key] = Finding(key[0], alloc.name if alloc else "", (earlier, ins.line), text)

    def cta_name(self, number):
        gx, gy, _ = self.launch.grid
        return f"({number % gx},{number // gx % gy},{number // (gx * gy)})"

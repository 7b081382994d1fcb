"""racecheck of programmatic dependent launch: global memory may be used only after ``griddepcontrol.wait``.

A kernel that does not wait runs beside the kernel before it, whose memory it may neither read nor overwrite.  The wait
orders what the thread that executes it does next, and what other threads do after a barrier, mbarrier or warp barrier
that comes after it: the clocks of `shadow` carry it.  Watched are kernels that contain the instruction or are launched
with the attribute.  The caller may declare tensors that are complete before the launch: a kernel may read those early.

PTX ISA: "griddepcontrol".
"""

from __future__ import annotations

import re

import numpy as np

from .findings import Finding

KIND = "before griddepcontrol.wait"


def contains_wait(kernel):
    """Does the kernel contain ``griddepcontrol.wait``?"""
    return any(ins.op == "griddepcontrol" and "wait" in ins.mods for ins in kernel.instrs)


class DependencyWatch:
    """Watches one launch; ``declared`` names tensors, ``own`` the variables of the module."""

    def __init__(self, launch, declared, own):
        self.launch, self.found = launch, launch.race_findings
        self.declared, self.own = frozenset(declared), frozenset(own)
        self.waited = False

    def wait(self, S):
        """These threads waited."""
        self.waited = True
        S.wave.shadow.dependency_wait(S)

    def trigger(self, S, ins):
        """These threads let dependent kernels start, which may then read what was complete when this one started."""
        if not self.launch.pdl:
            return
        late = ~S.wave.shadow.after_wait(S.lanes)
        if late.any():
            self.report(
                (f"trigger {KIND}", "", ins),
                "griddepcontrol.launch_dependents before griddepcontrol.wait: the next kernel may start while the one "
                "before this one still runs",
                ins,
                S.wave.thread_name(int(S.lanes[np.flatnonzero(late)[0]])),
                "wait first",
            )

    def access(self, wave, lanes, addr, nbytes, ins, mode):
        """``addr``: one address per entry of ``lanes``."""
        shadow = wave.shadow
        if shadow.all_waited:
            return
        early = ~shadow.after_wait(lanes)
        if not early.any():
            return
        lanes, addr = lanes[early], addr[early]
        memory = self.launch.memory
        slots = memory.buffers_of(addr)
        for slot in np.unique(slots):
            pick, found = slots == slot, memory.allocations[slot]
            at, who = addr[pick], lanes[pick]
            if mode == "read":
                bad = ~self.readable(found, at, nbytes)
                at, who = at[bad], who[bad]
            if len(at):
                self.report_access(wave, int(who[0]), int(at[0]), nbytes, ins, mode, found)

    def readable(self, alloc, addr, nbytes):
        """Which bytes belong to a tensor that may be read early?"""
        ok = np.zeros(len(addr), bool)
        for part in alloc.parts:
            if re.split(r"[.\[]", part.name)[0] in self.declared or part.name in self.own:
                ok |= part.holds(addr, nbytes)
        return ok

    def report_access(self, wave, lane, address, nbytes, ins, mode, alloc):
        inside = [p.name for p in alloc.parts if p.holds(np.array([address]), nbytes)[0]]
        name = "+".join(dict.fromkeys(inside)) or alloc.name
        uses = "read" if mode == "read" else "write"
        way_out = "wait first, in this thread or in one that a barrier orders before it"
        if uses == "read":
            way_out += "; or name the tensor in reads_before_wait, if it is complete when the kernel before starts"
        self.report(
            (f"{uses} {KIND}", name, ins),
            f"{uses} of {name!r} + {address - alloc.base} before griddepcontrol.wait: the kernel before this one may "
            + ("still write it" if uses == "read" else "still use it"),
            ins,
            wave.thread_name(lane),
            way_out,
        )

    def report(self, key, what, ins, who, way_out):
        """Remember one finding per kind, tensor and PTX line."""
        kind, name, _ = key
        at = (f"{kind} {name}", ins.line, 0)
        if at not in self.found:
            place = f"{self.launch.program.place(ins.line)}: {ins.text[:120]}"
            text = f"{what}\n    at:      {place}\n             by {who}\n    way out: {way_out}"
            self.found[at] = Finding(kind, name, (ins.line,), text)

    def finish(self):
        """All CTAs have run."""
        if self.launch.pdl and not self.waited:
            text = (
                "launched as a programmatic dependent, but no thread executed griddepcontrol.wait: kernels that wait "
                "for this one do not wait for the one before it\n    way out: wait in every CTA, also where there is "
                "nothing to do"
            )
            self.found["never waits", 0, 0] = Finding("never waits", "", (), text)

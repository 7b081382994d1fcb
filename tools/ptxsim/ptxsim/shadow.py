"""initcheck and racecheck for shared memory.

Shared memory is watched in units of the kernel's smallest access.  Every unit has a shadow: written or not, its last
writer and, per warp or asynchronous actor, its last reader.  Happens-before is tracked with vector clocks (one per
thread): entry ``VC[t, a]`` is the latest time of actor ``a`` known to precede thread ``t``'s next action.  An access
that conflicts with an earlier one by actor ``a`` at time ``c`` is ordered iff ``VC[t, a] >= c``.  Times are ticks of
one clock that runs on from launch to launch, so that shadows of earlier launches need no clearing: they lie before the
time that all clocks start with.

Actors are the threads of the CTA, then one per mbarrier (TMA loads that signal it), one per warp (wgmma reads), one
per warp for bulk stores, and one for the kernel before, which griddepcontrol.wait waits for.  A second clock ``AVC``
holds what has been made visible to the async proxy: it takes over VC at ``fence.proxy.async`` and travels along
synchronisation, so a fence anywhere on the path counts.

Shared memory lives until its CTA ends, and then belongs to another one: a copy that nobody has waited for by then is
reported, too.  Only a CTA's own threads can wait for its copies, so ``finish`` looks at the end of the wave.

PTX ISA: "Memory Consistency Model", "Async proxy".
"""

from __future__ import annotations

import numpy as np

from .errors import UninitialisedRead
from .findings import Finding
from .nodes import TYPE_BYTES

I32, I64 = np.int32, np.int64
NEVER = 2**31 - 1  # time of a cp.async write that nobody has waited for
MBAR_SLOTS = 64
RESTART = 2**30  # shadows are cleared when the clock gets here
ACTOR, LINE = 20, (1 << 20) - 1  # a shadow word: time << 32 | actor << ACTOR | PTX line


def access_unit(kernel):
    """Bytes of the smallest access that ``kernel`` may make to shared memory (a power of two up to 16)."""
    unit = 16
    for ins in kernel.instrs:
        if ins.op in ("ld", "st", "atom", "red", "ldu"):
            spaces = {m.split("::")[0] for m in ins.mods}
            if spaces & {"global", "local", "param", "const"}:
                continue
            sizes = [TYPE_BYTES[m] for m in ins.mods if m in TYPE_BYTES]
            vector = next((int(m[1:]) for m in ins.mods if m in ("v2", "v4", "v8")), 1)
            unit = min(unit, sizes[-1] * vector if sizes else 1)
        elif ins.op == "cp" and "bulk" not in ins.mods and ins.mods[-1].split("::")[0] in ("shared", "global"):
            unit = min(unit, 4)
        elif ins.op == "mbarrier":
            unit = min(unit, 8)
    return unit


class Shadow:
    """Shadow state of one wave (all CTAs); kept with the wave and restarted for each use."""

    def __init__(self, wave):
        self.wave = wave
        self.unit = access_unit(wave.program.kernel)
        self.stride = wave.smem_stride // self.unit  # units per CTA
        self.size = wave.count * self.stride
        self.written = np.zeros(self.size, bool)
        self.T = wave.threads
        self.nwarps = wave.threads // 32
        self.first_mbar = self.T
        self.first_wgmma = self.T + MBAR_SLOTS
        self.first_bulk = self.first_wgmma + self.nwarps
        self.dependency = self.first_bulk + self.nwarps  # griddepcontrol.wait
        self.actors = self.dependency + 1
        self.now, self.pending = RESTART, False

    @staticmethod
    def bytes_per_cta(threads, smem, unit):
        """Memory that racecheck needs for one CTA."""
        return threads * (threads + MBAR_SLOTS + threads // 16 + 1) * 8 + (3 * threads // 32 + 1) * smem // unit * 8

    @property
    def bytes(self):
        """Memory held."""
        if not hasattr(self, "r"):
            return self.written.nbytes
        return self.written.nbytes + self.w.nbytes + self.r.nbytes + 2 * self.vc.nbytes

    def start(self, options):
        """Begin a wave: nothing is written, nothing is unordered."""
        self.race, self.init = options.racecheck, options.initcheck
        self.shuffle_sync = options.shuffle_sync
        self.found = self.wave.launch.race_findings
        if self.init:
            self.written.fill(False)
        if not self.race:
            return
        if self.now >= RESTART:
            shape = (self.wave.count, self.T, self.actors)
            self.vc, self.avc = np.zeros(shape, I32), np.zeros(shape, I32)
            self.cluster = np.zeros((self.wave.count, 2, self.actors), I32)
            self.w = np.zeros(self.size, I64)  # last write of each unit
            self.r = np.zeros((3 * self.nwarps, self.size), I64)  # last reads: by warps, wgmma, bulk copies
            self.now = 1
        else:
            if self.pending:
                self.w[self.w >> 32 == NEVER] = 0
            for clocks in (self.vc, self.avc, self.cluster):
                clocks.fill(self.now)
        self.begin, self.all_waited = self.now, False
        self.pending = False  # was there a cp.async?
        self.used = np.zeros(3 * self.nwarps, bool)  # reader columns in use
        self.mbar = {}  # mbarrier word -> arriving, completed clocks, slot, loads requested, loads completed
        self.slots = [0] * self.wave.count
        self.issued = {}  # (kind, cta, thread or warp) -> [(group, time, instruction)]

    # ------------------------------------------------------------ helpers
    def tick(self):
        self.now += 1
        return self.now

    def thread(self, S):
        return S.lanes % self.T

    def units(self, index, nbytes):
        """Units that accesses of ``nbytes`` at the flat byte indices touch, access by access; and how many each."""
        first = index // self.unit
        count = max(1, nbytes // self.unit)
        if count == 1:
            return first.reshape(-1), 1
        return (first.reshape(-1, 1) + np.arange(count)).reshape(-1), count

    def name(self, cta, actor):
        if actor < self.T:
            return self.wave.thread_name(cta * self.T + int(actor))
        if actor < self.first_wgmma:
            return "a TMA load"
        if actor < self.first_bulk:
            return f"wgmma of warp {int(actor - self.first_wgmma)}"
        return f"bulk copy issued by warp {int(actor - self.first_bulk)}"

    def report(self, kind, word, unit, ins, actor, extra=""):
        """Remember one finding per pair of PTX lines; ``word`` is the shadow of the earlier access."""
        line = int(word) & LINE
        key = (kind, line, ins.line)
        if key in self.found:
            return
        cta, offset = divmod(int(unit) * self.unit, self.wave.smem_stride)
        program, before = self.wave.program, self.name(cta, int(word) >> ACTOR & 4095)
        text = (
            f"{kind} on shared byte 0x{offset:x} ({self.wave.describe_shared(offset)}) {extra}\n"
            f"    earlier: {program.place(line)}: {program.text_of(line)[:120]}\n             by {before}\n"
            f"    later:   {program.place(ins.line)}: {ins.text[:120]}\n             by {self.name(cta, int(actor))}"
        )
        self.found[key] = Finding(kind, "", (line, ins.line), text)

    # ------------------------------------------------------------ plain accesses
    def access(self, S, index, nbytes, ins, mode):
        """Loads, stores and atomics of the generic proxy; ``index`` has one flat byte index per lane."""
        units, count = self.units(index, nbytes)
        if self.init:
            if mode != "write":
                self.check_init(S, units, count, ins)
            if mode != "read":
                self.written[units] = True
        if not self.race:
            return
        threads, own = self.thread(S), S.cta
        if self.wave.cluster_size > 1:  # another CTA's memory: ordering is not tracked
            remote = index // self.wave.smem_stride != own
            if remote.any():
                if mode != "read":
                    self.w[self.units(index[remote], nbytes)[0]] = 0
                keep = ~remote
                if not keep.any():
                    return
                threads, own, units = threads[keep], own[keep], self.units(index[keep], nbytes)[0]
        if count > 1:
            threads, own = np.repeat(threads, count), np.repeat(own, count)
        if mode == "read":
            self.check_writer(own, threads, units, ins, "write-read race")
            self.record_read(threads >> 5, threads, units, ins)
        elif mode == "write":
            self.check_writer(own, threads, units, ins, "write-write race")
            self.check_readers(own, threads, units, ins)
            self.record_write(threads, units, ins.line)
        else:  # atomics conflict with plain accesses, not with each other
            self.check_writer(own, threads, units, ins, "write-atomic race")
            self.check_readers(own, threads, units, ins, "read-atomic race")
            self.w[units] = 0  # later plain reads are not checked against atomics

    def check_init(self, S, units, count, ins):
        ok = self.written[units]
        if not ok.all():
            bad = int(np.flatnonzero(~ok)[0])
            offset = int(units[bad]) * self.unit % self.wave.smem_stride
            raise UninitialisedRead(
                f"read of shared byte 0x{offset:x} that nothing has written "
                f"({self.wave.describe_shared(offset)})\n    "
                f"{self.wave.where(ins, S, min(bad // count, S.n - 1))}"
            )

    def check_writer(self, cta, threads, units, ins, kind, proxy=False):
        """Is the last write of each unit ordered before this access?"""
        words = self.w[units]
        when, actor = words >> 32, words >> ACTOR & 4095
        seen = self.vc[cta, threads, actor]
        bad = seen < when
        if bad.any():
            bad &= (actor != threads) | (when == NEVER)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            extra = (
                "(cp.async not waited for)"
                if when[at] == NEVER
                else "(mbarrier not waited for)"
                if actor[at] >= self.T
                else ""
            )
            self.report(kind, words[at], units[at], ins, self.pick(threads, at), extra)
        if proxy:
            missing = (actor < self.T) & (self.avc[cta, threads, actor] < when) & ~bad
            if missing.any():
                at = int(np.flatnonzero(missing)[0])
                self.report(
                    "missing fence.proxy.async",
                    words[at],
                    units[at],
                    ins,
                    self.pick(threads, at),
                    "(generic write, then an access of the async proxy)",
                )

    @staticmethod
    def pick(threads, at):
        return threads if np.ndim(threads) == 0 else threads[at]

    def check_readers(self, cta, threads, units, ins, kind="read-write race"):
        for column in np.flatnonzero(self.used):
            words = self.r[column].take(units)
            when, actor = words >> 32, words >> ACTOR & 4095
            bad = self.vc[cta, threads, actor] < when
            if bad.any():
                bad &= actor != threads
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                self.report(kind, words[at], units[at], ins, self.pick(threads, at))

    def check_clash(self, S, index, wanted, stored, ins):
        """Lanes of one store that wrote different values to the same place: memory kept only one of them."""
        if not self.race:
            return
        lost = (wanted != stored).reshape(S.n, -1).any(axis=1)
        if lost.any():
            at = int(np.flatnonzero(lost)[0])
            winner = int(np.flatnonzero(index == index[at])[-1])
            t = self.thread(S)
            self.report(
                "write-write race",
                int(t[at]) << ACTOR | ins.line,
                index[at] // self.unit,
                ins,
                t[winner],
                "(two lanes of one instruction)",
            )

    def record_write(self, actors, units, line, time=None):
        word = (time or self.tick()) << 32 | line
        self.w[units] = actors.astype(I64) << ACTOR | word if np.ndim(actors) else int(actors) << ACTOR | word

    def record_read(self, columns, actors, units, ins):
        word = self.tick() << 32 | ins.line
        if np.ndim(actors):
            self.used[columns] = True
            self.r[columns, units] = actors.astype(I64) << ACTOR | word
        else:
            self.used[columns] = True
            self.r[columns][units] = int(actors) << ACTOR | word

    # ------------------------------------------------------------ synchronisation
    def publish(self, S):
        """Every selected thread's own entry becomes 'now': its past accesses are part of its clock."""
        now = self.tick()
        t = self.thread(S)
        self.vc[S.cta, t, t] = now
        self.tick()

    def join_groups(self, cta, threads, group, receivers=None):
        """All threads with the same ``group`` number exchange clocks."""
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.r_[True, group[order][1:] != group[order][:-1]])
        sizes = np.diff(np.r_[starts, len(group)])
        for table in (self.vc, self.avc):
            rows = table[cta[order], threads[order]]
            merged = np.maximum.reduceat(rows, starts, axis=0)
            rows = np.repeat(merged, sizes, axis=0)
            if receivers is None:
                table[cta[order], threads[order]] = rows
            else:
                keep = receivers[order]
                table[cta[order][keep], threads[order][keep]] = rows[keep]

    def barrier(self, everyone, waiting):
        """bar.sync / bar.arrive completed: arrivals happen before the threads that waited."""
        if not self.race:
            return
        self.publish(everyone)
        receives = np.zeros(self.wave.lanes_total, bool)
        for sel in waiting:
            receives[sel.lanes] = True
        self.join_groups(everyone.cta, self.thread(everyone), everyone.cta, receives[everyone.lanes])

    def warp_barrier(self, S):
        if not self.race:
            return
        self.publish(S)
        self.join_groups(S.cta, self.thread(S), S.lanes >> 5)

    def warp_sync(self, S, ins):
        """shfl, vote, match, redux, elect: configurable ordering of shared memory among the members."""
        if self.race and self.shuffle_sync and ins.op in ("shfl", "vote", "match", "redux"):
            self.warp_barrier(S)

    def proxy_fence(self, S):
        if not self.race:
            return
        self.publish(S)
        t = self.thread(S)
        np.maximum(self.avc[S.cta, t], self.vc[S.cta, t], out=(rows := np.empty((S.n, self.actors), I32)))
        self.avc[S.cta, t] = rows

    # ------------------------------------------------------------ programmatic dependent launch
    def dependency_wait(self, S):
        """griddepcontrol.wait: what the kernel before did comes before whatever these threads do next."""
        self.vc[S.cta, self.thread(S), self.dependency] = self.tick()
        waited = self.vc[:, :, self.dependency] > self.begin
        self.all_waited = bool(waited.reshape(-1)[self.wave.live].all())

    def after_wait(self, lanes):
        """Per lane: does a griddepcontrol.wait come before its next action?"""
        cta, thread = np.divmod(lanes, self.T)
        return self.vc[cta, thread, self.dependency] > self.begin

    def cluster_arrive(self, S):
        if not self.race:
            return
        self.publish(S)
        # clocks are per CTA, so only ordering inside each CTA is tracked
        for k, table in enumerate((self.vc, self.avc)):
            np.maximum.at(self.cluster[:, k], S.cta, table[S.cta, self.thread(S)])

    def cluster_wait(self, S):
        if not self.race:
            return
        t = self.thread(S)
        for k, table in enumerate((self.vc, self.avc)):
            table[S.cta, t] = np.maximum(table[S.cta, t], self.cluster[S.cta, k])

    # ------------------------------------------------------------ mbarriers
    def entry(self, cell):
        """State of an mbarrier word (index in the wave).

        [arriving clocks, completed clocks, slot, requested, completed]; the last two are [(instruction, lane)] of the
        loads that nobody has waited for, in the current phase and in earlier ones.
        """
        state = self.mbar.get(cell)
        if state is None:
            cta = cell * 8 // self.wave.smem_stride
            state = self.mbar[cell] = [
                np.zeros((2, self.actors), I32),
                np.zeros((2, self.actors), I32),
                self.first_mbar + self.slots[cta] % MBAR_SLOTS,
                [],
                [],
            ]
            self.slots[cta] += 1
        return state

    def mbarrier_init(self, S, cells, ins):
        if self.init:
            self.written[self.units(cells * 8, 8)[0]] = True
        if self.race:
            for cell in cells:
                self.entry(int(cell))

    def mbarrier_arrive(self, S, cells):
        if not self.race:
            return
        self.publish(S)
        t = self.thread(S)
        for i, cell in enumerate(cells):
            arriving = self.entry(int(cell))[0]
            local = int(cell) * 8 // self.wave.smem_stride == S.cta[i]
            if local:
                np.maximum(arriving[0], self.vc[S.cta[i], t[i]], out=arriving[0])
                np.maximum(arriving[1], self.avc[S.cta[i], t[i]], out=arriving[1])

    def mbarrier_phase(self, cells, phases):
        """Phases completed: what arrived is now visible to waiters, including TMA writes up to now."""
        if not self.race:
            return
        now = self.tick()
        for cell in cells:
            arriving, completed, slot, requested, loaded = self.entry(int(cell))
            loaded += requested
            requested.clear()
            np.maximum(arriving, completed, out=completed)
            completed[:, slot] = now
        self.tick()

    def mbarrier_wait(self, S, cells):
        if not self.race:
            return
        t = self.thread(S)
        order = np.argsort(cells, kind="stable")
        starts = np.flatnonzero(np.r_[True, cells[order][1:] != cells[order][:-1]])
        for start, end in zip(starts, np.r_[starts[1:], len(cells)], strict=True):
            pick = order[start:end]
            _, completed, _, _, loaded = self.entry(int(cells[pick[0]]))
            loaded.clear()
            c, tt = S.cta[pick], t[pick]
            self.vc[c, tt] = np.maximum(self.vc[c, tt], completed[0])
            self.avc[c, tt] = np.maximum(self.avc[c, tt], completed[1])

    # ------------------------------------------------------------ asynchronous copies
    def cp_async_issue(self, S, index, size, ins):
        units, count = self.units(index, size)
        if self.init:
            self.written[units] = True
        if not self.race:
            return
        self.pending = True
        threads, cta = np.repeat(self.thread(S), count), np.repeat(S.cta, count)
        self.check_writer(cta, threads, units, ins, "write-write race")
        self.check_readers(cta, threads, units, ins)
        self.record_write(threads, units, ins.line, NEVER)

    def cp_async_done(self, lanes, index, size, ins):
        """After the issuing thread's wait the bytes count as written by that thread now."""
        if not self.race:
            return
        units, count = self.units(index, size)
        words, threads = self.w[units], np.repeat(lanes % self.T, count)
        mine = (words >> 32 == NEVER) & (words >> ACTOR & 4095 == threads)
        self.w[units[mine]] = (words[mine] & 0xFFFFFFFF) | self.tick() << 32

    def bulk_write(self, S, index, granule, ins, cells, group):
        """A TMA load into shared memory, completing on the mbarriers ``cells``; ``index`` has a row per lane."""
        units, _ = self.units(index, granule)
        if self.init:
            self.written[units] = True
        if not self.race:
            return
        each = len(units) // len(index)
        threads, cta = np.repeat(self.thread(S), each), np.repeat(S.cta, each)
        self.check_writer(cta, threads, units, ins, "write-write race", proxy=True)
        self.check_readers(cta, threads, units, ins)
        states = [self.entry(int(cell)) for cell in cells]
        self.record_write(np.repeat(np.array([state[2] for state in states]), each), units, ins.line)
        for state, lane in zip(states, getattr(S, "issuers", S.lanes).tolist(), strict=True):
            state[3].append((ins, lane))

    def store_async(self, S, index, nbytes, ins, cells):
        """st.async: a write that completes on an mbarrier; races are looked for in the CTA's own memory only."""
        for i in range(S.n):
            units, _ = self.units(index[i : i + 1], nbytes)
            if self.init:
                self.written[units] = True
            if not self.race:
                continue
            cta = int(S.cta[i])
            if int(index[i]) // self.wave.smem_stride == cta:
                thread = int(S.lanes[i] % self.T)
                self.check_writer(cta, thread, units, ins, "write-write race")
                self.check_readers(cta, thread, units, ins)
            state = self.entry(int(cells[i]))
            self.record_write(state[2], units, ins.line)
            state[3].append((ins, int(S.lanes[i])))

    def bulk_read(self, S, index, granule, ins, cells, group):
        """A TMA store reads shared memory; it is pending until the issuing thread's wait_group.

        A copy between CTAs completes on the mbarriers ``cells`` instead; its destination's load stands for it at exit.
        """
        units, _ = self.units(index, granule)
        each = len(units) // len(index)
        if self.init:
            self.check_init(S, units, each, ins)
        if not self.race:
            return
        threads = self.thread(S)
        self.check_writer(np.repeat(S.cta, each), np.repeat(threads, each), units, ins, "write-read race", proxy=True)
        warps = np.repeat(threads >> 5, each)
        self.record_read(2 * self.nwarps + warps, self.first_bulk + warps, units, ins)
        for cta, thread, number in zip(S.cta.tolist(), threads.tolist(), group.tolist(), strict=True):
            self.issued.setdefault(("bulk", cta, thread), []).append((number, self.now, ins if cells is None else None))

    def bulk_wait(self, S, limit):
        """cp.async.bulk.wait_group{.read}: the thread's groups below ``limit`` have read their sources."""
        if not self.race:
            return
        for lane, bound in zip(S.lanes, limit, strict=True):
            cta, thread = divmod(int(lane), self.T)
            issued = self.issued.get(("bulk", cta, thread))
            done = [when for group, when, _ in issued or () if group < bound]
            if done:
                self.vc[cta, thread, self.first_bulk + thread // 32] = max(done)
                self.issued["bulk", cta, thread] = [x for x in issued if x[0] >= bound]

    def async_read(self, S, ctas, index, ins):
        """wgmma reads shared memory tiles; ``index`` is in 16-byte units, one block per warpgroup."""
        lanes = S.lanes[::128]
        for i in range(len(lanes)):
            units, _ = self.units(index[i] * 16, 16)
            if self.init:
                self.check_init(S, units, len(units), ins)
            if not self.race:
                continue
            cta, thread = int(ctas[i]), int(lanes[i] % self.T)
            warp = thread // 32
            self.check_writer(cta, thread, units, ins, "write-read race", proxy=True)
            self.record_read(self.nwarps + warp, self.first_wgmma + warp, units, ins)
            commits = int(self.wave.async_state["wgmma"][1][lanes[i] // 128])
            self.issued.setdefault(("wgmma", cta, warp), []).append((commits, self.now, ins))

    def wgmma_wait(self, S, keep):
        """wgmma.wait_group: completed reads precede whatever these threads do next."""
        if not self.race:
            return
        commits = self.wave.async_state["wgmma"][1]
        for group in np.unique(S.lanes // 128):
            first = int(group) * 128
            cta, warp = first // self.T, first % self.T // 32
            issued = self.issued.get(("wgmma", cta, warp))
            done = [when for number, when, _ in issued or () if number < commits[group] - keep]
            if done:
                t = np.arange(128) + first % self.T
                self.vc[cta, t, self.first_wgmma + warp] = max(done)
                self.issued["wgmma", cta, warp] = [x for x in issued if x[0] >= commits[group] - keep]

    # ------------------------------------------------------------ end of the CTAs
    def finish(self):
        """All threads have exited: report the copies that may still use their CTA's shared memory."""
        if not self.race:
            return
        state = self.wave.async_state
        for (kind, cta, thread), issued in self.issued.items():
            for number, _, ins in issued:
                if kind == "bulk" and ins is not None:
                    lane, commit = cta * self.T + thread, ""
                    if number >= state["bulk"].group[lane]:
                        commit = "commit it with cp.async.bulk.commit_group and "
                    self.report_exit(
                        ins, lane, cta, "reads", f"{commit}wait for the group with cp.async.bulk.wait_group.read 0"
                    )
        for cell, (*_, requested, loaded) in self.mbar.items():
            cta, offset = divmod(cell * 8, self.wave.smem_stride)
            for ins, lane in loaded + requested:
                self.report_exit(
                    ins,
                    lane,
                    cta,
                    "writes",
                    f"wait for the phase of the mbarrier at shared 0x{offset:x} with mbarrier.try_wait in any thread",
                )
        for lanes, _, _, _, _, ins in state["cp.async"].pending if "cp.async" in state else ():
            lane = int(lanes[0])
            self.report_exit(
                ins, lane, lane // self.T, "writes", "wait with cp.async.wait_group 0 or wait_all in the same thread"
            )

    def report_exit(self, ins, lane, cta, uses, remedy):
        """Remember one finding per copy instruction: ``lane`` issued it, it ``uses`` shared memory of ``cta``."""
        key = ("in flight at exit", ins.line, 0)
        if key in self.found:
            return
        text = (
            f"copy in flight at exit: it {uses} shared memory of CTA {self.wave.cta_name(cta * self.T)}, "
            f"which another CTA may get after the exit\n"
            f"    issued:  {self.wave.program.place(ins.line)}: {ins.text[:120]}\n"
            f"             by {self.wave.thread_name(lane)}\n    way out: {remedy} before exit"
        )
        self.found[key] = Finding(key[0], uses, (ins.line,), text)

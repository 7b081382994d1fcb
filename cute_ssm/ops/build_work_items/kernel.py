"""`BuildWorkItems`: the rows of a batch, those first whose step writes the state, each half in the order of the batch.

The rule is that of `cute_ssm.reference.serving.work_items`.  One CTA; each of its warps owns a contiguous part of the
batch, 32 rows at a time.  A first pass counts the writes of every part, and after the one barrier a second, whose loads
hit the cache, knows where its rows go.  Launched in plain stream order, like `CommitCursors`.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import memory
from cute_ssm.device.fakes import fake
from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.ops._cursors.rows import CursorRows
from cute_ssm.ops.build_work_items.config import choose_work_items
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec


class BuildWorkItems:
    """The kernel of a `WorkItemsSpec`; everything but types is dynamic."""

    def __init__(self, spec: WorkItemsSpec, config: CursorConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.warps = spec, config.warps
        self.rows = CursorRows(spec)

    @staticmethod
    def default_config(spec: WorkItemsSpec, arch: Arch, units: int | None = None) -> CursorConfig:
        """The config for a batch of `units`, by default a large one."""
        return choose_work_items(units if units is not None else 1 << 20)

    def fakes(self):
        """Arguments of `__call__` as the compiler sees them."""
        batch, slots = cute.sym_int32(), cute.sym_int32()
        items = fake(Int32, (batch, 4), (4, 1), 4)
        count = fake(Int32, (1,), (1,))
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return *self.rows.fakes(batch, slots), items, count, Int64(0), Int32(0), Int32(0), Int32(0), stream

    @cute.jit
    def __call__(
        self,
        pnat: cute.Tensor,
        cursor: cute.Tensor,
        src: Optional[cute.Tensor],
        cu: Optional[cute.Tensor],
        items: cute.Tensor,
        num_writes: cute.Tensor,
        pad_slot: Int64,
        tokens: Int32,
        window: Int32,
        places: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.serving.build_work_items`; `places` counts the values of the cursor."""
        self.kernel(pnat, cursor, src, cu, items, num_writes, pad_slot, tokens, window, places).launch(
            grid=[1, 1, 1], block=[WARP * self.warps, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        pnat: cute.Tensor,
        cursor: cute.Tensor,
        src: Optional[cute.Tensor],
        cu: Optional[cute.Tensor],
        items: cute.Tensor,
        num_writes: cute.Tensor,
        pad_slot: Int64,
        tokens: Int32,
        window: Int32,
        places: Int32,
    ):
        lane, warp = cute.arch.lane_idx(), cute.arch.thread_idx()[0] // WARP
        counts = SmemAllocator().allocate_array(Int32, WARP)
        cursors, sizes = (pnat, cursor, src, cu), (pad_slot, tokens, window, places)
        batch = items.shape[0]
        part = cute.ceil_div(batch, WARP * self.warps) * WARP
        first = warp * part

        mine = Int32(0)
        for start in cutlass.range(first, cutlass.min(first + part, batch), WARP, unroll=1):
            _, _, _, _, writes = self.row(cursors, start + lane, batch, sizes)
            mine += cute.arch.popc(cute.arch.vote_ballot_sync(writes))
        if lane == 0:
            memory.store_words(counts + warp, [mine])
        cute.arch.sync_threads()
        before, total = self.places_of(counts, warp, lane)
        if warp == 0 and lane == 0:
            num_writes[0] = total

        below = (Uint32(1) << Uint32(lane)) - Uint32(1)
        for start in cutlass.range(first, cutlass.min(first + part, batch), WARP, unroll=1):
            b = start + lane
            slot, kept, place, _, writes = self.row(cursors, b, batch, sizes)
            ballot = cute.arch.vote_ballot_sync(writes)
            rank = before + cute.arch.popc(ballot & Int32(below))
            if b < batch:
                to = rank if writes else total + b - rank
                memory.store_words(memory.address(items, to, 0), [Int32(b), slot, kept, place])
            before += cute.arch.popc(ballot)

    @cute.jit
    def places_of(self, counts, warp, lane):
        """(writes of the warps before this one, writes of all), from the counts of the warps."""
        value = memory.load_words(counts + cutlass.min(lane, self.warps - 1), 1)[0]
        value = value if lane < self.warps else Int32(0)
        before = value if lane < warp else Int32(0)
        return cute.arch.warp_reduction_sum(before), cute.arch.warp_reduction_sum(value)

    @cute.jit
    def row(self, cursors, b, batch, sizes):
        """(slot, PNAT, cursor, whether live, whether its step writes); a row that is not live has the pad's slot."""
        pad_slot, _, window, _ = sizes
        slot, count, kept, place, live = self.rows.load(cursors, cutlass.min(b, batch - 1), sizes)
        writes = live and b < batch and self.rows.writes(kept, count, window)
        name = Int32(slot) if live else Int32(pad_slot)
        kept = kept if live else Int32(0)
        place = place if live else Int32(0)
        return name, kept, place, live, writes

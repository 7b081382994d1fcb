"""`BuildWorkItems`: list the rows of a batch, first those whose step writes the state.

The rule is that of `cute_ssm.ops.build_work_items.reference`.  One CTA; each of its warps owns a contiguous part of the
batch, 32 rows at a time.  A first pass counts the rows of every part that write.  After the only barrier, a second
pass, whose loads hit the cache, stores each row at its position in the list.  Launched in plain stream order, like
`CommitCursors`.
"""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import memory
from cute_ssm.device.fakes import Layout, of_table
from cute_ssm.device.types import Maybe
from cute_ssm.ops._cursors.config import CursorConfig
from cute_ssm.ops._cursors.rows import CursorBounds, CursorRows, CursorTensors
from cute_ssm.ops.build_work_items.arguments import TABLE
from cute_ssm.ops.build_work_items.config import choose_work_items
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec


class WorkItem(NamedTuple):
    """A row of ``work_items`` but for its first column, the position in the batch."""

    slot: Int32
    pending: Int32
    cursor: Int32


class BuildWorkItems:
    """The kernel of a `WorkItemsSpec`; everything but types is dynamic."""

    def __init__(self, spec: WorkItemsSpec, config: CursorConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.warps = spec, config.warps
        self.rows = CursorRows(spec)

    @staticmethod
    def default_config(spec: WorkItemsSpec, arch: Arch, units: int | None = None) -> CursorConfig:
        """Return the config for a batch of `units`, by default a large one."""
        return choose_work_items(units if units is not None else 1 << 20)

    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        dtypes = {"state_batch_indices": self.spec.src_dtype, "cu_seqlens": self.spec.cu_dtype}
        tensors = of_table(TABLE, dtypes, {}, layouts={"num_writes": Layout((1,))})
        bounds = CursorBounds(Int64(0), Int32(0), Int32(0), Int32(0))
        return *tensors, *bounds, make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        prev_num_accepted_tokens: cute.Tensor,
        cursor: cute.Tensor,
        state_batch_indices: Maybe[cute.Tensor],
        cu_seqlens: Maybe[cute.Tensor],
        work_items: cute.Tensor,
        num_writes: cute.Tensor,
        pad_slot_id: Int64,
        num_tokens: Int32,
        window: Int32,
        num_cursors: Int32,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.serving.build_work_items`; for the scalars see `CursorBounds`."""
        tensors = CursorTensors(prev_num_accepted_tokens, cursor, state_batch_indices, cu_seqlens)
        bounds = CursorBounds(pad_slot_id, num_tokens, window, num_cursors)
        self.kernel(tensors, work_items, num_writes, bounds).launch(
            grid=[1, 1, 1], block=[WARP * self.warps, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, tensors: CursorTensors, work_items: cute.Tensor, num_writes: cute.Tensor, bounds: CursorBounds
    ) -> None:
        """Count the rows of this warp's part that write, then store all of its rows."""
        lane, warp = cute.arch.lane_idx(), cute.arch.thread_idx()[0] // WARP
        counts = SmemAllocator().allocate_array(Int32, WARP)
        batch = work_items.shape[0]
        part = cute.ceil_div(batch, WARP * self.warps) * WARP
        first = warp * part

        mine = Int32(0)
        for start in cutlass.range(first, cutlass.min(first + part, batch), WARP, unroll=1):
            _, writes = self.work_item(tensors, start + lane, batch, bounds)
            mine += cute.arch.popc(cute.arch.vote_ballot_sync(writes))
        if lane == 0:
            memory.store_words(counts + warp, [mine])
        cute.arch.sync_threads()
        before, total = self.sum_writes(counts, warp, lane)
        if warp == 0 and lane == 0:
            num_writes[0] = total

        below = (Uint32(1) << Uint32(lane)) - Uint32(1)
        for start in cutlass.range(first, cutlass.min(first + part, batch), WARP, unroll=1):
            b = start + lane
            item, writes = self.work_item(tensors, b, batch, bounds)
            ballot = cute.arch.vote_ballot_sync(writes)
            rank = before + cute.arch.popc(ballot & Int32(below))
            if b < batch:
                position = rank if writes else total + b - rank
                memory.store_words(memory.address(work_items, position, 0), [Int32(b), *item])
            before += cute.arch.popc(ballot)

    @cute.jit
    def sum_writes(self, counts: cute.Pointer, warp: Int32, lane: Int32) -> tuple[Int32, Int32]:
        """Return how many rows write of the warps before this one, and of all warps."""
        value = memory.load_words(counts + cutlass.min(lane, self.warps - 1), 1)[0]
        value = value if lane < self.warps else Int32(0)
        before = value if lane < warp else Int32(0)
        return cute.arch.warp_reduction_sum(before), cute.arch.warp_reduction_sum(value)

    @cute.jit
    def work_item(
        self, tensors: CursorTensors, b: Int32, batch: Int32, bounds: CursorBounds
    ) -> tuple[WorkItem, Boolean]:
        """Return the item of row b, and whether its step writes; an inactive row has the slot of padding and zeros."""
        row = self.rows.load(tensors, cutlass.min(b, batch - 1), bounds)
        writes = row.active and b < batch and self.rows.writes(row, bounds.window)
        slot = Int32(row.slot) if row.active else Int32(bounds.pad_slot_id)
        pending = row.pending if row.active else Int32(0)
        cursor = row.cursor if row.active else Int32(0)
        return WorkItem(slot, pending, cursor), writes

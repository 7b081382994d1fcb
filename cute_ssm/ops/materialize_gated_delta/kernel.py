"""`MaterializeGatedDelta`: writes the states that pending tokens lead to, from one slot to another.

Per (row of the batch, value head): the first j pending tokens are folded into the state S [V, K] of the slot that is
read, by `PendingTokens`, as in a step that flushes, so the bits are the same.  The result is rounded to nearest even.
With j = 0, if both pools have the same type, the bytes of S are copied.

A row of the batch is padding, and nothing is written for it, if a slot or cursor is out of range, or j exceeds the
number of pending tokens.  Rows of the rings after token j are not read.
"""

from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import of_table
from cute_ssm.device.types import Maybe
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose_untuned
from cute_ssm.ops._gated_delta.layout import PENDING_CHUNK, TILE
from cute_ssm.ops._gated_delta.pending import Pending, PendingTokens, Rings, chunk_count
from cute_ssm.ops._gated_delta.shared import SharedLayout, SharedMemory
from cute_ssm.ops._gated_delta.states import StateTiles, widened
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.materialize_gated_delta.arguments import TABLE
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec


class Tensors(NamedTuple):
    """Arguments of `cute_ssm.serving.materialize_gated_delta`."""

    initial_state: cute.Tensor
    k_cache: cute.Tensor
    v_cache: cute.Tensor
    g_cache: cute.Tensor
    beta_cache: cute.Tensor
    ring_start: cute.Tensor
    prev_num_accepted_tokens: cute.Tensor
    out: cute.Tensor
    state_batch_indices: cute.Tensor
    dst_state_batch_indices: cute.Tensor
    num_tokens: Maybe[cute.Tensor]


class MaterializeGatedDelta:
    """The kernel of a `MaterializeGatedDeltaSpec`; batch, heads, slots, lengths of rings and strides are dynamic."""

    def __init__(self, spec: MaterializeGatedDeltaSpec, config: GatedDeltaRuleConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.layout = SharedLayout(spec.sizes, config.rows)
        self.source = StateTiles(convert.DTYPES[spec.state_dtype], spec.K)
        self.target = StateTiles(convert.DTYPES[spec.out_dtype], spec.K, spec.saturate)
        self.pending = PendingTokens(convert.DTYPES[spec.input_dtype], spec.l2norm, self.layout, WARP * config.warps)
        self.tiles_per_warp = config.tiles()
        self.copies = spec.state_dtype == spec.out_dtype

    @staticmethod
    def default_config(
        spec: MaterializeGatedDeltaSpec, arch: Arch, units: Optional[int] = None
    ) -> GatedDeltaRuleConfig:  # fmt: skip
        """Return the config for `units` (row, value head) pairs, by default for more than the GPU can hold at once."""
        return choose_untuned(spec, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return stand-ins for the arguments of `__call__`, with what is static and which sizes are equal."""
        spec = self.spec
        dtypes = {
            "initial_state": spec.state_dtype,
            "k_cache": spec.input_dtype,
            "out": spec.out_dtype,
            "state_batch_indices": spec.src_dtype,
            "dst_state_batch_indices": spec.dst_dtype,
            "num_tokens": spec.count_dtype,
        }
        sizes = {"K": spec.K, "V": spec.V}
        return (*of_table(TABLE, dtypes, sizes), Int32(0), make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(
        self,
        initial_state: cute.Tensor,
        k_cache: cute.Tensor,
        v_cache: cute.Tensor,
        g_cache: cute.Tensor,
        beta_cache: cute.Tensor,
        ring_start: cute.Tensor,
        prev_num_accepted_tokens: cute.Tensor,
        out: cute.Tensor,
        state_batch_indices: cute.Tensor,
        dst_state_batch_indices: cute.Tensor,
        num_tokens: Maybe[cute.Tensor],
        window: Int32,
        stream: Any,
    ) -> None:
        """Launch one CTA for each unit.  Shapes and types as in `cute_ssm.serving.materialize_gated_delta`."""
        value_heads = initial_state.shape[1]
        parts = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        group = cute.FastDivmodDivisorV2(value_heads // k_cache.shape[1])
        tensors = Tensors(
            initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens, out,
            state_batch_indices, dst_state_batch_indices, num_tokens,
        )  # fmt: skip
        self.kernel(tensors, window, heads, group).launch(
            grid=[state_batch_indices.shape[0] * value_heads * parts, 1, 1],
            block=[WARP * self.config.warps, 1, 1],
            stream=stream,
        )
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        window: Int32,
        heads: cute.FastDivmodDivisorV2,
        group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Materialize rows of one head's state.  `heads` divides by value_heads, `group` by value_heads / heads."""
        shared = self.layout.allocate()
        parts = self.spec.V // self.config.rows
        block = cute.arch.block_idx()[0]
        pair = block // parts
        first_row = (block - pair * parts) * self.config.rows
        i, h = divmod(pair, heads)
        source, target = Int64(tensors.state_batch_indices[i]), Int64(tensors.dst_state_batch_indices[i])
        length = tensors.k_cache.shape[2]
        start, available = Int32(0), Int32(-1)
        if in_range(source, tensors.initial_state.shape[0]) and in_range(target, tensors.out.shape[0]):
            start, available = tensors.ring_start[source], tensors.prev_num_accepted_tokens[source]
        count = Int64(available)
        if const_expr(tensors.num_tokens is not None):
            num_tokens = tensors.num_tokens
            count = Int64(num_tokens[i])
        active = in_range(available, window + 1) and in_range(start, length)
        if active and in_range(count, Int64(available) + 1):
            key_head, head_in_group = divmod(h, group)
            unit = Unit(i, h, key_head, head_in_group, first_row, source)
            self.run(tensors, unit, target, Pending(start, Int32(count), length), shared)

    @cute.jit
    def run(self, tensors: Tensors, unit: Unit, target: Int64, pending: Pending, shared: SharedMemory) -> None:
        """Write all rows of a unit."""
        rings = Rings(tensors.k_cache, tensors.v_cache, tensors.g_cache, tensors.beta_cache)
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        column = warp * (self.tiles_per_warp * TILE)
        chunks = chunk_count(pending.count)
        if pending.count > 0:
            self.pending.stage(rings, shared, unit, pending, chunks * PENDING_CHUNK, thread)
            cute.arch.sync_threads()
            for c in cutlass.range(warp, chunks, self.config.warps, unroll=1):
                self.pending.prepare(rings, shared, unit, pending, c, lane)
            cute.arch.sync_threads()
        for m in cutlass.range_constexpr(self.tiles_per_warp):
            row = unit.first_row + column + m * TILE
            if const_expr(self.copies):
                if pending.count == 0:
                    self.copy_tile(tensors, unit, target, row, lane)
                else:
                    self.fold_tile(tensors, unit, target, row, shared, chunks, column + m * TILE, lane)
            else:
                self.fold_tile(tensors, unit, target, row, shared, chunks, column + m * TILE, lane)

    @cute.jit
    def fold_tile(
        self,
        tensors: Tensors,
        unit: Unit,
        target: Int64,
        row: Int32,
        shared: SharedMemory,
        chunks: Int32,
        column: Int32,
        lane: Int32,
    ) -> None:
        """Store a tile with the pending tokens folded in."""
        loaded = self.source.load(self.source.corner(tensors.initial_state, (unit.slot, unit.head), row, lane))
        tile = widened(loaded, self.source.dtype)
        for c in cutlass.range(chunks, unroll=1):
            tile = self.pending.fold(tile, shared, c, column, lane)
        # pinned: otherwise LLVM computes the addresses early and keeps them in registers
        target, h, row, lane = (memory.pinned(value) for value in (target, Int32(unit.head), Int32(row), Int32(lane)))
        self.target.store(self.target.corner(tensors.out, (target, h), row, lane), tile)

    @cute.jit
    def copy_tile(self, tensors: Tensors, unit: Unit, target: Int64, row: Int32, lane: Int32) -> None:
        """Copy the bytes of a tile."""
        corner = self.target.corner(tensors.out, (target, unit.head), row, lane)
        tile = self.source.load(self.source.corner(tensors.initial_state, (unit.slot, unit.head), row, lane))
        self.target.copy(corner, tile)

"""`Consumer`: warps of `CheckpointingSSU` that multiply, each through its own pipeline of tiles.

For every tile a consumer computes the outputs (`TileOutputs`), and in steps that write the state the new state
(`StateFold`).
"""

from typing import Any, Union

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Numeric, const_expr

from cute_ssm.device import memory, philox
from cute_ssm.device.tile import StateTile, TileCopy
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.config import ALL_UNITS, READ_UNITS, TOKENS, WRITE_UNITS, LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.outputs import TileOutputs, TokenBlock
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.state_fold import StateFold
from cute_ssm.ops.checkpointing_ssu.unaligned_rows import UnalignedRows
from cute_ssm.ops.checkpointing_ssu.units import (
    Barriers,
    OutputTensors,
    Pipelines,
    TilePipeline,
    TokenRows,
    UnitBuffers,
    UnitHeader,
    UnitRange,
)

UNROLLED = 4  # most tiles of a consumer and unit that are unrolled: more exceed the code cache, or registers
NO_STAGE = -1


class Consumer:
    """The consumer warps of a kernel."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch: LaunchConfig,
        layout: UnitLayout,
        tile: StateTile,
        input_dtype: type[Numeric],
    ):
        self.spec, self.launch, self.layout, self.tile = spec, launch, layout, tile
        self.pipelines = Pipelines(launch)
        self.token_rows = TokenRows(spec.cu_dtype is not None)
        self.unaligned_rows = UnalignedRows(spec, layout, self.token_rows)
        self.outputs = TileOutputs(spec, launch, layout, tile, input_dtype)
        self.state_fold = StateFold(spec, launch, layout, tile, input_dtype)
        self.tiles_per_consumer = launch.tiles_per_consumer
        self.one_block = spec.tokens <= TOKENS
        few = self.tiles_per_consumer <= UNROLLED
        self.unrolled = self.one_block and few and not tile.wide and spec.dstate <= 128
        self.stages_reused = not launch.fused or self.tiles_per_consumer > launch.depth

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def run(
        self,
        consumer: Int32,
        unit_range: UnitRange,
        outputs: OutputTensors,
        store: TileCopy,
        tiles: cute.Pointer,
        units: cute.Pointer,
        barriers: Barriers,
    ) -> None:
        """Work on this consumer's tiles of all units of a CTA."""
        lane = cute.arch.lane_idx()
        tile_pointers = self.tile.pointers(tiles, lane)
        if const_expr(self.launch.fused):
            self._unit(consumer, Int32(0), Int32(0), outputs, store, tile_pointers, units, barriers, lane)
        else:
            count, num_tiles = Int32(0), Int32(0)
            for _ in cutlass.range(unit_range.first, unit_range.end, unit_range.stride):
                pending = self._unit(consumer, count, num_tiles, outputs, store, tile_pointers, units, barriers, lane)
                num_tiles += self.tiles_per_consumer if pending >= 0 else 0
                count += 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def _unit(
        self,
        consumer: Int32,
        count: Int32,
        num_tiles: Int32,
        outputs: OutputTensors,
        store: TileCopy,
        tile_pointers: list[cute.Pointer],
        units: cute.Pointer,
        barriers: Barriers,
        lane: Int32,
    ) -> Int32:
        """Work on this consumer's tiles of a CTA's unit number `count`; return the pending tokens, or `INACTIVE`."""
        layout, works_on = self.layout, self.launch.works_on
        stage, phase = self.pipelines.unit_stage(count)
        offset = stage * layout.unit_bytes
        cute.arch.mbarrier_wait(barriers.unit_full + stage, phase)
        header_at = cute.recast_ptr(units + (offset + layout.header), dtype=Int32)
        header = UnitHeader.load(header_at)
        if header.pending >= 0:
            # opaque: else LLVM keeps every address of a tile in a register
            pointers = [pointer + memory.pinned(Int32(0)) for pointer in tile_pointers]
            pipeline = TilePipeline(barriers.full, barriers.empty, num_tiles, consumer)
            buffers = UnitBuffers(units, offset, pointers)
            block = self.outputs.token_block(header, buffers, lane, 0) if const_expr(self.one_block) else None
            writes = Boolean(works_on == WRITE_UNITS)
            if const_expr(works_on == ALL_UNITS):
                writes = header.pending + header.num_tokens > self.spec.window
            if const_expr(works_on != READ_UNITS):
                if writes:
                    self._write_tiles(header, buffers, pipeline, block, outputs, store, lane)
            if const_expr(works_on != WRITE_UNITS):
                if not writes:
                    self._read_tiles(header, buffers, pipeline, block, lane)
            self._store_outputs(consumer, header, header_at, outputs.out, units, offset, lane)
        if const_expr(not self.launch.fused):
            cute.arch.sync_warp()
            self._arrive(barriers.unit_empty + stage, lane)
        return header.pending

    @cute.jit
    def _store_outputs(
        self,
        consumer: Int32,
        header: UnitHeader,
        header_at: cute.Pointer,
        out: cute.Tensor,
        units: cute.Pointer,
        offset: Int32,
        lane: Int32,
    ) -> None:
        """Store this consumer's columns of a unit's outputs, which have replaced z, by one copy per row."""
        layout = self.layout
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        unit = header
        # Reload: keeping these live spills 12 bytes with stochastic int8.  In a loop, reloading spills 32 with int16.
        if const_expr(self.launch.fused):
            unit = UnitHeader.load(header_at)
        width = self.tiles_per_consumer * layout.tile_rows * 2
        if const_expr(not self.spec.aligned):
            first_row = self.token_rows.address(out, unit, 0, unit.head, unit.column).toint() + Int64(consumer * width)
            rows = units + (offset + layout.z + consumer * width)
            self.unaligned_rows.store(first_row, out.stride[1] * 2, header.num_tokens, rows, width, lane)
        by_bulk = self.spec.tokens if const_expr(self.spec.aligned) else 0
        for base in cutlass.range_constexpr(0, by_bulk, 32):
            t = base + lane
            if t < header.num_tokens:
                to = self.token_rows.address(out, unit, t, unit.head, unit.column).toint() + Int64(consumer * width)
                source = units + (offset + layout.z + t * layout.x_pitch + consumer * width)
                memory.bulk_store(memory.global_bytes(to), source, width)
        cute.arch.cp_async_bulk_commit_group()
        if const_expr(not self.launch.fused):
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    # ----------------------------------------------------------------------------------------------------------- tiles
    @cute.jit
    def _read_tiles(
        self,
        header: UnitHeader,
        buffers: UnitBuffers,
        pipeline: TilePipeline,
        block: Maybe[TokenBlock],
        lane: Int32,
    ) -> None:
        """Work on all tiles of this consumer in a unit whose state is not written."""
        if const_expr(self.unrolled):
            for i in cutlass.range_constexpr(self.tiles_per_consumer):
                self._read_tile(i, header, buffers, pipeline, block, lane)
        else:
            for i in cutlass.range(self.tiles_per_consumer, unroll=1):
                self._read_tile(i, header, buffers, pipeline, block, lane)

    @cute.jit
    def _read_tile(
        self,
        i: Union[Int32, int],
        header: UnitHeader,
        buffers: UnitBuffers,
        pipeline: TilePipeline,
        block: Maybe[TokenBlock],
        lane: Int32,
    ) -> None:
        stage = self._wait_tile(i, pipeline)
        pointers = [pointer + stage * self.layout.tile_bytes for pointer in buffers.tile_pointers]
        if const_expr(self.one_block):
            sums = self.tile.product(pointers, block.projection)
            self._release(pipeline.empty, stage, lane)  # as early as possible, for the next tile
            self.outputs.compute(i, pipeline.consumer, header, buffers, block, 0, sums, lane)
        else:
            self._token_blocks(i, pipeline.consumer, header, buffers, pointers, lane)
            self._release(pipeline.empty, stage, lane)

    @cute.jit
    def _token_blocks(
        self,
        i: Int32,
        consumer: Int32,
        header: UnitHeader,
        buffers: UnitBuffers,
        pointers: list[cute.Pointer],
        lane: Int32,
    ) -> None:
        """Compute the outputs of a tile, eight tokens at a time."""
        for first in cutlass.range_constexpr(0, self.spec.tokens, TOKENS):
            if first < header.num_tokens:
                block = self.outputs.token_block(header, buffers, lane, first)
                sums = self.tile.product(pointers, block.projection)
                self.outputs.compute(i, consumer, header, buffers, block, first, sums, lane)

    @cute.jit
    def _write_tiles(
        self,
        header: UnitHeader,
        buffers: UnitBuffers,
        pipeline: TilePipeline,
        block: Maybe[TokenBlock],
        outputs: OutputTensors,
        store: TileCopy,
        lane: Int32,
    ) -> None:
        """Work on all tiles of this consumer in a unit whose state is written."""
        lane = memory.pinned(lane)  # stops LLVM hoisting addresses that only units with writes need
        first_tile = header.tile + pipeline.consumer * self.tiles_per_consumer
        random = self._random(header.slot, outputs.rand_seed)
        columns = self.state_fold.history_columns(header.pending, buffers, lane)
        storing = Int32(NO_STAGE)  # the stage whose new state is being stored
        for i in cutlass.range(self.tiles_per_consumer, unroll=1):
            stage = self._wait_tile(i, pipeline)
            pointers = [pointer + stage * self.layout.tile_bytes for pointer in buffers.tile_pointers]
            if const_expr(self.one_block):
                pinned = memory.pinned(lane) if const_expr(self.state_fold.random_rows) else lane
                sums = self.tile.product(pointers, block.projection)
                self.outputs.compute(i, pipeline.consumer, header, buffers, block, 0, sums, pinned)
            else:
                self._token_blocks(i, pipeline.consumer, header, buffers, pointers, lane)
            if storing >= 0:
                self._release_stored(pipeline.empty, storing, lane)
            storing = Int32(NO_STAGE)
            if header.pending > 0:  # else the state does not change
                self.state_fold.fold(
                    i, pipeline.consumer, header, buffers, pointers, columns, outputs.state_scale, random, lane
                )
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:  # unlike copies from a tensor map, copies to one do not elect a lane
                    cute.copy(store.atom, store.shared[(None, stage)], store.pool[(None, first_tile + i, header.slot)])
                cute.arch.cp_async_bulk_commit_group()
                if const_expr(self.launch.depth > 1):
                    storing = stage
                else:
                    self._release_stored(pipeline.empty, stage, lane)
            else:
                self._release(pipeline.empty, stage, lane)
        if storing >= 0:
            self._release_stored(pipeline.empty, storing, lane)

    def _random(self, slot: Int32, rand_seed: Maybe[cute.Tensor]) -> Any:
        """Return the seed of a slot, or round keys from it; None if states are rounded to nearest."""
        if self.tile.rounds == 0:
            return None
        seed = rand_seed[slot if self.spec.seed_per_slot else 0]
        return seed if self.tile.scaled else philox.round_keys(seed, self.tile.rounds)

    # -------------------------------------------------------------------------------------------------------- pipelines
    @cute.jit
    def _wait_tile(self, i: Union[Int32, int], pipeline: TilePipeline) -> Int32:
        """Wait for this consumer's i-th tile of the unit; return its stage."""
        first, phase = self.pipelines.tile_stage(pipeline.first_tile + i)
        cute.arch.mbarrier_wait(pipeline.full + (first + pipeline.consumer), phase)
        return first + pipeline.consumer

    def _release(self, empty: cute.Pointer, stage: Int32, lane: Int32) -> None:
        """Release a stage that all lanes have read."""
        if self.stages_reused:
            cute.arch.sync_warp()
            self._arrive(empty + stage, lane)

    def _release_stored(self, empty: cute.Pointer, stage: Int32, lane: Int32) -> None:
        """Release a stage once the copy of its new state has read it."""
        if self.stages_reused:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            self._release(empty, stage, lane)

    @cute.jit
    def _arrive(self, bar: cute.Pointer, lane: Int32) -> None:
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

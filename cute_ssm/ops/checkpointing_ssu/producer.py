"""`Producer`: the warp of `CheckpointingSSU` that requests everything that other warps need.

Tiles of the state come by a tensor map, one instruction each, as long as stages are free.  Rows of x, B, C and z come
by bulk copies, one lane a row, or from `UnalignedRows`.  Rows of the history that hold no pending token are not read.
"""

from typing import NamedTuple, Union

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import memory
from cute_ssm.device.history import History, HistoryView
from cute_ssm.device.tile import TileCopy
from cute_ssm.ops.checkpointing_ssu.config import LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.prep import Prep
from cute_ssm.ops.checkpointing_ssu.spec import EARLY_READS, CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.unaligned_rows import UnalignedRows
from cute_ssm.ops.checkpointing_ssu.units import (
    Barriers,
    InputTensors,
    OutputTensors,
    Pipelines,
    Scheduler,
    TokenRows,
    Unit,
    UnitRange,
    Work,
)


class _TileRequests(NamedTuple):
    """The tiles of a unit, and the pipelines that they are loaded into."""

    load: TileCopy
    full: cute.Pointer
    empty: cute.Pointer
    first_tile: Int32
    slot: Int64


class Producer:
    """The producer warp of a kernel."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch: LaunchConfig,
        layout: UnitLayout,
        history_view: HistoryView,
        scheduler: Scheduler,
        prep: Prep,
    ):
        self.spec, self.launch, self.layout = spec, launch, layout
        self.history_view, self.scheduler, self.prep = history_view, scheduler, prep
        self.early_reads = spec.pdl == EARLY_READS
        self.pipelines = Pipelines(launch)
        self.token_rows = TokenRows(spec.cu_dtype is not None)
        self.unaligned_rows = UnalignedRows(spec, layout, self.token_rows)
        self.tiles_per_consumer = launch.tiles_per_consumer
        self.prefetched = min(launch.depth, launch.tiles_per_consumer)  # tiles of a unit that stages hold

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def run(
        self,
        unit_range: UnitRange,
        work: Work,
        history: History,
        inputs: InputTensors,
        outputs: OutputTensors,
        load: TileCopy,
        units: cute.Pointer,
        barriers: Barriers,
    ) -> None:
        """Request all units of a CTA; prepare its only unit if there is no prep warp."""
        if const_expr(self.launch.fused):
            self._only_unit(unit_range.first, work, history, inputs, outputs, load, units, barriers)
        else:
            count, num_tiles = Int32(0), Int32(0)
            for index in cutlass.range(unit_range.first, unit_range.end, unit_range.stride):
                active = self._unit(index, count, num_tiles, work, history, inputs, outputs, load, units, barriers)
                num_tiles += self.tiles_per_consumer if active else 0
                count += 1
            if const_expr(self.spec.pdl is not None):
                if const_expr(self.early_reads):
                    cute.arch.griddepcontrol_wait()  # for a CTA without units, which has not waited
                cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def _only_unit(
        self,
        index: Int32,
        work: Work,
        history: History,
        inputs: InputTensors,
        outputs: OutputTensors,
        load: TileCopy,
        units: cute.Pointer,
        barriers: Barriers,
    ) -> None:
        """Request and prepare the only unit of a CTA.

        One tile of each consumer comes before the rows, which all work waits for; the other tiles that stages hold
        come after them.  With early reads, all of these tiles come before the wait for the upstream kernel.
        """
        unit_full = barriers.unit_full
        before_wait = self.prefetched if self.early_reads else 0
        before_rows = max(before_wait, 1)
        lane = cute.arch.lane_idx()
        unit = self.scheduler.unit(index, work)
        requests = _TileRequests(load, barriers.full, barriers.empty, unit.tile, unit.slot)
        if unit.active:
            for i in cutlass.range_constexpr(before_wait):
                self._request_into_new_stages(requests, i, lane)
        if const_expr(self.early_reads):
            cute.arch.griddepcontrol_wait()
        if unit.active:
            for i in cutlass.range_constexpr(before_wait, before_rows):
                self._request_into_new_stages(requests, i, lane)
            words = self.prep.load(unit, history, inputs, 0, lane)  # in flight while requests are made
            self._request_rows(unit, history, inputs, outputs, units, unit_full, lane)
            for i in cutlass.range_constexpr(before_rows, self.prefetched):
                self._request_into_new_stages(requests, i, lane)
            if const_expr(not self.spec.aligned):
                self.unaligned_rows.stage(unit, inputs, units, unit_full, lane)
            self.prep.store_decays(unit, history, inputs, words, units, lane)
        elif lane == 0:
            cute.arch.mbarrier_arrive(unit_full)
        self.prep.store_header(unit, units, unit_full, lane)
        if unit.active:
            for i in cutlass.range(self.prefetched, self.tiles_per_consumer, unroll=1):
                self._request(requests, Int32(0), i, lane)
        if const_expr(self.spec.pdl is not None):
            cute.arch.griddepcontrol_launch_dependents()
        self.prep.append(unit, history, units, unit_full, Int32(0), lane)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def _unit(
        self,
        index: Int32,
        count: Int32,
        num_tiles: Int32,
        work: Work,
        history: History,
        inputs: InputTensors,
        outputs: OutputTensors,
        load: TileCopy,
        units: cute.Pointer,
        barriers: Barriers,
    ) -> Boolean:
        """Request a CTA's unit number `count`; return whether it is active.

        Rows come first, because all work waits for them.  If they have to wait for the buffer of the unit before, the
        tiles that stages hold come first.  Of a CTA's first unit, one tile of each consumer comes first, or with early
        reads all tiles that stages hold.
        """
        at_first = self.prefetched if self.early_reads else 1
        later = self.prefetched if self.launch.unit_stages == 1 else 0
        lane = cute.arch.lane_idx()
        unit = self.scheduler.unit(index, work)
        stage, phase = self.pipelines.unit_stage(count)
        bar = barriers.unit_full + stage
        requests = _TileRequests(load, barriers.full, barriers.empty, unit.tile, unit.slot)
        before_rows = at_first if count == 0 else later
        if unit.active:
            for i in cutlass.range(before_rows, unroll=1):
                self._request(requests, num_tiles, i, lane)
        cute.arch.mbarrier_wait(barriers.unit_empty + stage, phase ^ 1)
        if const_expr(self.early_reads):
            if count == 0:  # for an inactive unit too: the next one does not wait
                cute.arch.griddepcontrol_wait()
        if unit.active:
            buffer = units + stage * self.layout.unit_bytes
            self._request_rows(unit, history, inputs, outputs, buffer, bar, lane)
            if const_expr(not self.spec.aligned):
                self.unaligned_rows.stage(unit, inputs, buffer, bar, lane)
            for i in cutlass.range(before_rows, self.tiles_per_consumer, unroll=1):
                self._request(requests, num_tiles, i, lane)
        elif lane == 0:
            cute.arch.mbarrier_arrive(bar)
        return unit.active

    # ----------------------------------------------------------------------------------------------------------- tiles
    @cute.jit
    def _request_into_new_stages(self, requests: _TileRequests, i: cutlass.Constexpr, lane: Int32) -> None:
        """Request the i-th tile of every consumer into stages that were never used."""
        first = self.pipelines.tile_stage(i).stage
        if lane < self.launch.consumers:  # a stage each
            cute.arch.mbarrier_arrive_and_expect_tx(requests.full + (first + lane), self.layout.tile_bytes)
        cute.arch.sync_warp()
        for consumer in cutlass.range_constexpr(self.launch.consumers):
            self._copy_tile(requests, first + consumer, consumer * self.tiles_per_consumer + i)

    @cute.jit
    def _request(self, requests: _TileRequests, num_tiles: Int32, i: Int32, lane: Int32) -> None:
        """Request the i-th tile of every consumer, each as soon as its stage is empty."""
        first, phase = self.pipelines.tile_stage(num_tiles + i)
        for consumer in cutlass.range_constexpr(self.launch.consumers):
            cute.arch.mbarrier_wait(requests.empty + (first + consumer), phase ^ 1)
            if lane == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(requests.full + (first + consumer), self.layout.tile_bytes)
            self._copy_tile(requests, first + consumer, consumer * self.tiles_per_consumer + i)

    def _copy_tile(self, requests: _TileRequests, stage: Union[Int32, int], i: Union[Int32, int]) -> None:
        """Copy a tile of the unit to a stage; consumers have contiguous shares of a unit's tiles."""
        load, tile = requests.load, requests.first_tile + i
        source = load.pool[(None, tile, Int32(requests.slot))]
        cute.copy(load.atom, source, load.shared[(None, stage)], tma_bar_ptr=requests.full + stage)

    # ------------------------------------------------------------------------------------------------------------ rows
    @cute.jit
    def _request_rows(
        self,
        unit: Unit,
        history: History,
        inputs: InputTensors,
        outputs: OutputTensors,
        buffer: cute.Pointer,
        bar: cute.Pointer,
        lane: Int32,
    ) -> None:
        """Request what a unit needs besides tiles: positions of x and B in order, rows of C and z, scales.

        Rows of new tokens that are not aligned are left to `UnalignedRows.stage`, which also arrives.
        """
        spec, layout = self.spec, self.layout
        pending, num_tokens = unit.pending, unit.num_tokens
        width, columns = layout.width, spec.dstate * 2
        scale_bytes = layout.width * 2 if const_expr(spec.scaled) else 0
        group = unit.head // spec.heads_per_group
        positions = pending + num_tokens if const_expr(spec.aligned) else pending
        if lane == 0:
            if const_expr(spec.aligned):
                per_token = width * 2 + columns * 2 if const_expr(spec.has_z) else width + columns * 2
                n_bytes = pending * (width + columns) + num_tokens * per_token + scale_bytes
                cute.arch.mbarrier_arrive_and_expect_tx(bar, n_bytes)
            else:
                cute.arch.mbarrier_expect_tx(bar, pending * (width + columns) + scale_bytes)
            if const_expr(spec.scaled):
                source = memory.address(outputs.state_scale, unit.slot, unit.head, unit.column).toint()
                memory.bulk_load(buffer + layout.scales, memory.global_bytes(source), scale_bytes, bar)
        for base in cutlass.range_constexpr(0, layout.rows, WARP):
            j = base + lane
            if j < positions:
                self._request_position(unit, history, inputs, j, group, buffer, bar)
        by_bulk = spec.tokens if const_expr(spec.aligned) else 0
        for base in cutlass.range_constexpr(0, by_bulk, WARP // 2):  # half a warp for z, the other for C
            t = base + lane % 16
            if t < num_tokens:
                if lane >= 16:
                    source = self.token_rows.address(inputs.C, unit, t, group, 0).toint()
                    to = buffer + (layout.c + t * layout.column_pitch)
                    memory.bulk_load(to, memory.global_bytes(source), columns, bar)
                elif const_expr(spec.has_z):
                    source = self.token_rows.address(inputs.z, unit, t, unit.head, unit.column).toint()
                    to = buffer + (layout.z + t * layout.x_pitch)
                    memory.bulk_load(to, memory.global_bytes(source), width, bar)
        cute.arch.sync_warp()

    @cute.jit
    def _request_position(
        self,
        unit: Unit,
        history: History,
        inputs: InputTensors,
        j: Int32,
        group: Int32,
        buffer: cute.Pointer,
        bar: cute.Pointer,
    ) -> None:
        """Request x and B of a position: of a pending token from the history, of a new one from the inputs."""
        layout, pending = self.layout, unit.pending
        rows = self.history_view.rows(history.dt)
        t = cutlass.max(j - pending, 0)
        old = self.history_view.pending_row(unit.cursor, cutlass.min(j, pending), rows)
        from_B = self.token_rows.address(inputs.B, unit, t, group, 0).toint()
        if j < pending:
            from_B = self.history_view.B(history.B, unit.slot, old, group).toint()
        to = buffer + (layout.b + j * layout.column_pitch)
        memory.bulk_load(to, memory.global_bytes(from_B), self.spec.dstate * 2, bar)
        to = buffer + (layout.x + j * layout.x_pitch)
        from_x = self.token_rows.address(inputs.x, unit, t, unit.head, unit.column).toint()
        if const_expr(not self.history_view.ring):
            if j < pending:
                from_x = self.history_view.x(history.x, unit.slot, old, unit.head, unit.column).toint()
            memory.bulk_load(to, memory.global_bytes(from_x), layout.width, bar)
        elif j >= pending:
            memory.bulk_load(to, memory.global_bytes(from_x), layout.width, bar)
        else:
            piece = layout.head_bytes
            for h in cutlass.range_constexpr(layout.heads):
                source = self.history_view.x(history.x, unit.slot, old, unit.head + h, unit.column).toint()
                memory.bulk_load(to + h * piece, memory.global_bytes(source), piece, bar)

"""`SingleToken`: the update of a unit by the only token of its sequence, for `SelectiveStep`."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import math
from cute_ssm.device.state import StateView
from cute_ssm.ops.selective_state_update.config import SelectiveStepConfig
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.state_stores import ScaleTarget, StateStores
from cute_ssm.ops.selective_state_update.token_io import TokenIO
from cute_ssm.ops.selective_state_update.units import Destination, Scalars, Stage, Tensors, Unit


class SingleToken:
    """One token streams through a block: a row is stored as soon as it is computed, unless it has to be scaled."""

    def __init__(
        self,
        spec: SelectiveStateUpdateSpec,
        config: SelectiveStepConfig,
        view: StateView,
        io: TokenIO,
        stores: StateStores,
    ) -> None:
        self.spec, self.view, self.io, self.stores = spec, view, io, stores
        self.blocks = config.rows // config.block_rows

    @cute.jit
    def update(
        self,
        tensors: Tensors,
        scalars: Scalars,
        unit: Unit,
        destination: Destination,
        stage: Stage,
        phase: Int32,
        lane: Int32,
    ) -> None:
        """Update a unit, in place in its stage."""
        group, _ = divmod(unit.head, scalars.heads_per_group)
        B, C = (self.io.load_columns(self.io.pointer(t, unit, 0, group, 0), lane) for t in (tensors.B, tensors.C))
        head = self.io.load_head(tensors, unit, 0)
        random = self.stores.random(tensors, unit, destination.slot, Int32(0))
        cute.arch.mbarrier_wait(stage.full, phase)
        for i in cutlass.range(self.blocks, unroll=min(self.blocks, 2)):
            block = self.view.block_of(unit.first_row, stage.at, i, lane)
            row_scalars = self.io.load_row(head, tensors, unit, 0, block.row)
            scale = self.stores.load_scale(tensors, unit, block.row)
            rows, sums = [], []
            for s in cutlass.range_constexpr(self.view.steps):
                gain = math.exchanged(row_scalars.gain, s)
                decays = self.io.column_decays(tensors, unit, row_scalars.decay, block.first_row, s, lane)
                values, total = self.view.load(block.at, lane, s, scale), Float32(0.0)
                for k in cutlass.range_constexpr(self.view.columns):
                    values[k] = cute.math.fma(gain, B[k], values[k] * decays[k])
                    total = cute.math.fma(values[k], C[k], total)
                sums.append(total)
                rows.append(values)
                if const_expr(self.spec.writes_last_state and not self.view.scaled):
                    self.view.store(block, lane, s, values, None, random)
            y = math.sum_exchanged(sums, self.view.lanes)
            if self.view.owns_row(lane):
                self.io.store_output(tensors, unit, 0, block.row, y, row_scalars.skip)
            if const_expr(self.spec.writes_last_state and self.view.scaled):
                target = ScaleTarget(tensors.state_scale, (destination.slot, unit.head, block.row))
                self.stores.store_rows(target, destination.active, rows, block, random, lane)

"""`TokenLoop`: the update of a block by several tokens one after another, for `SelectiveStep`.

A block's state stays in float32 registers for all tokens.  Where one decay per head and token holds (A and dt tied),
it stays divided by the running product of the decays, so that a token costs two operations an element:

    h_t = p_t g_t,   p_t = p_{t-1} e^(A dt'_t),   g_t = g_{t-1} + (dt'_t x_t / p_t) B_t^T

When p leaves [2^-60, 2^60], g is multiplied by it and it restarts at one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import math
from cute_ssm.device.state import StateView
from cute_ssm.ops.selective_state_update.columns import StagedColumns
from cute_ssm.ops.selective_state_update.config import STAGED_TOKENS
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.state_stores import ScaleTarget, StateStores
from cute_ssm.ops.selective_state_update.token_io import HeadScalars, TokenIO
from cute_ssm.ops.selective_state_update.units import Destination, Scalars, Tensors, Unit, pin

SMALLEST, LARGEST = 2.0**-60, 2.0**60  # of the running product of decays: its reciprocal times an input stays finite


class TokenLoop:
    """Several tokens, one after another; B and C come from `staged` where it is possible, else from global memory."""

    def __init__(
        self,
        spec: SelectiveStateUpdateSpec,
        view: StateView,
        io: TokenIO,
        stores: StateStores,
        staged: StagedColumns,
    ) -> None:
        self.spec, self.view, self.io, self.stores, self.staged = spec, view, io, stores, staged

    @cute.jit
    def update_block(
        self,
        tensors: Tensors,
        scalars: Scalars,
        unit: Unit,
        destination: Destination,
        at: cute.Pointer,
        shared: cute.Pointer,
        i: Int32,
        lane: Int32,
    ) -> None:
        """Update block `i` of the unit at `at` by all tokens of its sequence; `shared` is for B and C."""
        unit = pin(unit)
        count = unit.num_tokens
        group, _ = divmod(unit.head, scalars.heads_per_group)
        block = self.view.block_of(unit.first_row, at, i, lane)
        old_scale = self.stores.load_scale(tensors, unit, block.row)
        held = cute.make_rmem_tensor((self.view.steps * self.view.columns,), Float32)
        for s in cutlass.range_constexpr(self.view.steps):
            values = self.view.load(block.at, lane, s, old_scale)
            for k in cutlass.range_constexpr(self.view.columns):
                held[s * self.view.columns + k] = values[k]
        product, steps, decays_of_lanes = Float32(1.0), Float32(0.0), Float32(0.0)
        for t in cutlass.range(count, unroll=1):
            head = HeadScalars(None, None, None)
            if const_expr(self.spec.decay_tied):
                if t & (WARP - 1) == 0:  # a lane computes the scalars of one of 32 tokens
                    own_token = self.io.load_head(tensors, unit, cutlass.min(t + lane, count - 1))
                    steps, decays_of_lanes = own_token.step, own_token.decay
                step = math.from_lane(steps, t & (WARP - 1))
                decay = math.from_lane(decays_of_lanes, t & (WARP - 1))
                product *= decay
                if product < SMALLEST or product > LARGEST:
                    self.multiply(held, product)
                    product = Float32(1.0)
                head = HeadScalars(step, None, decay)
            elif const_expr(self.spec.A_tied or self.spec.dt_tied):
                head = self.io.load_head(tensors, unit, t)
            row_scalars = self.io.load_row(head, tensors, unit, t, block.row)
            if const_expr(self.staged.possible):
                if t & (STAGED_TOKENS - 1) == 0 and (
                    i == 0 or count > STAGED_TOKENS
                ):  # few tokens stay staged for all blocks
                    self.staged.stage(tensors, unit, t, group, shared, lane)
                B, C = (self.staged.load(shared, which, t & (STAGED_TOKENS - 1), lane) for which in range(2))
            else:
                B, C = (
                    self.io.load_columns(self.io.pointer(tensor, unit, t, group, 0), lane)
                    for tensor in (tensors.B, tensors.C)
                )
            row_gain = row_scalars.gain
            if const_expr(self.spec.decay_tied):
                row_gain = row_gain * math.reciprocal(product)
            sums = []
            for s in cutlass.range_constexpr(self.view.steps):
                gain, total = math.exchanged(row_gain, s), Float32(0.0)
                decays: list[Float32] = []
                if const_expr(not self.spec.decay_tied):
                    decays = self.io.column_decays(tensors, unit, row_scalars.decay, block.first_row, s, lane)
                for k in cutlass.range_constexpr(self.view.columns):
                    value = held[s * self.view.columns + k]
                    if const_expr(not self.spec.decay_tied):
                        value = value * decays[k]
                    value = cute.math.fma(gain, B[k], value)
                    held[s * self.view.columns + k] = value
                    total = cute.math.fma(value, C[k], total)
                sums.append(total)
            y = math.sum_exchanged(sums, self.view.lanes)
            if const_expr(self.spec.decay_tied):
                y *= product
            if self.view.owns_row(lane):
                self.io.store_output(tensors, unit, t, block.row, y, row_scalars.skip)
            if const_expr(self.spec.writes_every_state):
                rows = self.state_rows(held, product)
                self.stores.store_token_state(tensors, scalars, unit, rows, block, t, lane)
        if const_expr(self.spec.writes_last_state):
            if const_expr(self.spec.writes_every_state):
                self.stores.wait_for_copies(lane)
            rows = self.state_rows(held, product)
            random = self.stores.random(tensors, unit, destination.slot, count - 1)
            if const_expr(self.view.scaled):
                target = ScaleTarget(tensors.state_scale, (destination.slot, unit.head, block.row))
                self.stores.store_rows(target, destination.active, rows, block, random, lane)
            else:
                for s in cutlass.range_constexpr(self.view.steps):
                    self.view.store(block, lane, s, rows[s], None, random)

    def multiply(self, held: cute.Tensor, factor: Float32) -> None:
        """Multiply the registers of a block."""
        for k in range(self.view.steps * self.view.columns):
            held[k] = held[k] * factor

    def state_rows(self, held: cute.Tensor, product: Float32) -> list[list[Float32]]:
        """Return the state of a block as a list of columns for each step, with the running product multiplied in."""
        n = self.view.columns
        rows = [[held[s * n + k] for k in range(n)] for s in range(self.view.steps)]
        return [[value * product for value in row] for row in rows] if self.spec.decay_tied else rows

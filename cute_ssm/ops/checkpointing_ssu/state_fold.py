"""`StateFold`: the new state of a tile, of `CheckpointingSSU`: pending tokens accumulated on the decayed old state."""

from typing import Any, NamedTuple, Optional, Union

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric, const_expr

from cute_ssm.device import convert, math, memory, mma, philox
from cute_ssm.device.math import power_of_two
from cute_ssm.device.tile import ROWS, Accumulators, StateTile
from cute_ssm.device.tokens import TokenOperands
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.config import STEP, LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.rows import UnitRows, load_float
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.units import UnitBuffers, UnitHeader

SMALLEST_QUANT_STEP = 2.0**-90  # of a quantised row: its inverse times an input stays finite
HELD_COLUMNS = 128  # most columns for which registers hold 16 quantised rows until their scales are known
HELD_HISTORY = 32  # registers that may hold B of the history for all tiles of a unit
IN_FLIGHT = 4  # quads of a new state whose products overlap
# Parts of coefficients of new states, by types of x and of states, where not two.  The root mean square of their error
# is at most a quarter of that of the rounding that follows.
PARTS = {
    "bfloat16": {"float8_e4m3fn": 1, "float32": 3},
    "float16": {"bfloat16": 1, "int8": 1, "float8_e4m3fn": 1, "float32": 3},
}

HistoryColumns = list[Any]  # for each step of 16 positions, operands by quad, or addresses of rows of B
Weighed = list[Any]  # for each step, operands of `TokenOperands.accumulate`


class _Fold(NamedTuple):
    """A tile whose new state is computed, and what all of its rows need."""

    pointers: list[cute.Pointer]  # this lane's, by `StateTile.pointers`
    columns: HistoryColumns
    identity: Union[Float32, list[Int32]]
    pending: Int32
    slot: Int32
    head: Int32
    state_scale: Maybe[cute.Tensor]
    random: Any  # seed of quantised states; round keys of others; None: round to nearest


class StateFold:
    """Replaces tiles in shared memory by the state after the pending tokens, rounded."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch: LaunchConfig,
        layout: UnitLayout,
        tile: StateTile,
        input_dtype: type[Numeric],
    ):
        self.spec, self.launch, self.layout, self.tile = spec, launch, layout, tile
        self.rows = UnitRows(spec, launch, layout)
        self.tokens = TokenOperands(input_dtype)
        self.num_parts = PARTS[spec.input_dtype].get(spec.state_dtype, 2)
        self.history_steps = -(-spec.window // STEP)
        # quantised states that are rounded stochastically leave no registers free
        self.random_rows = tile.scaled and spec.philox_rounds > 0
        # float16 inputs are widened to float32 for quantised and float32 sums, which leaves no registers for operands
        # that tiles share; nor are there any for quantised states beside copies of unaligned rows
        half = spec.input_dtype == "float16"
        crowded = (tile.scaled and (half or not spec.aligned)) or (tile.dtype is Float32 and half)
        self.holds_history = not crowded and self.history_steps * spec.dstate // 4 <= HELD_HISTORY

    def history_columns(self, pending: Int32, buffers: UnitBuffers, lane: Int32) -> HistoryColumns:
        """Return B of the history as operands for all tiles of a unit, or the addresses to load them from."""
        steps = []
        for step in range(self.history_steps):
            rows = []
            for j in self.tile.history_rows(step * STEP, lane):
                at = buffers.offset + self.layout.b + j * self.layout.column_pitch
                rows.append(buffers.units + cutlass.select_(j < pending, at, Int32(self.rows.zero_column)))
            steps.append(rows)
        if not self.holds_history:
            return steps
        return [[self.tile.history_operand(rows, quad, lane) for quad in range(self.tile.quads)] for rows in steps]

    @cute.jit
    def fold(
        self,
        i: Int32,
        consumer: Int32,
        header: UnitHeader,
        buffers: UnitBuffers,
        pointers: list[cute.Pointer],
        columns: HistoryColumns,
        state_scale: Maybe[cute.Tensor],
        random: Any,
        lane: Int32,
    ) -> None:
        """Replace a consumer's i-th tile by the state after the pending tokens, rounded."""
        units, layout = buffers.units, self.layout
        at = self.rows.tile(i, consumer)
        g = lane // 4
        record = units + (buffers.offset + layout.records + at.head * layout.record)
        decay = power_of_two(load_float(record + layout.base))
        weights = [self._weights(record, step, header.pending, lane) for step in range(self.history_steps)]
        x_at = [
            self.rows.x(units, buffers.offset + layout.x, header.pending, step * STEP, at.offset, lane)
            for step in range(self.history_steps)
        ]
        scales = units + (buffers.offset + layout.scales + at.tile * (layout.tile_rows * 4) + g * 4)
        first_row = header.column + at.tile % self.launch.d_split * layout.tile_rows
        if const_expr(self.random_rows):
            first_row = memory.pinned(first_row)  # stops LLVM keeping addresses and counters of rows for all tiles
        identity = self.tile.identity(decay, lane)
        for m in cutlass.range_constexpr(self.tile.blocks):
            if const_expr(self.random_rows and m > 0):
                cute.arch.sync_warp()  # stops ptxas starting the next rows before these are stored, and spilling
            quant_step: Any = None
            inverse: Any = None
            if const_expr(self.tile.scaled):
                # sums in units of the old scale, decayed: old elements are added as they are stored
                quant_step = [load_float(scales + (m * ROWS * 4 + r * 32)) * decay for r in range(2)]
                quant_step = [math.larger(value, Float32(SMALLEST_QUANT_STEP)) for value in quant_step]
                inverse = [math.reciprocal(value) for value in quant_step]
            x = [
                self.tokens.weigh(mma.load_matrices(x_at[step] + m * 32, 4), weights[step], inverse, self.num_parts)
                for step in range(self.history_steps)
            ]
            row = first_row + (m * ROWS + g)
            head = header.head + at.head
            fold = _Fold(pointers, columns, identity, header.pending, header.slot, head, state_scale, random)
            if const_expr(self.tile.scaled):
                self._fold_quantised_rows(fold, m, row, x, quant_step, lane)
            else:
                self._fold_rows(fold, m, row, x, lane)

    def _fold_rows(self, fold: _Fold, m: int, row: Int32, x: Weighed, lane: Int32) -> None:
        """Store the new state of 16 rows."""
        quads = range(self.tile.quads)
        bits: list[list[list[Int32]]] = []
        for first in range(0, self.tile.quads, IN_FLIGHT):  # loads do not pass stores: products overlap before one
            group = quads[first : first + IN_FLIGHT]
            results = [self._new_quad(fold, m, quad, x, lane) for quad in group]
            for quad, result in zip(group, results):
                if fold.random is not None:
                    counter = philox.row_counter(fold.slot, fold.head, 0)
                    bits = bits or self.tile.draw(fold.random, counter, row, quad, lane)
                bits = self._store_quad(fold, m, quad, result, None, bits)

    def _fold_quantised_rows(
        self, fold: _Fold, m: int, row: Int32, x: Weighed, quant_step: list[Float32], lane: Int32
    ) -> None:
        """Store the new state of 16 rows and their scales.

        All sums are computed before the first is rounded, and again where registers cannot hold them.
        """
        quads = range(self.tile.quads)
        bits: list[list[list[Int32]]] = []
        if fold.random is not None:  # drawn first, and the keys made here: sums take most registers
            keys = philox.round_keys(memory.pinned(fold.random), self.tile.rounds)
            for quad in range(0, self.tile.quads, self.tile.per_draw):
                bits += self.tile.draw(keys, philox.row_counter(fold.slot, fold.head, 0), row, quad, lane)
        largest: list[Any] = [None, None]
        results: list[Optional[Accumulators]] = []
        for quad in quads:
            sums = self._new_quad(fold, m, quad, x, lane)
            for r in range(2):
                values = [value for c in sums for value in c[2 * r : 2 * r + 2]]
                largest[r] = convert.max_abs(values, self.tile.arch, largest[r])
            results.append(sums if self.spec.dstate <= HELD_COLUMNS else None)
        for distance in (1, 2):
            largest = [math.larger(value, math.exchanged(value, distance)) for value in largest]
        encode = []
        for r in range(2):
            scale, factor = convert.row_scale(largest[r], self.tile.dtype)
            scale = math.larger(scale * quant_step[r], Float32(convert.SMALLEST_SCALE))
            self._store_scale(memory.address(fold.state_scale, fold.slot, fold.head, row + 8 * r), scale, lane)
            encode.append(factor)
        for quad, result in zip(quads, results):
            result = result or self._new_quad(fold, m, quad, x, lane)
            bits = self._store_quad(fold, m, quad, result, encode, bits)

    @cute.jit
    def _store_scale(self, pointer: cute.Pointer, scale: Float32, lane: Int32) -> None:
        if lane % 4 == 0:
            memory.store_scalar(pointer, scale, Float32)

    def _new_quad(self, fold: _Fold, m: int, quad: int, x: Weighed, lane: Int32) -> Accumulators:
        """Return a quad's accumulators: the old state and the weighed history.

        A float32 state is added last, because each sum rounds what it adds to.
        """
        words = mma.load_matrices(self.tile.quad_at(fold.pointers, quad, m), 4, transposed=False)
        last = self.tile.dtype is Float32
        sums = [[Float32(0.0)] * 4] if last else self.tile.accumulators(words, fold.identity)
        for step in range(self.history_steps):
            if step == 0:
                sums = self._accumulate(fold.columns, x, step, quad, sums, lane)
            else:
                sums = self._accumulate_if_pending(fold.columns, x, step, quad, sums, fold.pending, lane)
        return self.tile.decayed(words, fold.identity, sums) if last else sums

    def _accumulate(
        self, columns: HistoryColumns, x: Weighed, step: int, quad: int, sums: Accumulators, lane: Int32
    ) -> Accumulators:
        """Return sums + x B of 16 positions of the history."""
        rows = columns[step]
        operands = rows[quad] if self.holds_history else self.tile.history_operand(rows, quad, lane)
        return [self.tokens.accumulate(x[step], b, c) for b, c in zip(operands, sums)]

    @cute.jit
    def _accumulate_if_pending(
        self,
        columns: HistoryColumns,
        x: Weighed,
        step: cutlass.Constexpr,
        quad: cutlass.Constexpr,
        sums: Accumulators,
        pending: Int32,
        lane: Int32,
    ) -> Accumulators:
        if pending > step * STEP:
            sums = self._accumulate(columns, x, step, quad, sums, lane)
        return sums

    def _store_quad(
        self,
        fold: _Fold,
        m: int,
        quad: int,
        results: Accumulators,
        encode: Optional[list[Float32]],
        bits: list[list[list[Int32]]],
    ) -> list[list[list[Int32]]]:
        """Round a quad's accumulators into the tile; return the random bits that remain of `bits`."""
        words = self.tile.words(results, encode, bits[0] if bits else None)
        mma.store_matrices(self.tile.quad_at(fold.pointers, quad, m), words, transposed=False)
        return bits[1:]

    @cute.jit
    def _weights(self, record: cute.Pointer, step: cutlass.Constexpr, pending: Int32, lane: Int32) -> list[Float32]:
        """Return e^{c_{k-1} - c_j} dt'_j of the lane's four positions of a step, by `Prep`."""
        values = [Float32(0.0)] * 4
        if const_expr(step == 0):
            values = self._load_weights(record, step, lane)
        elif pending > step * STEP:
            values = self._load_weights(record, step, lane)
        return values

    def _load_weights(self, record: cute.Pointer, step: int, lane: Int32) -> list[Float32]:
        """Load the weights of positions 2 p, 2 p + 1, 2 p + 8, 2 p + 9 of a step."""
        at = cute.recast_ptr(record + (self.layout.weights + step * STEP * 4 + lane % 4 * 8), dtype=Float32)
        return memory.load(at, Float32, 2, 8) + memory.load(at + 8, Float32, 2, 8)

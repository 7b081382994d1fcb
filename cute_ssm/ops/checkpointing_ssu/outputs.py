"""`TileOutputs`: outputs at new tokens for the rows of a tile, of `CheckpointingSSU`.

Everything is transposed: rows of results are rows of the state, and columns are up to eight new tokens.

    out^T [rows, tokens] = S0 C^T scaled by e^{c_{k+t}} + x^T CB^T,   CB[t, j] = e^{c_{k+t} - c_j} dt'_j (C_t . B_j)

Words of C have two uses: as the second operand of S0 C^T, and as the first of C B^T, whose result has the layout of
the second operand of x^T CB^T.  So the products C . B stay in registers.  They are computed once for a unit, and are
scaled and masked (by select) for each head; D is added to their diagonal.  More than eight tokens are processed eight
at a time, and then the products are computed for every tile again.
"""

from typing import Any, NamedTuple, Union

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric, const_expr

from cute_ssm.device import convert, math, memory, mma
from cute_ssm.device.math import fast_silu, power_of_two
from cute_ssm.device.tile import ROWS, Accumulators, Projection, StateTile
from cute_ssm.device.tokens import TokenOperands
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.config import STEP, TOKENS, LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.rows import UnitRows, load_float
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.ops.checkpointing_ssu.units import UnitBuffers, UnitHeader


class StepProducts(NamedTuple):
    """The lane's four products C . B of a step of 16 positions."""

    products: list[Float32]
    diagonal: list[Float32]  # 1 where the position is that of the token, else 0


class TokenBlock(NamedTuple):
    """What eight tokens share between heads."""

    steps: list[StepProducts]
    projection: Projection


class _TokenDecays(NamedTuple):
    """What scales the products of the lane's token in a head."""

    record: cute.Pointer
    sum: Float32  # of the token
    position: Int32  # of the token
    skip: Maybe[Float32]  # D


class _XColumns(NamedTuple):
    """The columns of x of a tile."""

    units: cute.Pointer
    rows: Int32
    offset: Int32


class TileOutputs:
    """Computes the outputs of a tile, and stores them in place of z in shared memory."""

    def __init__(
        self,
        spec: CheckpointingSSUSpec,
        launch: LaunchConfig,
        layout: UnitLayout,
        tile: StateTile,
        input_dtype: type[Numeric],
    ):
        self.spec, self.layout, self.tile, self.input_dtype = spec, layout, tile, input_dtype
        self.rows = UnitRows(spec, launch, layout)
        self.tokens = TokenOperands(input_dtype)

    # ------------------------------------------------------------------------------------------ shared between heads
    @cute.jit
    def token_block(
        self, header: UnitHeader, buffers: UnitBuffers, lane: Int32, first: cutlass.Constexpr
    ) -> TokenBlock:
        """Return what eight tokens from `first` on share between heads."""
        pending, num_tokens, units = header.pending, header.num_tokens, buffers.units
        layout = self.layout
        c_rows, b_rows = buffers.offset + layout.c, buffers.offset + layout.b
        natural = self.rows.column_words(units, c_rows, num_tokens, first, lane)
        t = first + lane // 4
        row = units + cutlass.select_(t < num_tokens, c_rows + t * layout.column_pitch, Int32(self.rows.zero_column))
        end = cutlass.min(pending + num_tokens, pending + (first + TOKENS))
        steps = []
        for base in cutlass.range_constexpr(0, layout.rows, STEP):
            sums, diagonal = [Float32(0.0)] * 4, [Float32(0.0)] * 4
            if const_expr(base == 0):
                sums = self._products(units, b_rows, end, base, natural, lane)
            elif end > base:
                sums = self._products(units, b_rows, end, base, natural, lane)
            for e in cutlass.range_constexpr(4):
                j = base + 2 * (lane % 4) + (e % 2 + e // 2 * 8)
                diagonal[e] = Float32(1.0) if j == pending + t else Float32(0.0)
            steps.append(StepProducts(sums, diagonal))
        return TokenBlock(steps, self.tile.projection(natural, row, lane))

    def _products(
        self, units: cute.Pointer, rows: Int32, end: Int32, base: int, natural: list[list[Int32]], lane: Int32
    ) -> list[Float32]:
        """Return C . B of token ``lane // 4`` and positions base + 2 p + (0, 1, 8, 9), where p = lane % 4."""
        values = []
        for first in (base, base + 8):
            words = self.rows.column_words(units, rows, end, first, lane)
            values += self.tokens.products(natural, words, [Float32(0.0)] * 4)[:2]
        return values

    # ----------------------------------------------------------------------------------------------------- of a tile
    @cute.jit
    def compute(
        self,
        i: Union[Int32, int],
        consumer: Int32,
        header: UnitHeader,
        buffers: UnitBuffers,
        block: TokenBlock,
        first: cutlass.Constexpr,
        sums: Accumulators,
        lane: Int32,
    ) -> None:
        """Store the outputs of eight tokens from `first` on for a consumer's i-th tile, given S0 C^T in `sums`."""
        pending, num_tokens, units = header.pending, header.num_tokens, buffers.units
        layout = self.layout
        p, g = lane % 4, lane // 4
        at = self.rows.tile(i, consumer)
        record = units + (buffers.offset + layout.records + at.head * layout.record)
        last = pending + num_tokens - 1
        # e^{c_{k+t}} of this lane's two columns
        columns = [cutlass.min(pending + (first + 2 * p + c), last) for c in range(2)]
        factors = block.projection.factors
        scale = [power_of_two(load_float(record + t * 8)) * f for t, f in zip(columns, factors)]
        position = pending + (first + g)
        skip = load_float(record + layout.skip) if const_expr(self.spec.D_dtype is not None) else None
        decays = _TokenDecays(record, load_float(record + cutlass.min(position, last) * 8), position, skip)
        scales = units + (buffers.offset + layout.scales + at.tile * (layout.tile_rows * 4) + g * 4)
        for block_row in cutlass.range_constexpr(self.tile.blocks):
            c = sums[block_row]
            if const_expr(self.tile.scaled):
                low, high = (load_float(scales + (block_row * ROWS * 4 + r * 32)) for r in range(2))
                c = [c[0] * low, c[1] * low, c[2] * high, c[3] * high]
            sums[block_row] = [c[0] * scale[0], c[1] * scale[1], c[2] * scale[0], c[3] * scale[1]]
        end = pending + cutlass.min(num_tokens, first + TOKENS)
        of_state, x = sums, _XColumns(units, buffers.offset + layout.x, at.offset)
        sums = self._add_tokens(x, end, end, decays, block.steps, of_state, lane)
        if const_expr(first + 1 < self.spec.tokens):
            # zero times infinity or NaN is NaN: sums of the first token then show it in x of any later one
            if math.any_nan([value for c in sums for value in c[::2]]):
                sums = self._add_tokens_singly(x, pending + first, end, decays, block.steps, of_state, lane)
        self._store(buffers, num_tokens, first, at.offset, sums, lane)

    @cute.jit
    def _add_tokens(
        self,
        x: _XColumns,
        x_end: Int32,
        end: Int32,
        decays: _TokenDecays,
        steps: list[StepProducts],
        sums: Accumulators,
        lane: Int32,
    ) -> Accumulators:
        """Return sums + x^T CB^T of the positions below `end`, where x is zero from position `x_end` on."""
        for step in cutlass.range_constexpr(len(steps)):
            if const_expr(step == 0):
                sums = self._add_step(x, x_end, step, decays, steps, sums, lane)
            elif end > step * STEP:
                sums = self._add_step(x, x_end, step, decays, steps, sums, lane)
        return sums

    def _add_step(
        self,
        x: _XColumns,
        x_end: Int32,
        step: int,
        decays: _TokenDecays,
        steps: list[StepProducts],
        sums: Accumulators,
        lane: Int32,
    ) -> Accumulators:
        """Return sums + x^T CB^T of 16 positions."""
        at = self.rows.x(x.units, x.rows, x_end, step * STEP, x.offset, lane)
        parts = self.tokens.coefficients(self._scaled_products(decays, steps[step], step, lane))
        return [self.tokens.multiply(mma.load_matrices(at + m * 32, 4), parts, c) for m, c in enumerate(sums)]

    @cute.jit
    def _add_tokens_singly(
        self,
        x: _XColumns,
        first: Int32,
        end: Int32,
        decays: _TokenDecays,
        steps: list[StepProducts],
        sums: Accumulators,
        lane: Int32,
    ) -> Accumulators:
        """Return `_add_tokens` without x of later tokens, for each token from position `first` on.

        A token gets the bits that it has where x of the later ones is finite.
        """
        lane = memory.pinned(lane)  # stops LLVM computing any of this ahead, for finite values
        results = sums
        for j in cutlass.range(first, end, unroll=1):
            alone = self._add_tokens(x, j + 1, end, decays, steps, sums, lane)
            column = j - first - 2 * (lane % 4)  # of the lane's two
            results = [
                [cutlass.select_(column == e % 2, new, old) for e, (new, old) in enumerate(zip(*both))]
                for both in zip(alone, results)
            ]
        return results

    @cute.jit
    def _scaled_products(
        self, decays: _TokenDecays, products: StepProducts, step: cutlass.Constexpr, lane: Int32
    ) -> list[Float32]:
        """Return this lane's four of CB^T at a step: of token ``lane // 4`` of the block, D included."""
        p = lane % 4
        f = self._load_decays(decays.record, step, p)
        values = [Float32(0.0)] * 4
        for e in cutlass.range_constexpr(4):
            j = step * STEP + 2 * p + (e % 2 + e // 2 * 8)
            value = products.products[e] * (power_of_two(decays.sum - f[2 * e]) * f[2 * e + 1])
            value = value if j <= decays.position else Float32(0.0)
            if const_expr(decays.skip is not None):
                value = cute.math.fma(products.diagonal[e], decays.skip, value)
            values[e] = value
        return values

    @staticmethod
    def _load_decays(record: cute.Pointer, step: int, p: Int32) -> list[Float32]:
        """Load (sum, dt') of positions 2 p, 2 p + 1, 2 p + 8, 2 p + 9 of a step."""
        at = cute.recast_ptr(record + (step * STEP * 8 + p * 16), dtype=Float32)
        return memory.load(at, Float32, 4, 16) + memory.load(at + 16, Float32, 4, 16)

    @cute.jit
    def _store(
        self,
        buffers: UnitBuffers,
        num_tokens: Int32,
        first: cutlass.Constexpr,
        offset: Int32,
        sums: Accumulators,
        lane: Int32,
    ) -> None:
        """Gate and round outputs, and store them in place of z.  Rows from `num_tokens` on may hold anything."""
        units, layout, dtype = buffers.units, self.layout, self.input_dtype
        rows = buffers.offset + layout.z
        matrix = lane // 8 * 16 + offset
        to = units + (rows + (first + lane % 8) * layout.x_pitch + matrix)
        gates = units + (rows + cutlass.min(first + lane % 8, num_tokens - 1) * layout.x_pitch + matrix)
        words = []
        for m in cutlass.range_constexpr(0, self.tile.blocks, 2):
            count = min(2, self.tile.blocks - m)
            z: Any = mma.load_matrices(gates + m * 32, 2 * count) if const_expr(self.spec.has_z) else None
            for part in cutlass.range_constexpr(2 * count):
                c = sums[m + part // 2][part % 2 * 2 : part % 2 * 2 + 2]
                if const_expr(self.spec.has_z):
                    c = [v * fast_silu(gate) for v, gate in zip(c, convert.unpack([z[part]], dtype))]
                words += convert.pack(c, dtype)
        cute.arch.sync_warp()  # other lanes have read these rows of z
        for m in cutlass.range_constexpr(0, self.tile.blocks, 2):
            mma.store_matrices(to + m * 32, words[2 * m : 2 * m + 4])

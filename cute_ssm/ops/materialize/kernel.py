"""`MaterializeState`: fold pending tokens into states, from one slot into another.

Per (row of the batch, head), with the state S0 [dim, dstate] of the slot that is read and its first j pending tokens
(`cute_ssm.reference.history.fold`):

    c_i = sum_{l <= i} A dt'_l;   S = e^{c_{j-1}} S0 + sum_{i < j} e^{c_{j-1} - c_i} dt'_i x_i B_i^T

The lanes of a warp form segments that cover all columns.  A lane works on 8 rows and 8 columns of one head, in 64
float32 registers, to which each token adds the product of 8 x and 8 B.  The columns are one vector of 8; if a pool is
float32 they are two vectors of 4, so that neighbouring lanes access neighbouring bytes.  Lane t of a warp computes the
weights of the tokens t and t + 32.  With j = 0, and if both pools have the same type, the bytes of state and scales are
copied.

Rounding is that of `cute_ssm.reference.rounding` by its map of rows, with j - 1 as the token.  Nothing is written for a
row of the batch with a slot or cursor out of range, or with j greater than its number of pending tokens.
"""

from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Numeric, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, math, memory, philox
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import Layout, of_table
from cute_ssm.device.history import HistoryView
from cute_ssm.device.philox import RowRandom
from cute_ssm.device.types import Maybe
from cute_ssm.ops.materialize.arguments import B_AXES, DT_AXES, TABLE, X_AXES
from cute_ssm.ops.materialize.config import MOST_PENDING, MaterializeConfig, choose_materialize
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.spec import QUANTISED

ROWS = COLUMNS = 8  # of a lane
MOST_BYTES = 16  # of an access


class Tensors(NamedTuple):
    """The tensors of a call; ``cursor`` is ``cache_buf_idx`` or ``ring_start``."""

    state: cute.Tensor
    state_scale: Maybe[cute.Tensor]
    x_history: cute.Tensor
    B_history: cute.Tensor
    dt_history: cute.Tensor
    cursor: cute.Tensor
    prev_num_accepted_tokens: cute.Tensor
    A: cute.Tensor
    out: cute.Tensor
    out_scale: Maybe[cute.Tensor]
    state_batch_indices: cute.Tensor
    dst_state_batch_indices: cute.Tensor
    num_tokens: Maybe[cute.Tensor]
    rand_seed: Maybe[cute.Tensor]


class Unit(NamedTuple):
    """What a lane works on: rows from `row` on of one head, and the columns of lane `column_lane` of its segment."""

    src_slot: Int64
    dst_slot: Int64
    head: Int32
    row: Int32
    column_lane: Int32


class Pending(NamedTuple):
    """The tokens to fold: their number, and where they lie in the rows of a group's history."""

    num_tokens: Int32
    cursor: Int32
    group: Int32
    history_rows: Int32


class Weights(NamedTuple):
    """Factors of the first state, and of the tokens `lane` and `lane + 32`."""

    state: Float32
    low: Float32
    high: Float32


class MaterializeState:
    """The kernel of a `MaterializeSpec`; batch, heads, groups, slots, rows of the history and strides are dynamic."""

    def __init__(self, spec: MaterializeSpec, config: MaterializeConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.arch, self.warps = spec, arch, config.warps
        self.state_dtype, self.out_dtype = convert.DTYPES[spec.state_dtype], convert.DTYPES[spec.out_dtype]
        self.input_dtype, self.A_dtype = convert.DTYPES[spec.input_dtype], convert.DTYPES[spec.A_dtype]
        self.scaled, self.out_scaled = spec.state_dtype in QUANTISED, spec.out_dtype in QUANTISED
        self.history = HistoryView(spec.history)
        self.lanes = 1 << (spec.dstate // COLUMNS - 1).bit_length()  # of a segment
        self.vector = 4 if "float32" in (spec.state_dtype, spec.out_dtype) else COLUMNS
        self.vectors = COLUMNS // self.vector  # of a lane
        self.unit_rows = WARP // self.lanes * ROWS
        self.chunks = -(-spec.dim // self.unit_rows)

    @staticmethod
    def default_config(spec: MaterializeSpec, arch: Arch, units: int | None = None) -> MaterializeConfig:
        """Return the only config."""
        return choose_materialize()

    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        spec = self.spec
        dtypes = {
            "state": spec.state_dtype,
            "state_scale": Float32 if self.scaled else None,
            "x_history": spec.input_dtype,
            "A": spec.A_dtype,
            "out": spec.out_dtype,
            "out_scale": Float32 if self.out_scaled else None,
            "state_batch_indices": spec.src_dtype,
            "dst_state_batch_indices": spec.dst_dtype,
            "num_tokens": spec.count_dtype,
            "rand_seed": "int64" if spec.philox_rounds else None,
        }
        sizes: dict[str, int | str] = {
            "dim": spec.dim,
            "dstate": spec.dstate,
            "seeds": "slots" if spec.seed_per_slot else 1,
        }
        axes = {"x": X_AXES[spec.history], "B": B_AXES[spec.history], "dt": DT_AXES[spec.history]}
        tensors = of_table(TABLE, dtypes, sizes, axes, {"A": Layout((0, 0))})
        return *tensors, Int64(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        state_scale: Maybe[cute.Tensor],
        x_history: cute.Tensor,
        B_history: cute.Tensor,
        dt_history: cute.Tensor,
        cursor: cute.Tensor,
        prev_num_accepted_tokens: cute.Tensor,
        A: cute.Tensor,
        out: cute.Tensor,
        out_scale: Maybe[cute.Tensor],
        state_batch_indices: cute.Tensor,
        dst_state_batch_indices: cute.Tensor,
        num_tokens: Maybe[cute.Tensor],
        rand_seed: Maybe[cute.Tensor],
        pad_slot_id: Int64,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.serving.materialize`."""
        tensors = Tensors(
            state, state_scale, x_history, B_history, dt_history, cursor, prev_num_accepted_tokens, A, out, out_scale,
            state_batch_indices, dst_state_batch_indices, num_tokens, rand_seed,
        )  # fmt: skip
        nheads, groups = state.shape[1], B_history.shape[1] if const_expr(self.history.ring) else B_history.shape[3]
        units = state_batch_indices.shape[0] * nheads * self.chunks
        heads, per_group = cute.FastDivmodDivisorV2(nheads), cute.FastDivmodDivisorV2(nheads // groups)
        self.kernel(tensors, pad_slot_id, units, heads, per_group).launch(
            grid=[cute.ceil_div(units, self.warps), 1, 1], block=[WARP * self.warps, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        pad_slot_id: Int64,
        units: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Check the unit of this warp, and copy or fold it."""
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        index = cute.arch.block_idx()[0] * self.warps + warp
        if index < units:
            pair = index // self.chunks
            b, head = divmod(pair, heads)
            src_slot, dst_slot = Int64(tensors.state_batch_indices[b]), Int64(tensors.dst_state_batch_indices[b])
            active = src_slot != pad_slot_id and in_range(src_slot, tensors.state.shape[0])
            active = active and dst_slot != pad_slot_id and in_range(dst_slot, tensors.out.shape[0])
            if active:
                pending, cursor = tensors.prev_num_accepted_tokens[src_slot], tensors.cursor[src_slot]
                count = Int64(pending)
                if const_expr(tensors.num_tokens is not None):
                    count = Int64(tensors.num_tokens[b])
                history_rows = self.history.rows(tensors.dt_history)
                num_cursors = history_rows if const_expr(self.history.ring) else Int32(2)
                active = pending <= cutlass.min(history_rows, MOST_PENDING) and in_range(cursor, num_cursors)
                if active and count >= 0 and count <= pending:  # pending is then not negative either
                    row = (index - pair * self.chunks) * self.unit_rows + lane // self.lanes * ROWS
                    unit = Unit(src_slot, dst_slot, head, row, lane % self.lanes)
                    group, _ = divmod(head, per_group)
                    if const_expr(self.spec.state_dtype == self.spec.out_dtype):
                        if count == 0:
                            self.copy(tensors, unit)
                        else:
                            self.fold(tensors, unit, Pending(Int32(count), cursor, group, history_rows), lane)
                    else:
                        self.fold(tensors, unit, Pending(Int32(count), cursor, group, history_rows), lane)

    # ----------------------------------------------------------------------------------------------------------- parts
    def columns(self, unit: Unit) -> list[Int32]:
        """Return the first columns of a lane's vectors."""
        return [(unit.column_lane + i * self.lanes) * self.vector for i in range(self.vectors)]

    @cute.jit
    def inside(self, unit: Unit, column: Int32) -> Boolean:
        """Return whether a lane stores these rows and columns; other lanes repeat the work of one that does."""
        return Boolean(unit.row < self.spec.dim and column < self.spec.dstate)

    def access_bytes(self, dtype: type[Numeric]) -> int:
        """Return the bytes of a vector."""
        n_bytes: int = self.vector * dtype.width // 8
        return n_bytes

    def load(self, pointers: list[cute.Pointer]) -> list[Float32]:
        """Load a lane's columns of a row, from pointers to its vectors."""
        dtype = pointers[0].dtype
        vectors = [memory.load(pointer, dtype, self.vector, self.access_bytes(dtype)) for pointer in pointers]
        return [value for vector in vectors for value in vector]

    @cute.jit
    def copy(self, tensors: Tensors, unit: Unit) -> None:
        """Copy the bytes of a lane's rows and of their scales."""
        source, target, head = unit.src_slot, unit.dst_slot, unit.head
        count = self.access_bytes(self.state_dtype) // 4
        for i in cutlass.range_constexpr(self.vectors):
            column = self.columns(unit)[i]
            if self.inside(unit, column):
                for r in cutlass.range_constexpr(ROWS):
                    row = unit.row + r
                    words = memory.load_words(memory.address(tensors.state, source, head, row, column), count)
                    memory.store_words(memory.address(tensors.out, target, head, row, column), words)
                    if const_expr(self.scaled and i == 0):
                        if unit.column_lane == 0:
                            word = memory.load_words(memory.address(tensors.state_scale, source, head, row), 1)
                            memory.store_words(memory.address(tensors.out_scale, target, head, row), word)

    @cute.jit
    def weights(self, tensors: Tensors, unit: Unit, pending: Pending, rate: Float32, lane: Int32) -> Weights:
        """Return e^{c_{j-1}}, and e^{c_{j-1} - c_i} dt'_i of the tokens `lane` and `lane + 32`.

        Exponents are summed from the last token on: differences of long sums would lose the digits that cancel.
        """
        steps, products, sums = [], [], []
        for k in cutlass.range_constexpr(2):
            step = Float32(0.0)
            token = lane + k * WARP
            if token < pending.num_tokens:
                row = self.history.pending_row(pending.cursor, token, pending.history_rows)
                pointer = self.history.dt(tensors.dt_history, unit.src_slot, row, unit.head)
                step = memory.load_scalar(pointer, Float32)
            steps.append(step)
            products.append(rate * step)
            sums.append(Float32(0.0))
        low, high, first, second = products[0], products[1], sums[0], sums[1]
        total = Float32(0.0)
        for done in cutlass.range(pending.num_tokens, unroll=1):
            token = pending.num_tokens - 1 - done
            product = low if token < WARP else high
            first = total if lane == token else first
            second = total if lane + WARP == token else second
            total += cute.arch.shuffle_sync(product, token & (WARP - 1))
        values = [math.decay(c) * step for c, step in zip((first, second), steps)]
        return Weights(math.decay(total), values[0], values[1])

    @cute.jit
    def fold(self, tensors: Tensors, unit: Unit, pending: Pending, lane: Int32) -> None:
        """Fold the pending tokens into a lane's rows and columns of the state, and store them."""
        source, head = unit.src_slot, unit.head
        first = cutlass.min(unit.row, self.spec.dim - ROWS)
        columns = [cutlass.min(column, self.spec.dstate - self.vector) for column in self.columns(unit)]
        rate = memory.load_scalar(memory.address(tensors.A, head, 0, 0), self.A_dtype)
        weights = self.weights(tensors, unit, pending, rate, lane)

        rState = cute.make_rmem_tensor((ROWS * COLUMNS,), Float32)
        for r in cutlass.range_constexpr(ROWS):
            values = self.load([memory.address(tensors.state, source, head, first + r, column) for column in columns])
            scale = None
            if const_expr(self.scaled):
                scale = memory.load_scalar(memory.address(tensors.state_scale, source, head, first + r), Float32)
            for c in cutlass.range_constexpr(COLUMNS):
                value = values[c] * scale if const_expr(self.scaled) else values[c]
                rState[r * COLUMNS + c] = weights.state * value
        for token in cutlass.range(pending.num_tokens, unroll=2):
            chosen = weights.low if token < WARP else weights.high
            weight = cute.arch.shuffle_sync(chosen, token & (WARP - 1))
            row = self.history.pending_row(pending.cursor, token, pending.history_rows)
            gX = self.history.x(tensors.x_history, source, row, head, first)
            x = memory.load(gX, self.input_dtype, ROWS, MOST_BYTES)
            B = self.load([self.history.B(tensors.B_history, source, row, pending.group, column) for column in columns])
            for r in cutlass.range_constexpr(ROWS):
                gain = weight * x[r]
                for c in cutlass.range_constexpr(COLUMNS):
                    rState[r * COLUMNS + c] = cute.math.fma(gain, B[c], rState[r * COLUMNS + c])
        cute.arch.sync_warp()  # in place: every lane has read the scales

        random = None
        if const_expr(self.spec.philox_rounds > 0):
            seed = tensors.rand_seed[source] if const_expr(self.spec.seed_per_slot) else tensors.rand_seed[0]
            random = RowRandom(
                philox.round_keys(seed, self.spec.philox_rounds),
                philox.row_counter(unit.dst_slot, head, pending.num_tokens - 1),
            )
        for r in cutlass.range_constexpr(ROWS):
            values = [rState[r * COLUMNS + c] for c in range(COLUMNS)]
            self.store(tensors, unit, first + r, columns, values, random)

    @cute.jit
    def store(
        self,
        tensors: Tensors,
        unit: Unit,
        row: Int32,
        columns: list[Int32],
        values: list[Float32],
        random: Optional[RowRandom],
    ) -> None:
        """Round and store a lane's columns of a row, and the row's scale."""
        target, head = unit.dst_slot, unit.head
        encode = None
        if const_expr(self.out_scaled):
            largest = convert.max_abs(values, self.arch)
            for distance in cutlass.range_constexpr(self.lanes.bit_length() - 1):
                largest = math.larger(largest, math.exchanged(largest, 1 << distance))
            scale, encode = convert.row_scale(largest, self.out_dtype)
            if self.inside(unit, unit.column_lane * self.vector) and unit.column_lane == 0:
                memory.store_scalar(memory.address(tensors.out_scale, target, head, row), scale, Float32)
        for i in cutlass.range_constexpr(self.vectors):
            packed = self.rounded(values[i * self.vector : (i + 1) * self.vector], encode, random, row, columns[i])
            if self.inside(unit, self.columns(unit)[i]):
                pointer = memory.address(tensors.out, target, head, row, columns[i])
                memory.store_packed(pointer, packed, self.out_dtype, self.access_bytes(self.out_dtype))

    def rounded(
        self, values: list[Float32], encode: Optional[Float32], random: Optional[RowRandom], row: Int32, column: Int32
    ) -> list[Int32]:
        """Return the words of a vector of a row."""
        words = None
        if random is not None:
            words = philox.words(random.keys, random.counter, row, column, self.vector, self.spec.dstate)
        if self.out_scaled:
            return convert.pack_quantised(values, encode, self.out_dtype, words)
        if words is not None:
            return convert.pack_stochastic(values, words, self.out_dtype, self.arch, self.spec.saturate)
        return convert.pack(values, self.out_dtype, self.spec.saturate)

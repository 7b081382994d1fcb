"""`MaterializeState`: the state that pending tokens lead to, from one slot into another.

Per (row of the batch, head), with the state S0 [dim, dstate] of the slot that is read and its first j pending tokens
(`cute_ssm.ops.checkpointing_ssu.reference.fold`):

    c_i = sum_{l <= i} A dt'_l;   S = e^{c_{j-1}} S0 + sum_{i < j} e^{c_{j-1} - c_i} dt'_i x_i B_i^T

A warp works on 8 rows of a head for each of its segments of lanes, and a lane on 8 columns of them: 64 float32
registers, to which a token adds one product of 8 x and 8 B.  The columns are one vector, or, where a pool is float32,
two, so that neighbouring lanes access neighbouring bytes.  Lane t of a warp computes the weight of the tokens t and
t + 32.  With j = 0, if both pools have the same type, the bytes of state and scales are copied.

Rounding is that of `cute_ssm.reference.rounding`, by its map of rows, with j - 1 as the token.  A slot or cursor out of
range, or j beyond the pending tokens, makes a row of the batch padding: nothing is written for it.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, math, memory, philox
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.ops.materialize.config import MOST_PENDING, MaterializeConfig, choose_materialize
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.spec import QUANTISED

ROWS = COLUMNS = 8  # of a lane
MOST_BYTES = 16  # of an access


class MaterializeState:
    """The kernel of a `MaterializeSpec`; batch, heads, groups, slots, rows of the history and strides are dynamic."""

    def __init__(self, spec: MaterializeSpec, config: MaterializeConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.arch, self.warps = spec, arch, config.warps
        self.state_dtype, self.out_dtype = convert.DTYPES[spec.state_dtype], convert.DTYPES[spec.out_dtype]
        self.input_dtype, self.A_dtype = convert.DTYPES[spec.input_dtype], convert.DTYPES[spec.A_dtype]
        self.scaled, self.out_scaled = spec.state_dtype in QUANTISED, spec.out_dtype in QUANTISED
        self.ring = spec.history == "ring"
        self.lanes = 1 << (spec.dstate // COLUMNS - 1).bit_length()  # of a segment
        self.vector = 4 if "float32" in (spec.state_dtype, spec.out_dtype) else COLUMNS
        self.unit_rows = WARP // self.lanes * ROWS
        self.chunks = -(-spec.dim // self.unit_rows)

    @staticmethod
    def default_config(spec: MaterializeSpec, arch: Arch, units: int | None = None) -> MaterializeConfig:
        """The one config there is."""
        return choose_materialize()

    def fakes(self):
        """Arguments of `__call__` as the compiler sees them."""
        spec = self.spec
        batch, slots, out_slots, heads, groups, rows = (cute.sym_int32() for _ in range(6))

        def rows_of(dtype, shape, inner=(1,)):
            """Accesses of `MOST_BYTES`."""
            return fake(dtype, shape, inner, MOST_BYTES * 8 // dtype.width)

        def pool(dtype, count):
            return rows_of(dtype, (count, heads, spec.dim, spec.dstate), (spec.dstate, 1))

        def scales(present, count):
            return fake(Float32, (count, heads, spec.dim), (1,)) if present else None

        two = {"double": (), "double_x": (2,), "ring": ()}[spec.history]
        x, B, dt = (slots, *two, rows, heads, spec.dim), (slots, 2, rows, groups, spec.dstate), (slots, 2, heads, rows)
        if self.ring:
            x, B, dt = (slots, heads, rows, spec.dim), (slots, groups, rows, spec.dstate), (slots, heads, rows)
        return (
            pool(self.state_dtype, slots),
            scales(self.scaled, slots),
            rows_of(self.input_dtype, x),
            rows_of(self.input_dtype, B),
            fake(Float32, dt, (1,)),
            fake(Int32, (slots,)),
            fake(Int32, (slots,)),
            fake(self.A_dtype, (heads, spec.dim, spec.dstate), (0, 0)),
            pool(self.out_dtype, out_slots),
            scales(self.out_scaled, out_slots),
            fake(spec.src_dtype, (batch,)),
            fake(spec.dst_dtype, (batch,)),
            None if spec.count_dtype is None else fake(spec.count_dtype, (batch,)),
            fake("int64", (slots if spec.seed_per_slot else 1,), (1,)) if spec.philox_rounds else None,
            Int64(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        x: cute.Tensor,
        B: cute.Tensor,
        dt: cute.Tensor,
        cursor: cute.Tensor,
        pnat: cute.Tensor,
        A: cute.Tensor,
        out: cute.Tensor,
        out_scale: Optional[cute.Tensor],
        src: cute.Tensor,
        dst: cute.Tensor,
        counts: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        pad_slot: Int64,
        stream,
    ):
        """Shapes and types as in `cute_ssm.serving.materialize`."""
        nheads, groups = state.shape[1], B.shape[1] if const_expr(self.ring) else B.shape[3]
        units = src.shape[0] * nheads * self.chunks
        heads, per_group = cute.FastDivmodDivisorV2(nheads), cute.FastDivmodDivisorV2(nheads // groups)
        self.kernel(
            state, state_scale, x, B, dt, cursor, pnat, A, out, out_scale, src, dst, counts, rand_seed, pad_slot,
            units, heads, per_group,
        ).launch(
            grid=[cute.ceil_div(units, self.warps), 1, 1], block=[WARP * self.warps, 1, 1], stream=stream
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        state: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        x: cute.Tensor,
        B: cute.Tensor,
        dt: cute.Tensor,
        cursor: cute.Tensor,
        pnat: cute.Tensor,
        A: cute.Tensor,
        out: cute.Tensor,
        out_scale: Optional[cute.Tensor],
        src: cute.Tensor,
        dst: cute.Tensor,
        counts: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        pad_slot: Int64,
        units: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_group: cute.FastDivmodDivisorV2,
    ):
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        unit = cute.arch.block_idx()[0] * self.warps + warp
        if unit < units:
            head = unit // self.chunks
            b, h = divmod(head, heads)
            source, target = Int64(src[b]), Int64(dst[b])
            live = source != pad_slot and in_range(source, state.shape[0])
            live = live and target != pad_slot and in_range(target, out.shape[0])
            if live:
                pending, place = pnat[source], cursor[source]
                count = Int64(pending)
                if const_expr(counts is not None):
                    count = Int64(counts[b])
                rows = dt.shape[len(dt.shape) - 1]
                places = rows if const_expr(self.ring) else Int32(2)
                live = pending <= cutlass.min(rows, MOST_PENDING) and in_range(place, places)
                if live and count >= 0 and count <= pending:  # pending is then not negative either
                    first = (unit - head * self.chunks) * self.unit_rows + lane // self.lanes * ROWS
                    where = (source, target, h, first, lane % self.lanes)
                    pools = (state, state_scale, out, out_scale)
                    group, _ = divmod(h, per_group)
                    if const_expr(self.spec.state_dtype == self.spec.out_dtype):
                        if count == 0:
                            self.copy(pools, where)
                        else:
                            history = (x, B, dt, place, group, rows)
                            self.fold(pools, history, A, rand_seed, Int32(count), where, lane)
                    else:
                        history = (x, B, dt, place, group, rows)
                        self.fold(pools, history, A, rand_seed, Int32(count), where, lane)

    # ----------------------------------------------------------------------------------------------------------- parts
    def columns(self, where):
        """First columns of a lane's vectors."""
        return [(where[4] + i * self.lanes) * self.vector for i in range(COLUMNS // self.vector)]

    @cute.jit
    def inside(self, where, column):
        """Whether a lane has these rows and columns, or only computes what another has."""
        return Boolean(where[3] < self.spec.dim and column < self.spec.dstate)

    def access_bytes(self, dtype):
        """Bytes of a vector."""
        return self.vector * dtype.width // 8

    def load(self, pointers):
        """A lane's columns of a row, from pointers to its vectors."""
        dtype = pointers[0].dtype
        vectors = [memory.load(pointer, dtype, self.vector, self.access_bytes(dtype)) for pointer in pointers]
        return [value for vector in vectors for value in vector]

    @cute.jit
    def copy(self, pools, where):
        """The bytes of a lane's rows and of their scales."""
        state, state_scale, out, out_scale = pools
        source, target, h, first, lane = where
        count = self.access_bytes(self.state_dtype) // 4
        for i in cutlass.range_constexpr(COLUMNS // self.vector):
            column = self.columns(where)[i]
            if self.inside(where, column):
                for r in cutlass.range_constexpr(ROWS):
                    words = memory.load_words(memory.address(state, source, h, first + r, column), count)
                    memory.store_words(memory.address(out, target, h, first + r, column), words)
                    if const_expr(self.scaled and i == 0):
                        if lane == 0:
                            word = memory.load_words(memory.address(state_scale, source, h, first + r), 1)
                            memory.store_words(memory.address(out_scale, target, h, first + r), word)

    @cute.jit
    def row_of(self, history, token):
        """Row of the history that holds a pending token."""
        row = token
        if const_expr(self.ring):
            row += history[3]
            row = row - history[5] if row >= history[5] else row
        return row

    def step_at(self, history, source, h, row):
        """Pointer to dt' of a row."""
        dt, place = history[2], history[3]
        return memory.address(dt, source, h, row) if self.ring else memory.address(dt, source, place, h, row)

    def x_at(self, history, source, h, row, first):
        """Pointer to x of a row."""
        x, _, _, place, _, _ = history
        if self.ring:
            return memory.address(x, source, h, row, first)
        at = (source, place, row, h, first) if self.spec.history == "double_x" else (source, row, h, first)
        return memory.address(x, *at)

    def B_at(self, history, source, row, column):
        """Pointer to B of a row."""
        _, B, _, place, group, _ = history
        at = (source, group, row, column) if self.ring else (source, place, row, group, column)
        return memory.address(B, *at)

    @cute.jit
    def weights(self, history, rate, source, h, count, lane):
        """(e^{c_{j-1}}, weights of the tokens `lane` and `lane + 32`).

        Exponents are sums from the last token on: differences of long sums would cost the places that cancel.
        """
        steps, products, sums = [], [], []
        for k in cutlass.range_constexpr(2):
            step = Float32(0.0)
            token = lane + k * WARP
            if token < count:
                row = self.row_of(history, token)
                step = memory.load_scalar(self.step_at(history, source, h, row), Float32)
            steps.append(step)
            products.append(rate * step)
            sums.append(Float32(0.0))
        low, high, first, second = products[0], products[1], sums[0], sums[1]
        total = Float32(0.0)
        for done in cutlass.range(count, unroll=1):
            token = count - 1 - done
            product = low if token < WARP else high
            first = total if lane == token else first
            second = total if lane + WARP == token else second
            total += cute.arch.shuffle_sync(product, token & (WARP - 1))
        values = [math.decay(c) * step for c, step in zip((first, second), steps)]
        return math.decay(total), values[0], values[1]

    @cute.jit
    def fold(self, pools, history, A, rand_seed, count, where, lane):
        """A lane's rows and columns of the state after `count` tokens."""
        state, state_scale, out, out_scale = pools
        source, target, h, _, _ = where
        first = cutlass.min(where[3], self.spec.dim - ROWS)
        columns = [cutlass.min(column, self.spec.dstate - self.vector) for column in self.columns(where)]
        rate = memory.load_scalar(memory.address(A, h, 0, 0), self.A_dtype)
        carry, low, high = self.weights(history, rate, source, h, count, lane)

        held = cute.make_rmem_tensor((ROWS * COLUMNS,), Float32)
        for r in cutlass.range_constexpr(ROWS):
            values = self.load([memory.address(state, source, h, first + r, column) for column in columns])
            scale = None
            if const_expr(self.scaled):
                scale = memory.load_scalar(memory.address(state_scale, source, h, first + r), Float32)
            for c in cutlass.range_constexpr(COLUMNS):
                value = values[c] * scale if const_expr(self.scaled) else values[c]
                held[r * COLUMNS + c] = carry * value
        for token in cutlass.range(count, unroll=2):
            chosen = low if token < WARP else high
            weight = cute.arch.shuffle_sync(chosen, token & (WARP - 1))
            row = self.row_of(history, token)
            x = memory.load(self.x_at(history, source, h, row, first), self.input_dtype, ROWS, MOST_BYTES)
            B = self.load([self.B_at(history, source, row, column) for column in columns])
            for r in cutlass.range_constexpr(ROWS):
                gain = weight * x[r]
                for c in cutlass.range_constexpr(COLUMNS):
                    held[r * COLUMNS + c] = cute.math.fma(gain, B[c], held[r * COLUMNS + c])
        cute.arch.sync_warp()  # in place: every lane has read the scales

        random = (None, None)
        if const_expr(self.spec.philox_rounds > 0):
            seed = rand_seed[source] if const_expr(self.spec.seed_per_slot) else rand_seed[0]
            random = (philox.round_keys(seed, self.spec.philox_rounds), philox.row_counter(target, h, count - 1))
        for r in cutlass.range_constexpr(ROWS):
            values = [held[r * COLUMNS + c] for c in range(COLUMNS)]
            self.store(out, out_scale, values, random, (target, h, first + r), columns, where)

    @cute.jit
    def store(self, out, out_scale, values, random, at, columns, where):
        """Round a lane's columns of a row into memory, and the row's scale."""
        encode = None
        if const_expr(self.out_scaled):
            largest = convert.max_abs(values, self.arch)
            for distance in cutlass.range_constexpr(self.lanes.bit_length() - 1):
                largest = math.larger(largest, math.exchanged(largest, 1 << distance))
            scale, encode = convert.row_scale(largest, self.out_dtype)
            if self.inside(where, where[4] * self.vector) and where[4] == 0:
                memory.store_scalar(memory.address(out_scale, *at), scale, Float32)
        for i in cutlass.range_constexpr(COLUMNS // self.vector):
            packed = self.rounded(values[i * self.vector : (i + 1) * self.vector], encode, random, at[2], columns[i])
            if self.inside(where, self.columns(where)[i]):
                pointer = memory.address(out, *at, columns[i])
                memory.store_packed(pointer, packed, self.out_dtype, self.access_bytes(self.out_dtype))

    def rounded(self, values, encode, random, row, column):
        """Words of a vector of a row."""
        words = None
        if self.spec.philox_rounds:
            words = philox.words(*random, row, column, self.vector, self.spec.dstate)
        if self.out_scaled:
            return convert.pack_quantised(values, encode, self.out_dtype, words)
        if self.spec.philox_rounds:
            return convert.pack_stochastic(values, words, self.out_dtype, self.arch, self.spec.saturate)
        return convert.pack(values, self.out_dtype, self.spec.saturate)

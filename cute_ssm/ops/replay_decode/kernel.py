"""`ReplayDecode`: the outputs of one token from a state and the inputs of the tokens since it was stored.

Per (sequence, head), with the state S0 [dim, dstate] of its slot, k tokens in the caches, the new token k, and c_j the
sum of A dt' of all tokens after token j (`cute_ssm.ops.replay_decode.reference`):

    out = e^{c} S0 C + sum_{j <= k} (e^{c_j} dt'_j B_j . C) x_j + D x_k            c: the sum of all; times silu(z)
    S   = e^{c} S0 + sum_{j <= k} e^{c_j} dt'_j x_j B_j^T

A step reads the state once and computes the sum of the first line, then appends its token to the caches: the state is
neither formed nor written.  A step that flushes forms S in registers, stores it, and takes its outputs S C from it
before it is rounded; the caches stay as they are.

The lanes of a warp form segments that cover all columns.  A lane works on up to 8 rows and 8 columns of one head.  The
columns are one vector of 8, or two vectors of 4 where a type has 32 bits, so that neighbouring lanes access
neighbouring bytes.  Lane t computes the weights of the tokens t and t + 32, and lane j of a segment finishes its row j.

Rounding is that of `cute_ssm.reference.rounding` by its map of rows, with k as the token.  Nothing is read or written
for a sequence whose slot or position is out of range.

PDL: everything is read and written after `griddepcontrol.wait`; dependents are released at once, and must wait too.
"""

from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Numeric, Uint8, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, math, memory, philox
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import Layout, of_table
from cute_ssm.device.philox import RowRandom
from cute_ssm.device.types import Maybe
from cute_ssm.ops.replay_decode.arguments import ACCESS_BYTES, TABLE
from cute_ssm.ops.replay_decode.config import MOST_TOKENS, ReplayDecodeConfig, choose_replay_decode
from cute_ssm.ops.replay_decode.spec import ReplayDecodeSpec

ROWS = COLUMNS = 8  # of a lane, at most


class Tensors(NamedTuple):
    """The tensors of a call."""

    state: cute.Tensor
    x: cute.Tensor
    dt: cute.Tensor
    A: cute.Tensor
    B: cute.Tensor
    C: cute.Tensor
    D: Maybe[cute.Tensor]
    dt_bias: Maybe[cute.Tensor]
    z: Maybe[cute.Tensor]
    x_cache: cute.Tensor
    dt_cache: cute.Tensor
    B_cache: cute.Tensor
    write_pos: cute.Tensor
    is_flush: cute.Tensor
    state_batch_indices: Maybe[cute.Tensor]
    out: cute.Tensor
    rand_seed: Maybe[cute.Tensor]


class Unit(NamedTuple):
    """What a lane works on.

    Attributes
    ----------
    sequence : Int32
    slot : Int64
    head, group : Int32
    first : Int32
        First row of the lane's segment; rows from `dim` on belong to nobody.
    column_lane : Int32
        Number of the lane in its segment.
    num_cached : Int32
        Tokens in the caches: the position of the new one.
    """

    sequence: Int32
    slot: Int64
    head: Int32
    group: Int32
    first: Int32
    column_lane: Int32
    num_cached: Int32


class Weights(NamedTuple):
    """Factors of the state, of the tokens `lane` and `lane + 32`, and of the new token, whose dt' it is."""

    state: Float32
    low: Float32
    high: Float32
    new: Float32


class ReplayDecode:
    """The kernel of a `ReplayDecodeSpec`; batch, heads, groups, slots, rows of the caches and strides are dynamic."""

    def __init__(self, spec: ReplayDecodeSpec, config: ReplayDecodeConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.arch, self.warps = spec, arch, config.warps
        self.state_dtype, self.input_dtype = convert.DTYPES[spec.state_dtype], convert.DTYPES[spec.input_dtype]
        self.lanes = 1 << (spec.dstate // COLUMNS - 1).bit_length()  # of a segment
        self.rows = min(ROWS, self.lanes)  # of a segment
        self.vector = 4 if "float32" in (spec.state_dtype, spec.input_dtype) else COLUMNS
        self.vectors = COLUMNS // self.vector  # of a lane
        self.unit_rows = WARP // self.lanes * self.rows
        self.chunks = -(-spec.dim // self.unit_rows)

    @staticmethod
    def default_config(spec: ReplayDecodeSpec, arch: Arch, units: int | None = None) -> ReplayDecodeConfig:
        """Return the config for a number of (sequence, head) pairs, by default one."""
        return choose_replay_decode(spec, arch, units or 1)

    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` that the kernel is compiled for."""
        spec = self.spec
        dtypes = {
            "state": spec.state_dtype,
            "x": spec.input_dtype,
            "dt": spec.dt_dtype,
            "A": spec.A_dtype,
            "D": spec.D_dtype,
            "dt_bias": spec.dt_bias_dtype,
            "z": spec.input_dtype if spec.has_z else None,
            "is_flush": Uint8,
            "state_batch_indices": spec.src_dtype,
            "rand_seed": "int64" if spec.philox_rounds else None,
        }
        columns = Layout((1,), ACCESS_BYTES * 8 // self.input_dtype.width if spec.vector_inputs else 1)
        sizes: dict[str, int | str] = {"dim": spec.dim, "dstate": spec.dstate}
        tensors = of_table(TABLE, dtypes, sizes, {}, {"B": columns, "C": columns})
        return *tensors, Int64(0), make_fake_stream(use_tvm_ffi_env_stream=True)

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Maybe[cute.Tensor],
        dt_bias: Maybe[cute.Tensor],
        z: Maybe[cute.Tensor],
        x_cache: cute.Tensor,
        dt_cache: cute.Tensor,
        B_cache: cute.Tensor,
        write_pos: cute.Tensor,
        is_flush: cute.Tensor,
        state_batch_indices: Maybe[cute.Tensor],
        out: cute.Tensor,
        rand_seed: Maybe[cute.Tensor],
        null_block_id: Int64,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.compat.vllm`, but A, dt and dt_bias without the axes that they repeat."""
        tensors = Tensors(
            state, x, dt, A, B, C, D, dt_bias, z, x_cache, dt_cache, B_cache, write_pos, is_flush, state_batch_indices,
            out, rand_seed,
        )  # fmt: skip
        nheads = state.shape[1]
        units = x.shape[0] * nheads * self.chunks
        heads, per_group = cute.FastDivmodDivisorV2(nheads), cute.FastDivmodDivisorV2(nheads // B.shape[1])
        self.kernel(tensors, null_block_id, units, heads, per_group).launch(
            grid=[cute.ceil_div(units, self.warps), 1, 1],
            block=[WARP * self.warps, 1, 1],
            use_pdl=True,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        null_block_id: Int64,
        units: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Check the unit of this warp, and take the token there."""
        lane, warp = cute.arch.lane_idx(), cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        index = cute.arch.block_idx()[0] * self.warps + warp
        if index < units:
            pair = index // self.chunks
            b, head = divmod(pair, heads)
            slot, active = Int64(b), Boolean(True)
            if const_expr(self.spec.src_dtype is not None):
                slot = Int64(tensors.state_batch_indices[b])
                active = slot != null_block_id and in_range(slot, tensors.state.shape[0])
            if active:
                position = tensors.write_pos[b]
                if in_range(position, cutlass.min(tensors.dt_cache.shape[2], MOST_TOKENS)):
                    group, in_group = divmod(head, per_group)
                    first = (index - pair * self.chunks) * self.unit_rows + lane // self.lanes * self.rows
                    unit = Unit(b, slot, head, group, first, lane % self.lanes, position)
                    weights = self.weights(tensors, unit, lane)
                    if tensors.is_flush[b] != 0:
                        self.flush(tensors, unit, weights)
                    else:
                        self.read(tensors, unit, weights)
                        stores_B = in_group == 0 and index == pair * self.chunks and lane < self.lanes
                        self.append(tensors, unit, weights.new, stores_B)

    # ----------------------------------------------------------------------------------------------------------- loads
    def first_row(self, unit: Unit) -> Int32:
        """Return the first row that a lane reads: beyond the last one, rows that another lane of its warp has."""
        return cutlass.min(unit.first, self.spec.dim - self.rows)

    def own_row(self, unit: Unit) -> Int32:
        """Return the row that the lane finishes, if `owns` holds."""
        return self.first_row(unit) + unit.column_lane % self.rows

    @cute.jit
    def owns(self, unit: Unit) -> Boolean:
        """Return whether the lane stores the output of its own row; others repeat the work of one that does."""
        return Boolean(unit.first < self.spec.dim and unit.column_lane < self.rows)

    def columns(self, unit: Unit) -> list[Int32]:
        """Return the first columns of a lane's vectors."""
        return [(unit.column_lane + i * self.lanes) * self.vector for i in range(self.vectors)]

    def loaded_columns(self, unit: Unit) -> list[Int32]:
        """Return the columns that a lane reads: beyond the last one, those of another lane."""
        return [cutlass.min(column, self.spec.dstate - self.vector) for column in self.columns(unit)]

    def access_bytes(self, dtype: type[Numeric]) -> int:
        """Return the bytes of a vector."""
        n_bytes: int = self.vector * dtype.width // 8
        return n_bytes

    def load(self, pointers: list[cute.Pointer], aligned: bool = True) -> list[Float32]:
        """Load a lane's columns of a row, from pointers to its vectors."""
        dtype = pointers[0].dtype
        n_bytes = self.access_bytes(dtype) if aligned else dtype.width // 8
        vectors = [memory.load(pointer, dtype, self.vector, n_bytes) for pointer in pointers]
        return [value for vector in vectors for value in vector]

    def new_columns(self, tensor: cute.Tensor, unit: Unit) -> list[Float32]:
        """Load a lane's columns of B or C of the new token."""
        pointers = [memory.address(tensor, unit.sequence, unit.group, column) for column in self.loaded_columns(unit)]
        return self.load(pointers, self.spec.vector_inputs)

    @cute.jit
    def readout(self, tensors: Tensors, unit: Unit) -> list[Float32]:
        """Load a lane's columns of C; zero beyond the last one, where products would count columns twice."""
        values = self.new_columns(tensors.C, unit)
        if const_expr(self.spec.dstate % (self.lanes * COLUMNS) != 0):
            for i in cutlass.range_constexpr(self.vectors):
                for c in cutlass.range_constexpr(self.vector):
                    inside = self.columns(unit)[i] < self.spec.dstate
                    at = i * self.vector + c
                    values[at] = values[at] if inside else Float32(0.0)
        return values

    def cached_B(self, tensors: Tensors, unit: Unit, token: Int32) -> list[Float32]:
        """Load a lane's columns of B of a token in the caches."""
        place = unit.slot, unit.group, token
        return self.load([memory.address(tensors.B_cache, *place, column) for column in self.loaded_columns(unit)])

    def state_row(self, tensors: Tensors, unit: Unit, row: int) -> list[Float32]:
        """Load a lane's columns of a row of the state."""
        place = unit.slot, unit.head, self.first_row(unit) + row
        return self.load([memory.address(tensors.state, *place, column) for column in self.loaded_columns(unit)])

    def new_x(self, tensors: Tensors, unit: Unit, row: Int32) -> Float32:
        """Load x of the new token."""
        return memory.load_scalar(memory.address(tensors.x, unit.sequence, unit.head, row), self.input_dtype)

    # --------------------------------------------------------------------------------------------------------- weights
    @cute.jit
    def weights(self, tensors: Tensors, unit: Unit, lane: Int32) -> Weights:
        """Return the weights of the state and of the tokens.

        Exponents are summed from the last token on: differences of long sums would lose the digits that cancel.
        """
        new = memory.load_scalar(memory.address(tensors.dt, unit.sequence, unit.head), tensors.dt.element_type)
        if const_expr(tensors.dt_bias is not None):
            pointer = memory.address(tensors.dt_bias, unit.head)
            new += memory.load_scalar(pointer, tensors.dt_bias.element_type)
        if const_expr(self.spec.dt_softplus):
            new = math.softplus(new)
        rate = memory.load_scalar(memory.address(tensors.A, unit.head), tensors.A.element_type)
        steps, later = [], []
        for k in cutlass.range_constexpr(2):
            token, step = lane + k * WARP, Float32(0.0)
            if token < unit.num_cached:
                step = memory.load_scalar(memory.address(tensors.dt_cache, unit.slot, unit.head, token), Float32)
            steps.append(new if token == unit.num_cached else step)
            later.append(self.sum_from(rate * steps[k], lane))
        total_high = math.from_lane(later[1], Int32(0))
        total = math.from_lane(later[0], Int32(0)) + total_high
        values = []
        for k in cutlass.range_constexpr(2):
            after = math.from_lane(later[k], (lane + 1) % WARP)
            after = after if lane + 1 < WARP else Float32(0.0)
            values.append(math.decay(after + total_high if const_expr(k == 0) else after) * steps[k])
        return Weights(math.decay(total), values[0], values[1], new)

    def sum_from(self, value: Float32, lane: Int32) -> Float32:
        """Return the sum of the values of this lane and those above."""
        for i in range(WARP.bit_length() - 1):
            above = cute.arch.shuffle_sync_down(value, 1 << i)
            value = value + cutlass.select_(lane + (1 << i) < WARP, above, Float32(0.0))
        return value

    def weight_of(self, weights: Weights, token: Int32) -> Float32:
        """Return the weight of a token in the caches."""
        low = math.from_lane(weights.low, token & (WARP - 1))
        high = math.from_lane(weights.high, token & (WARP - 1))
        return cutlass.select_(token < WARP, low, high)

    # -------------------------------------------------------------------------------------------------------- products
    def dot(self, values: list[Float32], others: list[Float32]) -> Float32:
        """Return the lane's part of a scalar product."""
        total = values[0] * others[0]
        for value, other in zip(values[1:], others[1:]):
            total = cute.math.fma(value, other, total)
        return total

    def of_segment(self, value: Float32) -> Float32:
        """Return the sum over the lanes of a segment, to all of them."""
        for i in range(self.lanes.bit_length() - 1):
            value = value + math.exchanged(value, 1 << i)
        return value

    def of_own_row(self, values: list[Float32], column_lane: Int32) -> Float32:
        """Return to each lane the sum over its segment of the values of its own row; `values` has one of each row."""
        distance = 1
        while len(values) > 1:
            odd = (column_lane & distance) != 0
            values = [
                cutlass.select_(odd, b, a) + math.exchanged(cutlass.select_(odd, a, b), distance)
                for a, b in zip(values[::2], values[1::2])
            ]
            distance *= 2
        total = values[0]
        while distance < self.lanes:
            total = total + math.exchanged(total, distance)
            distance *= 2
        return total

    # ----------------------------------------------------------------------------------------------------------- steps
    @cute.jit
    def read(self, tensors: Tensors, unit: Unit, weights: Weights) -> None:
        """Store the outputs, from the products of C with the state and with each B."""
        C, row = self.readout(tensors, unit), self.own_row(unit)
        of_state = self.of_own_row(
            [self.dot(self.state_row(tensors, unit, r), C) for r in range(self.rows)], unit.column_lane
        )
        x = self.new_x(tensors, unit, row)
        total = weights.new * self.of_segment(self.dot(self.new_columns(tensors.B, unit), C)) * x
        for token in cutlass.range(unit.num_cached, unroll=2):
            weight = self.weight_of(weights, token)
            product = self.of_segment(self.dot(self.cached_B(tensors, unit, token), C))
            pointer = memory.address(tensors.x_cache, unit.slot, unit.head, token, row)
            total = cute.math.fma(weight * product, memory.load_scalar(pointer, self.input_dtype), total)
        self.store_output(tensors, unit, cute.math.fma(weights.state, of_state, total), x)

    @cute.jit
    def append(self, tensors: Tensors, unit: Unit, step: Float32, stores_B: Boolean) -> None:
        """Store x, B and dt' of the new token in the caches."""
        if self.owns(unit):
            row, token = self.own_row(unit), unit.num_cached
            pointer = memory.address(tensors.x_cache, unit.slot, unit.head, token, row)
            memory.store_scalar(pointer, self.new_x(tensors, unit, row), self.input_dtype)
            if row == 0:
                memory.store_scalar(memory.address(tensors.dt_cache, unit.slot, unit.head, token), step, Float32)
        if stores_B:
            B = self.new_columns(tensors.B, unit)
            for i in cutlass.range_constexpr(self.vectors):
                column, part = self.columns(unit)[i], B[i * self.vector : (i + 1) * self.vector]
                if column < self.spec.dstate:
                    pointer = memory.address(tensors.B_cache, unit.slot, unit.group, unit.num_cached, column)
                    memory.store(pointer, part, self.input_dtype, self.access_bytes(self.input_dtype))

    @cute.jit
    def flush(self, tensors: Tensors, unit: Unit, weights: Weights) -> None:
        """Fold all tokens into the state, store it, and store the outputs."""
        first, count = self.first_row(unit), unit.num_cached
        rState = cute.make_rmem_tensor((self.rows * COLUMNS,), Float32)
        for r in cutlass.range_constexpr(self.rows):
            values = self.state_row(tensors, unit, r)
            for c in cutlass.range_constexpr(COLUMNS):
                rState[r * COLUMNS + c] = weights.state * values[c]
        n_bytes = min(ACCESS_BYTES, self.rows * self.input_dtype.width // 8)
        for token in cutlass.range(count, unroll=2):
            weight = self.weight_of(weights, token)
            pointer = memory.address(tensors.x_cache, unit.slot, unit.head, token, first)
            x = memory.load(pointer, self.input_dtype, self.rows, n_bytes)
            self.accumulate(rState, [weight * value for value in x], self.cached_B(tensors, unit, token))
        x = [self.new_x(tensors, unit, first + r) for r in range(self.rows)]
        self.accumulate(rState, [weights.new * value for value in x], self.new_columns(tensors.B, unit))
        cute.arch.sync_warp()  # lanes beyond the last row or column have read those of others

        random = None
        if const_expr(self.spec.philox_rounds > 0):
            random = RowRandom(
                philox.round_keys(tensors.rand_seed[0], self.spec.philox_rounds),
                philox.row_counter(unit.slot, unit.head, count),
            )
        rows = [[rState[r * COLUMNS + c] for c in range(COLUMNS)] for r in range(self.rows)]
        for r in cutlass.range_constexpr(self.rows):
            self.store_state(tensors, unit, first + r, rows[r], random)
        C = self.readout(tensors, unit)
        total = self.of_own_row([self.dot(values, C) for values in rows], unit.column_lane)
        self.store_output(tensors, unit, total, self.new_x(tensors, unit, self.own_row(unit)))

    def accumulate(self, state: cute.Tensor, gains: list[Float32], columns: list[Float32]) -> None:
        """state <- state + gains columns^T."""
        for r, gain in enumerate(gains):
            for c, column in enumerate(columns):
                at = r * COLUMNS + c
                state[at] = cute.math.fma(gain, column, state[at])

    # ---------------------------------------------------------------------------------------------------------- stores
    @cute.jit
    def store_output(self, tensors: Tensors, unit: Unit, value: Float32, x: Float32) -> None:
        """Add the skip term, gate, round and store the output of the lane's own row."""
        row = self.own_row(unit)
        if const_expr(tensors.D is not None):
            D = memory.load_scalar(memory.address(tensors.D, unit.head, row), tensors.D.element_type)
            value = cute.math.fma(D, x, value)
        if const_expr(tensors.z is not None):
            pointer = memory.address(tensors.z, unit.sequence, unit.head, row)
            value *= math.silu(memory.load_scalar(pointer, self.input_dtype))
        if self.owns(unit):
            memory.store_scalar(memory.address(tensors.out, unit.sequence, unit.head, row), value, self.input_dtype)

    @cute.jit
    def store_state(
        self, tensors: Tensors, unit: Unit, row: Int32, values: list[Float32], random: Optional[RowRandom]
    ) -> None:
        """Round and store a lane's columns of a row."""
        for i in cutlass.range_constexpr(self.vectors):
            column, part = self.columns(unit)[i], values[i * self.vector : (i + 1) * self.vector]
            if unit.first < self.spec.dim and column < self.spec.dstate:
                packed = self.rounded(part, random, row, column)
                pointer = memory.address(tensors.state, unit.slot, unit.head, row, column)
                memory.store_packed(pointer, packed, self.state_dtype, self.access_bytes(self.state_dtype))

    def rounded(self, values: list[Float32], random: Optional[RowRandom], row: Int32, column: Int32) -> list[Int32]:
        """Return the words of a vector of a row."""
        if random is None:
            return convert.pack(values, self.state_dtype, self.spec.saturate)
        words = philox.words(random.keys, random.counter, row, column, self.vector, self.spec.dstate)
        return convert.pack_stochastic(values, words, self.state_dtype, self.arch, self.spec.saturate)

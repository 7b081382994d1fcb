"""`SelectiveStep`: one token of the selective state update per sequence.

Per (sequence, head), with the state h [dim, dstate] and the equations of `cute_ssm.reference.selective_state_update`:

    dt' = softplus(dt + dt_bias);   h <- e^(A dt') h + (dt' x) B^T;   out = (h C + D x) silu(z)

A *unit* is `rows` rows of one head's state, contiguous in memory.  Every warp walks its own units, persistently, and
owns a ring of three of them in shared memory: while it updates one in place, the next arrives and the last leaves, both
by one bulk copy that lane 0 issues.  No two warps ever synchronise.  Where every unit has a warp, the ring is one stage.

A unit is worked on in *blocks* of up to 32 rows.  `lanes` lanes share a row; a lane keeps its columns of B and C in
registers for the whole unit, and of each block the scalars of one row: that whose dot product ends up in it.

PDL: everything is read and written after `griddepcontrol.wait`, because the state's last writer may be the upstream
kernel (the same layer's previous step); dependents are released at once, and must wait likewise before they read.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_ssm.arch import Arch
from cute_ssm.device import convert, math, memory
from cute_ssm.spec import SelectiveStateUpdateSpec
from cute_ssm.tuning.selective_step import (
    WARP,
    SelectiveStepConfig,
    block_rows,
    choose,
    input_vector,
    state_vector,
)


class SelectiveStep:
    """The kernel of a `SelectiveStateUpdateSpec`; batch, heads, groups, slots and strides are dynamic."""

    def __init__(self, spec: SelectiveStateUpdateSpec, config: SelectiveStepConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.state_dtype = convert.DTYPES[spec.state_dtype]
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.A_dtype = convert.DTYPES[spec.A_dtype]
        self.dt_dtype = convert.DTYPES[spec.dt_dtype]
        self.D_dtype = convert.DTYPES.get(spec.D_dtype)
        self.dt_bias_dtype = convert.DTYPES.get(spec.dt_bias_dtype)
        self.lanes = config.lanes
        self.block = min(block_rows(spec), config.rows)
        self.stride = WARP // config.lanes  # rows a warp touches at once
        self.steps = self.block // self.stride  # rows of a block that a lane works on
        self.vector = state_vector(spec)  # elements of the state in one access
        self.accesses = -(-spec.dstate // (self.vector * config.lanes))  # of a lane to a row
        self.ragged = spec.dstate % (self.vector * config.lanes) != 0
        self.unit_bytes = config.unit_bytes(spec)
        self.blocks = config.rows // self.block
        self.block_bytes = self.unit_bytes // self.blocks

    @staticmethod
    def default_config(spec: SelectiveStateUpdateSpec, arch: Arch, units: int | None = None) -> SelectiveStepConfig:
        """The config for `units` (sequence, head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, nheads, ngroups, slots = (cute.sym_int32() for _ in range(4))
        dim, dstate = spec.dim, spec.dstate

        def tensor(dtype, shape, inner=(), align=1):
            """Free strides but for the innermost ones given; accesses of `align` elements."""
            outer = tuple(cute.sym_int64(divisibility=align) for _ in shape[len(inner) :])
            return make_fake_tensor(dtype, shape, outer + inner, assumed_align=align * dtype.width // 8)

        def optional(dtype, *args):
            return None if dtype is None else tensor(dtype, *args)

        row, column = (batch, nheads, dim), (batch, ngroups, dstate)
        dt_inner = (0,) if spec.dt_tied else ()
        A_layout = ((0, 0), 1) if spec.A_tied else ((1,), self.input_vector(self.A_dtype))
        return (
            tensor(self.state_dtype, (slots, nheads, dim, dstate), (dstate, 1), 16 * 8 // self.state_dtype.width),
            tensor(self.input_dtype, row, (1,)),
            tensor(self.dt_dtype, row, dt_inner),
            tensor(self.A_dtype, (nheads, dim, dstate), *A_layout),
            tensor(self.input_dtype, column, (1,), self.input_vector(self.input_dtype)),
            tensor(self.input_dtype, column, (1,), self.input_vector(self.input_dtype)),
            optional(self.D_dtype, (nheads, dim), (0,) if spec.D_tied else ()),
            tensor(self.input_dtype, row, (1,)) if spec.has_z else None,
            optional(self.dt_bias_dtype, (nheads, dim), dt_inner),
            optional(convert.DTYPES.get(spec.src_dtype), (batch,)),
            optional(convert.DTYPES.get(spec.dst_dtype), (batch,)),
            tensor(self.input_dtype, row, (1,)),
            Int64(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    def input_vector(self, dtype):
        """Elements of one access to a row of B, C or A."""
        return input_vector(self.spec, dtype.width // 8) if self.spec.vector_inputs else 1

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        dt_bias: Optional[cute.Tensor],
        state_batch_indices: Optional[cute.Tensor],
        dst_state_batch_indices: Optional[cute.Tensor],
        out: cute.Tensor,
        pad_slot_id: Int64,
        max_ctas: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.selective_state_update`; `max_ctas` bounds the grid."""
        batch, nheads, dim = x.shape
        units = batch * nheads * (dim // self.config.rows)
        warps = self.config.warps
        heads = cute.FastDivmodDivisorV2(nheads)
        per_group = cute.FastDivmodDivisorV2(nheads // B.shape[1])
        self.kernel(
            state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, out, pad_slot_id,
            units, heads, per_group,
        ).launch(
            grid=[cutlass.min((units + warps - 1) // warps, max_ctas), 1, 1],
            block=[WARP * warps, 1, 1],
            use_pdl=True,
            stream=stream,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        state: cute.Tensor,
        x: cute.Tensor,
        dt: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        dt_bias: Optional[cute.Tensor],
        src: Optional[cute.Tensor],
        dst: Optional[cute.Tensor],
        out: cute.Tensor,
        pad_slot: Int64,
        units: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_group: cute.FastDivmodDivisorV2,
    ):
        warps, stages = self.config.warps, self.config.stages
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP) if const_expr(warps > 1) else Int32(0)
        smem = SmemAllocator()
        ring = smem.allocate(warps * stages * self.unit_bytes, 128) + warp * (stages * self.unit_bytes)
        full = smem.allocate_array(Int64, warps * stages) + warp * stages
        if lane == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        unit, stride = cute.arch.block_idx()[0] * warps + warp, cute.arch.grid_dim()[0] * warps
        tensors = (state, x, dt, A, B, C, D, z, dt_bias, src, dst, out)
        if unit < units:
            place = self.place(unit, heads, state, src, pad_slot)
            self.request(place, ring, full, lane)
            if const_expr(stages == 1):  # the grid has a warp for every unit
                self.work(tensors, place, per_group, pad_slot, ring, full, Int32(0), lane)
            else:
                stage, phase = Int32(0), Int32(0)
                while unit < units:
                    unit += stride
                    after, ahead = stage + 1 if stage + 1 < stages else Int32(0), place
                    if unit < units:
                        ahead = self.place(unit, heads, state, src, pad_slot)
                        self.request(ahead, ring + after * self.unit_bytes, full + after, lane)
                    self.work(tensors, place, per_group, pad_slot, ring + stage * self.unit_bytes, full + stage, phase, lane)
                    place, phase, stage = ahead, phase ^ 1 if after == 0 else phase, after
            if const_expr(self.spec.update_state):
                if lane == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def work(self, tensors, place, per_group, pad_slot, at, full, phase, lane):
        """Update one unit in the stage at `at` and hand it back."""
        state, x, dt, A, B, C, D, z, dt_bias, _, dst, out = tensors
        b, h, row, _, real = place
        if real:
            group, _ = divmod(h, per_group)
            columns = [self.load_columns(memory.address(t, b, group, 0), lane) for t in (B, C)]
            head = self.load_head(dt, A, dt_bias, b, h)
            cute.arch.mbarrier_wait(full, phase)
            for i in cutlass.range(self.blocks, unroll=min(self.blocks, 2)):
                first = row + i * self.block
                mine = first + self.row_of(lane)
                scalars = self.load_scalars(head, x, dt, D, dt_bias, b, h, mine)
                y = self.update(at + i * self.block_bytes, A, h, first, columns, scalars, lane)
                if self.owns_row(lane):
                    self.emit(out, z, b, h, mine, y, scalars)
            if const_expr(self.spec.update_state):
                cute.arch.fence_proxy("async.shared", space="cta")
        else:
            cute.arch.mbarrier_wait(full, phase)
            if const_expr(self.spec.zero_padding):
                if self.owns_row(lane):
                    for i in cutlass.range(self.blocks, unroll=min(self.blocks, 2)):
                        mine = row + i * self.block + self.row_of(lane)
                        memory.store_scalar(memory.address(out, b, h, mine), Float32(0.0), self.input_dtype)
        cute.arch.sync_warp()
        if const_expr(self.spec.update_state):
            if lane == 0:
                self.give_back(state, dst, pad_slot, place, at)

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def place(self, unit, heads, state, src, pad_slot):
        """(sequence, head, first row, its address, whether there is anything to do); a head's rows are neighbours."""
        chunks = self.spec.dim // self.config.rows
        head = unit // chunks
        row = (unit - head * chunks) * self.config.rows
        b, h = divmod(head, heads)
        slot, real = Int64(b), Boolean(True)
        if const_expr(src is not None):
            slot = Int64(src[b])  # 64 bits: its product with the slot's stride passes 2^31 elements
            real = slot != pad_slot
        return b, h, row, memory.address(state, slot, h, row, 0).toint(), real

    @cute.jit
    def request(self, place, stage, full, lane):
        """Ask for a unit; padding is signalled without bytes."""
        _, _, _, source, real = place
        if lane == 0:
            if real:
                if const_expr(self.spec.update_state and self.config.stages > 1):
                    cute.arch.cp_async_bulk_wait_group(1, read=True)  # all but the last unit have left their stages
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.unit_bytes)
                memory.bulk_load(stage, memory.global_bytes(source), self.unit_bytes, full)
            else:
                cute.arch.mbarrier_arrive(full)

    @cute.jit
    def give_back(self, state, dst, pad_slot, place, at):
        """Write a unit; padding commits an empty group, so that `request` can wait by counting units."""
        b, h, row, source, real = place
        if real:
            target, kept = source, Boolean(True)
            if const_expr(dst is not None):
                slot = Int64(dst[b])
                kept = slot != pad_slot
                target = memory.address(state, slot, h, row, 0).toint()
            if kept:
                memory.bulk_store(memory.global_bytes(target), at, self.unit_bytes)
        cute.arch.cp_async_bulk_commit_group()

    # ------------------------------------------------------------------------------------------------- rows and columns
    def row_of(self, lane, step=0):
        """Row of the block that a lane works on at a step; at step 0 the one whose scalars and sum it holds."""
        return (lane % self.lanes % self.steps ^ step) * self.stride + lane // self.lanes

    def cell(self, lane, step):
        """Bytes from the start of a block to a lane's first access at a step."""
        pitch = self.block_bytes // self.block
        first = self.row_of(lane) * pitch + lane % self.lanes * (self.vector * self.state_dtype.width // 8)
        distance = self.stride * pitch
        if distance & (distance - 1) == 0:  # the bits of the step stand alone: no multiplication, no carry
            return first ^ step * distance
        return first + (self.row_of(lane, step) - self.row_of(lane)) * pitch

    def owns_row(self, lane):
        """Exactly one lane per row: where sums are replicated, the first."""
        return Boolean(True) if self.steps == self.lanes else lane % self.lanes < self.steps

    def column(self, lane, access):
        """First column of a lane's access to a row."""
        return (lane % self.lanes + access * self.lanes) * self.vector

    @cute.jit
    def load_columns(self, pointer, lane):
        """This lane's columns of a row in global memory, zeros past its end."""
        dtype = pointer.dtype
        access_bytes = self.input_vector(dtype) * dtype.width // 8
        values = []
        for i in cutlass.range_constexpr(self.accesses):
            column = self.column(lane, i)
            got = [Float32(0.0)] * self.vector
            if const_expr(not self.ragged):
                got = memory.load(pointer + column, dtype, self.vector, access_bytes)
            elif column < self.spec.dstate:
                got = memory.load(pointer + column, dtype, self.vector, access_bytes)
            values += got
        return values

    # ------------------------------------------------------------------------------------------------------ arithmetic
    def load_step(self, dt, dt_bias, b, h, row):
        """dt' of a row."""
        step = memory.load_scalar(memory.address(dt, b, h, row), self.dt_dtype)
        if dt_bias is not None:
            step += memory.load_scalar(memory.address(dt_bias, h, row), self.dt_bias_dtype)
        return math.softplus(step) if self.spec.dt_softplus else step

    def load_head(self, dt, A, dt_bias, b, h):
        """What the rows of a head share: (dt' if tied, A if tied, e^(A dt') if both are), None where they do not."""
        spec = self.spec
        step = self.load_step(dt, dt_bias, b, h, 0) if spec.dt_tied else None
        a = memory.load_scalar(memory.address(A, h, 0, 0), self.A_dtype) if spec.A_tied else None
        return step, a, math.decay(a * step) if spec.A_tied and spec.dt_tied else None

    def load_scalars(self, head, x, dt, D, dt_bias, b, h, row):
        """What this lane's row needs: (e^(A dt'), or dt' if A is not tied; dt' x; D x)."""
        step, a, decay = head
        if step is None:
            step = self.load_step(dt, dt_bias, b, h, row)
        if decay is None:
            decay = step if a is None else math.decay(a * step)
        value = memory.load_scalar(memory.address(x, b, h, row), self.input_dtype)
        skip = Float32(0.0)
        if D is not None:
            skip = memory.load_scalar(memory.address(D, h, row), self.D_dtype) * value
        return decay, step * value, skip

    @cute.jit
    def update(self, at, A, h, row, columns, scalars, lane):
        """Update the block at `at` in place; returns the dot product with C of this lane's row."""
        spec, vector = self.spec, self.vector
        B, C = columns
        decay, scale, _ = scalars
        sums = []
        for s in cutlass.range_constexpr(self.steps):
            gain = math.exchanged(scale, s)
            rate = decay if const_expr(spec.A_tied and spec.dt_tied) else math.exchanged(decay, s)
            if const_expr(spec.A_tied):
                decays = [rate] * (self.accesses * vector)
            else:
                rates = self.load_columns(memory.address(A, h, row + self.row_of(lane, s), 0), lane)
                decays = [math.decay(a * rate) for a in rates]
            start = cute.recast_ptr(at + self.cell(lane, s), dtype=self.state_dtype)
            total = Float32(0.0)
            for i in cutlass.range_constexpr(self.accesses):
                pointer = start + i * self.lanes * vector
                part = slice(i * vector, (i + 1) * vector)
                if const_expr(not self.ragged):
                    total = self.advance(pointer, decays[part], gain, B[part], C[part], total)
                elif self.column(lane, i) < spec.dstate:
                    total = self.advance(pointer, decays[part], gain, B[part], C[part], total)
            sums.append(total)
        return math.sum_exchanged(sums, self.lanes)

    def advance(self, pointer, decays, gain, B, C, total):
        """h <- decay h + gain B for one access of a lane; returns total + h C."""
        access = self.vector * self.state_dtype.width // 8
        values = memory.load(pointer, self.state_dtype, self.vector, access)
        for j in range(self.vector):
            values[j] = cute.math.fma(gain, B[j], values[j] * decays[j])
            total = cute.math.fma(values[j], C[j], total)
        if self.spec.update_state:
            memory.store(pointer, values, self.state_dtype, access)
        return total

    def emit(self, out, z, b, h, row, y, scalars):
        """Add the skip term, gate, round and store one output."""
        _, _, skip = scalars
        y += skip
        if z is not None:
            y *= math.silu(memory.load_scalar(memory.address(z, b, h, row), self.input_dtype))
        memory.store_scalar(memory.address(out, b, h, row), y, self.input_dtype)

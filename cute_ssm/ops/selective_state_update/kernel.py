"""`SelectiveStep`: the selective state update of one or more tokens per sequence.

Per (sequence, head), with the state h [dim, dstate] and the equations of
`cute_ssm.ops.selective_state_update.reference`:

    dt' = softplus(dt + dt_bias);   h <- e^(A dt') h + (dt' x) B^T;   out = (h C + D x) silu(z)

A *unit* is `rows` rows of one head's state, contiguous in memory.  Every warp walks its own units, persistently, and
owns a ring of three of them in shared memory: while it updates one in place, the next arrives and the last leaves,
both by one bulk copy that lane 0 issues.  No two warps ever synchronise.  Where every unit has a warp, the ring is
one stage.

A unit is worked on in *blocks* of up to 32 rows, as `device.state.StateView` lays them out; a lane keeps its columns
of B and C in registers.  One token streams through a block.  Of several, a block's state stays in float32 registers
for all of them; where one decay per head and token holds (A and dt tied), it stays divided by their running product,
so that a token costs two operations an element: h_t = p_t g_t with p_t = p_{t-1} e^(A dt'_t) and g_t = g_{t-1} +
(dt'_t x_t / p_t) B_t^T.  When p leaves [2^-60, 2^60], g is multiplied by it and it restarts at one.
`selective_products` has another form for few tokens, where the config asks for it.

PDL: everything is read and written after `griddepcontrol.wait`, because the state's last writer may be the upstream
kernel (the same layer's previous step); dependents are released at once, and must wait likewise before they read.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, math, memory, philox
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.device.state import StateView
from cute_ssm.ops.selective_state_update.columns import StagedColumns
from cute_ssm.ops.selective_state_update.config import (
    STAGED_TOKENS,
    SelectiveStepConfig,
    choose,
    input_vector,
    staged_bytes,
    state_vector,
)
from cute_ssm.ops.selective_state_update.products import TokenProducts
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec

SMALLEST, LARGEST = 2.0**-60, 2.0**60  # of the running product of decays: its reciprocal times an input stays finite


class SelectiveStep:
    """The kernel of a `SelectiveStateUpdateSpec`; batch, tokens, heads, groups, slots and strides are dynamic."""

    def __init__(self, spec: SelectiveStateUpdateSpec, config: SelectiveStepConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.A_dtype = convert.DTYPES[spec.A_dtype]
        self.dt_dtype = convert.DTYPES[spec.dt_dtype]
        self.D_dtype = convert.DTYPES.get(spec.D_dtype)
        self.dt_bias_dtype = convert.DTYPES.get(spec.dt_bias_dtype)
        state_dtype = convert.DTYPES[spec.state_dtype]
        vector = state_vector(spec)
        shape = (spec.dstate, config.block_rows, config.lanes, vector)
        rounding = (spec.philox_rounds, arch, spec.saturate)
        self.view = StateView(state_dtype, *shape, *rounding, ordered=bool(config.matmul))
        self.blocks = config.rows // config.block_rows
        self.unit_bytes = config.unit_bytes(spec)
        self.one = spec.tokens == "one"
        self.uniform = spec.A_tied and spec.dt_tied
        self.final = spec.update_state and not spec.dst_columns  # the last state leaves with its unit
        self.each = spec.intermediates or (spec.update_state and spec.dst_columns)  # the state after every token leaves
        self.writes = self.final or self.each
        self.products = TokenProducts(self) if config.matmul else None
        looped = not self.one and not config.matmul and StagedColumns.possible(self.view)
        self.staged = StagedColumns(self) if looped else None
        used = self.products is not None or self.staged is not None
        self.shared_bytes = staged_bytes(spec, config.lanes, config.matmul) if used else 0

    @staticmethod
    def default_config(spec: SelectiveStateUpdateSpec, arch: Arch, units: int | None = None) -> SelectiveStepConfig:
        """The config for `units` (sequence, head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec, view = self.spec, self.view
        batch, tokens, total, nheads, ngroups, slots, rows, steps = (cute.sym_int32() for _ in range(8))
        dim, dstate = spec.dim, spec.dstate

        def when(present, *args):
            return fake(*args) if present else None

        token = {"one": (batch,), "batched": (batch, tokens), "packed": (total,)}[spec.tokens]
        row, column = (*token, nheads, dim), (*token, ngroups, dstate)
        bulk = 16 * 8 // view.dtype.width
        inner = {True: (0,), False: ()}
        A_layout = ((0, 0), 1) if spec.A_tied else ((1,), self.input_vector(self.A_dtype))
        columns = (self.input_dtype, column, (1,), self.input_vector(self.input_dtype))
        src = (batch, cute.sym_int32()) if spec.src_columns else (batch,)
        dst = (batch, cute.sym_int32()) if spec.dst_columns else (batch,)
        saved = spec.intermediates
        return (
            fake(view.dtype, (slots, nheads, dim, dstate), (dstate, 1), bulk),
            fake(self.input_dtype, row, (1,)),
            fake(self.dt_dtype, row, inner[spec.dt_tied]),
            fake(self.A_dtype, (nheads, dim, dstate), *A_layout),
            fake(*columns),
            fake(*columns),
            when(spec.D_dtype, spec.D_dtype, (nheads, dim), inner[spec.D_tied]),
            when(spec.has_z, self.input_dtype, row, (1,)),
            when(spec.dt_bias_dtype, spec.dt_bias_dtype, (nheads, dim), inner[spec.dt_tied]),
            fake(self.input_dtype, row, (1,)),
            when(view.scaled, "float32", (slots, nheads, dim), (1,)),
            when(spec.src_dtype, spec.src_dtype, src),
            when(spec.dst_dtype, spec.dst_dtype, dst),
            when(spec.accepted_dtype, spec.accepted_dtype, (batch,)),
            when(spec.cu_dtype, spec.cu_dtype, (cute.sym_int32(),)),
            when(saved, view.dtype, (rows, steps, nheads, dim, dstate), (dstate, 1), bulk),
            when(spec.intermediate_dtype, spec.intermediate_dtype, (batch,)),
            when(saved and view.scaled, "float32", (rows, steps, nheads, dim), (1,)),
            when(spec.philox_rounds, "int64", (slots if spec.seed_per_slot else 1,), (1,)),
            Int64(0),
            Int32(0),
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
        out: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        state_batch_indices: Optional[cute.Tensor],
        dst_state_batch_indices: Optional[cute.Tensor],
        num_accepted_tokens: Optional[cute.Tensor],
        cu_seqlens: Optional[cute.Tensor],
        intermediate_states_buffer: Optional[cute.Tensor],
        intermediate_state_indices: Optional[cute.Tensor],
        intermediate_state_scales: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        pad_slot_id: Int64,
        max_tokens: Int32,
        max_ctas: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.selective_state_update`.

        `max_tokens` bounds the tokens of a sequence of ``cu_seqlens``, `max_ctas` a persistent grid.
        """
        spec, warps = self.spec, self.config.warps
        batch = cu_seqlens.shape[0] - 1 if const_expr(spec.tokens == "packed") else x.shape[0]
        nheads, groups = state.shape[1], B.shape[len(B.shape) - 2]
        units = batch * nheads * (spec.dim // self.config.rows)
        heads, per_group = cute.FastDivmodDivisorV2(nheads), cute.FastDivmodDivisorV2(nheads // groups)
        ctas = (units + warps - 1) // warps
        if const_expr(self.config.stages > 1):
            ctas = cutlass.min(ctas, max_ctas)
        self.kernel(
            state, x, dt, A, B, C, D, z, dt_bias, out, state_scale, state_batch_indices, dst_state_batch_indices,
            num_accepted_tokens, cu_seqlens, intermediate_states_buffer, intermediate_state_indices,
            intermediate_state_scales, rand_seed, pad_slot_id, max_tokens, units, heads, per_group,
        ).launch(
            grid=[ctas, 1, 1],
            block=[WARP * warps, 1, 1],
            use_pdl=True,
            # persistent CTAs are few: by itself the compiler aims at 168 registers, and spills
            min_blocks_per_mp=1 if self.config.stages > 1 else 0,
            stream=stream,
        )  # fmt: skip
        launch.prefer_shared()

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
        out: cute.Tensor,
        state_scale: Optional[cute.Tensor],
        src: Optional[cute.Tensor],
        dst: Optional[cute.Tensor],
        accepted: Optional[cute.Tensor],
        cu_seqlens: Optional[cute.Tensor],
        saved: Optional[cute.Tensor],
        saved_rows: Optional[cute.Tensor],
        saved_scale: Optional[cute.Tensor],
        rand_seed: Optional[cute.Tensor],
        pad_slot: Int64,
        max_tokens: Int32,
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
        shared = ring
        if const_expr(self.shared_bytes > 0):
            shared = smem.allocate(warps * self.shared_bytes, 128) + warp * self.shared_bytes
        if lane == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        unit, stride = cute.arch.block_idx()[0] * warps + warp, cute.arch.grid_dim()[0] * warps
        where = (state, src, accepted, cu_seqlens, heads, pad_slot, max_tokens, x.shape[0])
        inputs = (x, dt, A, B, C, D, z, dt_bias, out, per_group)
        pool = (state, state_scale, dst, saved, saved_rows, saved_scale, rand_seed, pad_slot)
        if unit < units:
            place = self.place(unit, where)
            self.request(place, ring, full, lane)
            if const_expr(stages == 1):  # the grid has a warp for every unit
                self.work(inputs, pool, place, shared, ring, full, Int32(0), lane)
            else:
                stage, phase = Int32(0), Int32(0)
                while unit < units:
                    unit += stride
                    after, ahead = stage + 1 if stage + 1 < stages else Int32(0), place
                    if unit < units:
                        ahead = self.place(unit, where)
                        self.request(ahead, ring + after * self.unit_bytes, full + after, lane)
                    self.work(inputs, pool, place, shared, ring + stage * self.unit_bytes, full + stage, phase, lane)
                    place, phase, stage = ahead, phase ^ 1 if after == 0 else phase, after
            if const_expr(self.writes):
                if lane == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def place(self, unit, where):
        """(sequence, its first token, its tokens, head, first row, slot, address, whether there is anything to do).

        A sequence whose offsets, number of accepted tokens or slot are out of range has nothing to do, like padding.
        """
        state, src, accepted, cu_seqlens, heads, pad_slot, max_tokens, total = where
        chunks = self.spec.dim // self.config.rows
        head = unit // chunks
        row = (unit - head * chunks) * self.config.rows
        b, h = divmod(head, heads)
        start, count = Int32(0), Int32(1)
        slot, real = Int64(b), Boolean(True)
        if const_expr(self.spec.tokens == "packed"):
            first, last = Int64(cu_seqlens[b]), Int64(cu_seqlens[b + 1])
            inside = first >= 0 and last > first and last <= total
            start = Int32(first) if inside else Int32(0)
            count = cutlass.min(Int32(last - first), max_tokens) if inside else Int32(0)
            real = count > 0
        if const_expr(src is not None):
            # 64 bits: the product with the slot's stride passes 2^31 elements
            if const_expr(self.spec.src_columns):
                taken = Int64(accepted[b])
                column = taken - 1 if taken > 0 else Int64(0)
                slot = pad_slot
                if in_range(column, src.shape[1]):
                    slot = Int64(src[b, column])
            else:
                slot = Int64(src[b])
            real = real and slot != pad_slot and in_range(slot, state.shape[0])
        return b, start, count, h, row, slot, memory.address(state, slot, h, row, 0).toint(), real

    @cute.jit
    def request(self, place, stage, full, lane):
        """Ask for a unit; padding is signalled without bytes."""
        _, _, _, _, _, _, source, real = place
        if lane == 0:
            if real:
                if const_expr(self.writes and self.config.stages > 1):
                    cute.arch.cp_async_bulk_wait_group(1, read=True)  # all but the last unit have left their stages
                cute.arch.mbarrier_arrive_and_expect_tx(full, self.unit_bytes)
                memory.bulk_load(stage, memory.global_bytes(source), self.unit_bytes, full)
            else:
                cute.arch.mbarrier_arrive(full)

    @cute.jit
    def work(self, inputs, pool, place, shared, at, full, phase, lane):
        """Update one unit in the stage at `at` and hand it back; `shared` is the warp's own, for B and C."""
        state, _, dst, _, _, _, _, pad_slot = pool
        b, start, count, h, row, slot, source, real = place
        target, kept = slot, real
        if const_expr(self.spec.tokens == "batched"):
            count = inputs[0].shape[1]
        if const_expr(self.final and dst is not None):
            if real:
                target = Int64(dst[b])
                kept = target != pad_slot and in_range(target, state.shape[0])
        if real:
            if const_expr(self.one):
                self.one_token(inputs, pool, place, target, kept, at, full, phase, lane)
            elif const_expr(self.products is not None):
                prepared = self.products.prepare(inputs, place, count, shared, lane)
                cute.arch.mbarrier_wait(full, phase)
                for i in cutlass.range(self.blocks, unroll=1):
                    self.products.block(inputs, pool, place, count, prepared, target, at, shared, i, lane)
            else:
                cute.arch.mbarrier_wait(full, phase)
                for i in cutlass.range(self.blocks, unroll=1):
                    self.many_tokens(inputs, pool, place, count, target, kept, at, shared, i, lane)
            if const_expr(self.final):
                cute.arch.fence_proxy("async.shared", space="cta")
        else:
            cute.arch.mbarrier_wait(full, phase)
            if const_expr(self.spec.zero_padding):
                self.zero_rows(inputs[8], b, start, count, h, row, lane)
        cute.arch.sync_warp()
        if const_expr(self.writes):
            if lane == 0:
                if const_expr(self.final):
                    if kept:
                        to = source
                        if const_expr(dst is not None):
                            to = memory.address(state, target, h, row, 0).toint()
                        memory.bulk_store(memory.global_bytes(to), at, self.unit_bytes)
                cute.arch.cp_async_bulk_commit_group()  # empty or not: `request` waits by counting units

    @cute.jit
    def zero_rows(self, out, b, start, count, h, row, lane):
        """Outputs of a sequence that is padding."""
        for t in cutlass.range(count, unroll=1):
            for i in cutlass.range(lane, self.config.rows, WARP, unroll=1):
                memory.store_scalar(self.token(out, b, start, t, h, row + i), Float32(0.0), self.input_dtype)

    # ------------------------------------------------------------------------------------------------------- one token
    @cute.jit
    def one_token(self, inputs, pool, place, target, kept, at, full, phase, lane):
        """Update a unit by its sequence's only token."""
        x, dt, A, B, C, D, z, dt_bias, out, per_group = inputs
        b, start, _, h, row, slot, _, _ = place
        group, _ = divmod(h, per_group)
        B, C = (self.load_columns(self.token(t, b, start, 0, group, 0), lane) for t in (B, C))
        head = self.load_head(dt, A, dt_bias, b, start, h)
        random = self.random(pool, slot, target, h, Int32(0))
        cute.arch.mbarrier_wait(full, phase)
        for i in cutlass.range(self.blocks, unroll=min(self.blocks, 2)):
            first = row + i * self.view.block
            mine = first + self.view.row_of(lane)
            cell = at + i * self.view.bytes
            decay, scale, skip = self.load_scalars(head, x, dt, D, dt_bias, b, start, 0, h, mine)
            factor = self.load_scale(pool, slot, h, mine)
            rows, sums = [], []
            for s in cutlass.range_constexpr(self.view.steps):
                gain = math.exchanged(scale, s)
                decays = self.decays(A, decay, h, first, s, lane)
                values, total = self.view.load(cell, lane, s, factor), Float32(0.0)
                for k in cutlass.range_constexpr(self.view.columns):
                    values[k] = cute.math.fma(gain, B[k], values[k] * decays[k])
                    total = cute.math.fma(values[k], C[k], total)
                sums.append(total)
                rows.append(values)
                if const_expr(self.final and not self.view.scaled):
                    self.view.store(cell, lane, s, values, None, (*random, first))
            y = math.sum_exchanged(sums, self.view.lanes)
            if self.view.owns_row(lane):
                self.emit(out, z, b, start, 0, h, mine, y, skip)
            if const_expr(self.final and self.view.scaled):
                self.store_rows(pool[1], rows, cell, (target, h, mine), kept, (*random, first), lane)

    # ----------------------------------------------------------------------------------------------------- many tokens
    @cute.jit
    def many_tokens(self, inputs, pool, place, count, target, kept, at, shared, i, lane):
        """Update one block of a unit by all tokens of its sequence."""
        x, dt, A, B, C, D, z, dt_bias, out, per_group = inputs
        b, start, _, h, row, slot, _, _ = place
        b, h = memory.pinned(Int32(b)), memory.pinned(Int32(h))
        group, _ = divmod(h, per_group)
        first = row + i * self.view.block
        mine = first + self.view.row_of(lane)
        cell = at + i * self.view.bytes
        factor = self.load_scale(pool, slot, h, mine)
        held = cute.make_rmem_tensor((self.view.steps * self.view.columns,), Float32)
        for s in cutlass.range_constexpr(self.view.steps):
            values = self.view.load(cell, lane, s, factor)
            for k in cutlass.range_constexpr(self.view.columns):
                held[s * self.view.columns + k] = values[k]
        carry, steps, powers = Float32(1.0), Float32(0.0), Float32(0.0)
        for t in cutlass.range(count, unroll=1):
            head = (None, None, None)
            if const_expr(self.uniform):
                if t & (WARP - 1) == 0:  # a lane computes the scalars of one of 32 tokens
                    mine_t = cutlass.min(t + lane, count - 1)
                    steps, _, powers = self.load_head(dt, A, dt_bias, b, start, h, mine_t)
                step, power = math.from_lane(steps, t & (WARP - 1)), math.from_lane(powers, t & (WARP - 1))
                carry *= power
                if carry < SMALLEST or carry > LARGEST:
                    self.multiply(held, carry)
                    carry = Float32(1.0)
                head = (step, None, power)
            elif const_expr(self.spec.A_tied or self.spec.dt_tied):
                head = self.load_head(dt, A, dt_bias, b, start, h, t)
            decay, scale, skip = self.load_scalars(head, x, dt, D, dt_bias, b, start, t, h, mine)
            if const_expr(self.staged is not None):
                if t & (STAGED_TOKENS - 1) == 0 and (
                    i == 0 or count > STAGED_TOKENS
                ):  # few tokens stay staged for all blocks
                    self.staged.stage((B, C), b, start, count, t, group, shared, lane)
                Bt, Ct = (self.staged.load(shared, which, t & (STAGED_TOKENS - 1), lane) for which in range(2))
            else:
                Bt, Ct = (self.load_columns(self.token(tensor, b, start, t, group, 0), lane) for tensor in (B, C))
            if const_expr(self.uniform):
                scale = scale * math.reciprocal(carry)
            sums = []
            for s in cutlass.range_constexpr(self.view.steps):
                gain, total = math.exchanged(scale, s), Float32(0.0)
                decays = None if const_expr(self.uniform) else self.decays(A, decay, h, first, s, lane)
                for k in cutlass.range_constexpr(self.view.columns):
                    value = held[s * self.view.columns + k]
                    if const_expr(not self.uniform):
                        value = value * decays[k]
                    value = cute.math.fma(gain, Bt[k], value)
                    held[s * self.view.columns + k] = value
                    total = cute.math.fma(value, Ct[k], total)
                sums.append(total)
            y = math.sum_exchanged(sums, self.view.lanes)
            if const_expr(self.uniform):
                y *= carry
            if self.view.owns_row(lane):
                self.emit(out, z, b, start, t, h, mine, y, skip)
            if const_expr(self.each):
                self.keep(pool, held, carry, cell, b, t, h, slot, first, mine, lane)
        if const_expr(self.final):
            if const_expr(self.each):
                self.vacate(lane)
            rows = self.scaled_rows(held, carry)
            random = self.random(pool, slot, target, h, count - 1)
            if const_expr(self.view.scaled):
                self.store_rows(pool[1], rows, cell, (target, h, mine), kept, (*random, first), lane)
            else:
                for s in cutlass.range_constexpr(self.view.steps):
                    self.view.store(cell, lane, s, rows[s], None, (*random, first))

    def multiply(self, held, factor):
        """Multiply the registers of a block."""
        for k in range(self.view.steps * self.view.columns):
            held[k] = held[k] * factor

    def scaled_rows(self, held, carry):
        """The registers of a block as lists of a step's columns, with the running decay multiplied in."""
        n = self.view.columns
        rows = [[held[s * n + k] for k in range(n)] for s in range(self.view.steps)]
        return [[value * carry for value in row] for row in rows] if self.uniform else rows

    @cute.jit
    def keep(self, pool, held, carry, cell, b, t, h, slot, first, mine, lane):
        """Write the block's state after token t to that token's destination, through the block's own shared memory."""
        state, state_scale, dst, saved, saved_rows, saved_scale, _, pad_slot = pool
        rows = self.scaled_rows(held, carry)
        if const_expr(self.spec.intermediates):
            line, inside = slot, Boolean(True)
            if const_expr(saved_rows is not None):
                line = Int64(saved_rows[b])
                inside = in_range(line, saved.shape[0])
            to = memory.address(saved, line, t, h, first, 0)
            if inside:
                self.leave(pool, rows, cell, to, saved_scale, (line, t, h, mine), line, slot, t, h, first, lane)
        if const_expr(self.spec.update_state and self.spec.dst_columns):
            line = Int64(dst[b, t])
            to = memory.address(state, line, h, first, 0)
            if line != pad_slot and in_range(line, state.shape[0]):
                self.leave(pool, rows, cell, to, state_scale, (line, h, mine), line, slot, t, h, first, lane)

    @cute.jit
    def leave(self, pool, rows, cell, to, scales, scale_at, line, slot, t, h, first, lane):
        self.vacate(lane)
        random = (*self.random(pool, slot, line, h, t), first)
        if const_expr(self.view.scaled):
            self.store_rows(scales, rows, cell, scale_at, Boolean(True), random, lane)
        else:
            for s in cutlass.range_constexpr(self.view.steps):
                self.view.store(cell, lane, s, rows[s], None, random)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            memory.bulk_store(memory.global_bytes(to.toint()), cell, self.view.bytes)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def vacate(self, lane):
        """Wait until no bulk copy reads this warp's shared memory."""
        if lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()

    # ------------------------------------------------------------------------------------------------------- arguments
    def token(self, tensor, b, start, t, *coord):
        """Pointer to an element of token t of sequence b."""
        row = {"one": (b,), "batched": (b, t), "packed": (start + t,)}[self.spec.tokens]
        return memory.address(tensor, *row, *coord)

    def load_columns(self, pointer, lane):
        """This lane's columns of a row of B, C or A."""
        dtype = pointer.dtype
        return self.view.load_columns(pointer, lane, self.input_vector(dtype) * dtype.width // 8)

    def load_step(self, dt, dt_bias, b, start, t, h, row):
        """dt' of a row."""
        step = memory.load_scalar(self.token(dt, b, start, t, h, row), self.dt_dtype)
        if dt_bias is not None:
            step += memory.load_scalar(memory.address(dt_bias, h, row), self.dt_bias_dtype)
        return math.softplus(step) if self.spec.dt_softplus else step

    def load_head(self, dt, A, dt_bias, b, start, h, t=0):
        """What the rows of a head share: (dt' if tied, A if tied, e^(A dt') if both are), None where they do not."""
        spec = self.spec
        step = self.load_step(dt, dt_bias, b, start, t, h, 0) if spec.dt_tied else None
        a = memory.load_scalar(memory.address(A, h, 0, 0), self.A_dtype) if spec.A_tied else None
        return step, a, math.decay(a * step) if self.uniform else None

    def load_scalars(self, head, x, dt, D, dt_bias, b, start, t, h, row):
        """What this lane's row needs: (e^(A dt'), or dt' if A is not tied; dt' x; (D, x) or None)."""
        step, a, decay = head
        if step is None:
            step = self.load_step(dt, dt_bias, b, start, t, h, row)
        if decay is None:
            decay = step if a is None else math.decay(a * step)
        value = memory.load_scalar(self.token(x, b, start, t, h, row), self.input_dtype)
        skip = None if D is None else (memory.load_scalar(memory.address(D, h, row), self.D_dtype), value)
        return decay, step * value, skip

    def decays(self, A, decay, h, first, step, lane):
        """Factors of a lane's columns of its row at a step."""
        rate = decay if self.uniform else math.exchanged(decay, step)
        if self.spec.A_tied:
            return [rate] * self.view.columns
        row = first + self.view.row_of(lane, step)
        return [math.decay(a * rate) for a in self.load_columns(memory.address(A, h, row, 0), lane)]

    def load_scale(self, pool, slot, h, row):
        """Scale of this lane's row, if states are quantised."""
        return memory.load_scalar(memory.address(pool[1], slot, h, row), Float32) if self.view.scaled else None

    def random(self, pool, slot, line, h, t):
        """(round keys, counter words) of a state that is written to `line`, if it is rounded stochastically."""
        if not self.spec.philox_rounds:
            return None, None
        seed = pool[6][slot if self.spec.seed_per_slot else 0]
        return philox.round_keys(seed, self.spec.philox_rounds), philox.row_counter(line, h, t)

    # --------------------------------------------------------------------------------------------------------- results
    @cute.jit
    def store_rows(self, scales, rows, cell, scale_at, kept, random, lane):
        """Quantise a block into shared memory, and write its scales to their place in global memory."""
        scale, factor = self.view.encode(rows)
        for s in cutlass.range_constexpr(self.view.steps):
            self.view.store(cell, lane, s, rows[s], factor, random)
        if kept and self.view.owns_row(lane):
            memory.store_scalar(memory.address(scales, *scale_at), scale, Float32)

    def emit(self, out, z, b, start, t, h, row, y, skip):
        """Add the skip term, gate, round and store one output.

        The sum is one operation by name: whether the compiler makes it one depends on the code around it.
        """
        if skip is not None:
            y = cute.math.fma(*skip, y)
        if z is not None:
            y *= math.silu(memory.load_scalar(self.token(z, b, start, t, h, row), self.input_dtype))
        memory.store_scalar(self.token(out, b, start, t, h, row), y, self.input_dtype)

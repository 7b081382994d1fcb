"""`SelectiveStep`: the selective state update of one or more tokens per sequence.

Per (sequence, head), with the state h [dim, dstate] and the equations of
`cute_ssm.ops.selective_state_update.reference`:

    dt' = softplus(dt + dt_bias);   h <- e^(A dt') h + (dt' x) B^T;   out = (h C + D x) silu(z)

A *unit* is `rows` rows of one head's state, contiguous in memory.  Every warp is persistent, updates units of its own,
and owns a pipeline of three stages in shared memory: while it updates one unit in place, the next arrives and the last
leaves, both by one bulk copy that lane 0 issues.  No two warps ever synchronise.  Where every unit has a warp, the
pipeline is one stage.

A unit is worked on in *blocks* of up to 32 rows, as `device.state.StateView` lays them out; a lane holds its columns
of B and C in registers.  How a block is updated depends on the number of tokens: `SingleToken`, `TokenLoop`, or, for
few tokens where the config asks for it, `TokenProducts`.

PDL: everything is read and written after `griddepcontrol.wait`, because the state's last writer may be the upstream
kernel (the same layer's previous step); dependents are released at once, and must wait likewise before they read.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import Layout, of_table
from cute_ssm.device.state import StateView
from cute_ssm.device.types import Maybe
from cute_ssm.ops.selective_state_update.arguments import TABLE, TOKENS
from cute_ssm.ops.selective_state_update.columns import StagedColumns
from cute_ssm.ops.selective_state_update.config import SelectiveStepConfig, choose, staged_bytes, state_vector
from cute_ssm.ops.selective_state_update.products import TokenProducts
from cute_ssm.ops.selective_state_update.single_token import SingleToken
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.state_stores import StateStores
from cute_ssm.ops.selective_state_update.token_io import TokenIO
from cute_ssm.ops.selective_state_update.token_loop import TokenLoop
from cute_ssm.ops.selective_state_update.units import Destination, Scalars, Stage, Tensors, Unit, batch_of


class SelectiveStep:
    """The kernel of a `SelectiveStateUpdateSpec`; batch, tokens, heads, groups, slots and strides are dynamic."""

    def __init__(self, spec: SelectiveStateUpdateSpec, config: SelectiveStepConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.view = StateView(
            convert.DTYPES[spec.state_dtype],
            spec.dstate,
            config.block_rows,
            config.lanes,
            state_vector(spec),
            arch,
            spec.saturate,
            ordered=bool(config.matmul),
        )
        self.io = TokenIO(spec, self.view)
        stores = StateStores(spec, self.view)
        staged = StagedColumns(spec, self.view, self.io)
        self.single_token = SingleToken(spec, config, self.view, self.io, stores)
        self.token_loop = TokenLoop(spec, self.view, self.io, stores, staged)
        self.products = TokenProducts(spec, self.view, self.io, stores)
        self.blocks = config.rows // config.block_rows
        self.unit_bytes = config.unit_bytes(spec)
        self.writes = spec.writes_last_state or spec.writes_every_state
        shares_columns = bool(config.matmul) or (spec.tokens != "one" and staged.possible)
        self.shared_bytes = staged_bytes(spec, config.lanes, config.matmul) if shares_columns else 0

    @staticmethod
    def default_config(spec: SelectiveStateUpdateSpec, arch: Arch, units: int | None = None) -> SelectiveStepConfig:
        """The config for `units` (sequence, head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return the arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec, io = self.spec, self.io
        scale_dtype = "float32" if spec.scaled else None
        dtypes = {
            "state": spec.state_dtype,
            "x": spec.input_dtype,
            "dt": spec.dt_dtype,
            "A": spec.A_dtype,
            "D": spec.D_dtype,
            "z": spec.input_dtype if spec.has_z else None,
            "dt_bias": spec.dt_bias_dtype,
            "state_scale": scale_dtype,
            "state_batch_indices": spec.src_dtype,
            "dst_state_batch_indices": spec.dst_dtype,
            "num_accepted_tokens": spec.accepted_dtype,
            "cu_seqlens": spec.cu_dtype,
            "intermediate_states_buffer": spec.state_dtype if spec.intermediates else None,
            "intermediate_state_indices": spec.intermediate_dtype,
            "intermediate_state_scales": scale_dtype if spec.intermediates else None,
            "rand_seed": "int64" if spec.philox_rounds else None,
        }
        axes = {
            "tokens": TOKENS[spec.tokens],
            "src": ("batch", "src_columns") if spec.src_columns else ("batch",),
            "dst": ("batch", "dst_columns") if spec.dst_columns else ("batch",),
        }
        tied, untied = Layout((0,)), Layout()
        columns = Layout((1,), io.input_vector(io.input_dtype))
        layouts = {
            "dt": tied if spec.dt_tied else untied,
            "A": Layout((0, 0)) if spec.A_tied else Layout((1,), io.input_vector(io.A_dtype)),
            "B": columns,
            "C": columns,
            "D": tied if spec.D_tied else untied,
            "dt_bias": tied if spec.dt_tied else untied,
            "rand_seed": Layout((1,)),
        }
        sizes = {"dim": spec.dim, "dstate": spec.dstate, "seeds": "slots" if spec.seed_per_slot else 1}
        numbers = (Int64(0), Int32(0), Int32(0))  # pad_slot_id, max_tokens, max_ctas
        return (
            *of_table(TABLE, dtypes, sizes, axes, layouts),
            *numbers,
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

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
        z: Maybe[cute.Tensor],
        dt_bias: Maybe[cute.Tensor],
        out: cute.Tensor,
        state_scale: Maybe[cute.Tensor],
        state_batch_indices: Maybe[cute.Tensor],
        dst_state_batch_indices: Maybe[cute.Tensor],
        num_accepted_tokens: Maybe[cute.Tensor],
        cu_seqlens: Maybe[cute.Tensor],
        intermediate_states_buffer: Maybe[cute.Tensor],
        intermediate_state_indices: Maybe[cute.Tensor],
        intermediate_state_scales: Maybe[cute.Tensor],
        rand_seed: Maybe[cute.Tensor],
        pad_slot_id: Int64,
        max_tokens: Int32,
        max_ctas: Int32,
        stream: Any,
    ) -> None:
        """Shapes and types as in `cute_ssm.selective_state_update`.

        `max_tokens` bounds the tokens of a sequence of ``cu_seqlens``, `max_ctas` a persistent grid.
        """
        warps = self.config.warps
        tensors = Tensors(
            state, x, dt, A, B, C, D, z, dt_bias, out, state_scale, state_batch_indices, dst_state_batch_indices,
            num_accepted_tokens, cu_seqlens, intermediate_states_buffer, intermediate_state_indices,
            intermediate_state_scales, rand_seed,
        )  # fmt: skip
        batch = batch_of(tensors)
        nheads, groups = state.shape[1], B.shape[len(B.shape) - 2]
        units = batch * nheads * (self.spec.dim // self.config.rows)
        heads, per_group = cute.FastDivmodDivisorV2(nheads), cute.FastDivmodDivisorV2(nheads // groups)
        ctas = (units + warps - 1) // warps
        if const_expr(self.config.stages > 1):
            ctas = cutlass.min(ctas, max_ctas)
        self.kernel(tensors, Scalars(pad_slot_id, max_tokens, units, heads, per_group)).launch(
            grid=[ctas, 1, 1],
            block=[WARP * warps, 1, 1],
            use_pdl=True,
            # persistent CTAs are few: by itself the compiler aims at 168 registers, and spills
            min_blocks_per_mp=1 if self.config.stages > 1 else 0,
            stream=stream,
        )
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(self, tensors: Tensors, scalars: Scalars) -> None:
        """Update all units; every warp has units of its own."""
        warps, stages = self.config.warps, self.config.stages
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP) if const_expr(warps > 1) else Int32(0)
        smem = SmemAllocator()
        at = smem.allocate(warps * stages * self.unit_bytes, 128) + warp * (stages * self.unit_bytes)
        full = smem.allocate_array(Int64, warps * stages) + warp * stages
        pipeline, shared = Stage(at, full), at
        if const_expr(self.shared_bytes > 0):
            shared = smem.allocate(warps * self.shared_bytes, 128) + warp * self.shared_bytes
        if lane == 0:
            for stage in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + stage, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()

        index, stride = cute.arch.block_idx()[0] * warps + warp, cute.arch.grid_dim()[0] * warps
        if index < scalars.units:
            unit = self.unit_of(index, tensors, scalars)
            self.request(unit, pipeline, lane)
            if const_expr(stages == 1):  # the grid has a warp for every unit
                self.update(tensors, scalars, unit, pipeline, Int32(0), shared, lane)
            else:
                stage, phase = Int32(0), Int32(0)
                while index < scalars.units:
                    index += stride
                    next_stage, next_unit = stage + 1 if stage + 1 < stages else Int32(0), unit
                    if index < scalars.units:
                        next_unit = self.unit_of(index, tensors, scalars)
                        self.request(next_unit, self.stage_of(pipeline, next_stage), lane)
                    self.update(tensors, scalars, unit, self.stage_of(pipeline, stage), phase, shared, lane)
                    unit, phase, stage = next_unit, phase ^ 1 if next_stage == 0 else phase, next_stage
            if const_expr(self.writes):
                if lane == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)

    # ----------------------------------------------------------------------------------------------------------- units
    @cute.jit
    def unit_of(self, index: Int32, tensors: Tensors, scalars: Scalars) -> Unit:
        """Return the unit of an index."""
        spec = self.spec
        chunks = spec.dim // self.config.rows
        head = index // chunks
        row = (index - head * chunks) * self.config.rows
        b, h = divmod(head, scalars.nheads)
        start, count = Int32(0), Int32(1)
        slot, active = Int64(b), Boolean(True)
        if const_expr(spec.tokens == "packed"):
            cu_seqlens = tensors.cu_seqlens
            first, last = Int64(cu_seqlens[b]), Int64(cu_seqlens[b + 1])
            inside = first >= 0 and last > first and last <= tensors.x.shape[0]
            start = Int32(first) if inside else Int32(0)
            count = cutlass.min(Int32(last - first), scalars.max_tokens) if inside else Int32(0)
            active = count > 0
        if const_expr(spec.src_dtype is not None):
            indices = tensors.state_batch_indices
            # 64 bits: the product with the slot's stride passes 2^31 elements
            if const_expr(spec.src_columns):
                num_accepted = tensors.num_accepted_tokens
                accepted = Int64(num_accepted[b])
                column = accepted - 1 if accepted > 0 else Int64(0)
                slot = scalars.pad_slot_id
                if in_range(column, indices.shape[1]):
                    slot = Int64(indices[b, column])
            else:
                slot = Int64(indices[b])
            active = active and slot != scalars.pad_slot_id and in_range(slot, tensors.state.shape[0])
        return Unit(b, start, count, h, row, slot, memory.address(tensors.state, slot, h, row, 0).toint(), active)

    def stage_of(self, pipeline: Stage, index: Int32) -> Stage:
        """Return a stage of a warp's pipeline, whose first one is given."""
        return Stage(pipeline.at + index * self.unit_bytes, pipeline.full + index)

    @cute.jit
    def request(self, unit: Unit, stage: Stage, lane: Int32) -> None:
        """Start the copy of a unit into a stage.  For padding, arrive expecting no bytes."""
        if lane == 0:
            if unit.active:
                if const_expr(self.writes and self.config.stages > 1):
                    cute.arch.cp_async_bulk_wait_group(1, read=True)  # all but the last unit have left their stages
                cute.arch.mbarrier_arrive_and_expect_tx(stage.full, self.unit_bytes)
                memory.bulk_load(stage.at, memory.global_bytes(unit.address), self.unit_bytes, stage.full)
            else:
                cute.arch.mbarrier_arrive(stage.full)

    @cute.jit
    def update(
        self,
        tensors: Tensors,
        scalars: Scalars,
        unit: Unit,
        stage: Stage,
        phase: Int32,
        shared: cute.Pointer,
        lane: Int32,
    ) -> None:
        """Update a unit in its stage and store it; `shared` is the warp's own memory for B and C."""
        spec = self.spec
        state, destination = tensors.state, Destination(unit.slot, unit.active)
        if const_expr(spec.tokens == "batched"):
            unit = unit._replace(num_tokens=tensors.x.shape[1])
        if const_expr(spec.writes_last_state and spec.dst_dtype is not None):
            if unit.active:
                indices = tensors.dst_state_batch_indices
                slot = Int64(indices[unit.sequence])
                destination = Destination(slot, slot != scalars.pad_slot_id and in_range(slot, state.shape[0]))
        if unit.active:
            if const_expr(spec.tokens == "one"):
                self.single_token.update(tensors, scalars, unit, destination, stage, phase, lane)
            elif const_expr(self.config.matmul):
                prepared = self.products.prepare(tensors, scalars, unit, shared, lane)
                cute.arch.mbarrier_wait(stage.full, phase)
                for i in cutlass.range(self.blocks, unroll=1):
                    self.products.update_block(tensors, unit, prepared, destination, stage.at, shared, i, lane)
            else:
                cute.arch.mbarrier_wait(stage.full, phase)
                for i in cutlass.range(self.blocks, unroll=1):
                    self.token_loop.update_block(tensors, scalars, unit, destination, stage.at, shared, i, lane)
            if const_expr(spec.writes_last_state):
                cute.arch.fence_proxy("async.shared", space="cta")
        else:
            cute.arch.mbarrier_wait(stage.full, phase)
            if const_expr(spec.zero_padding):
                self.zero_outputs(tensors, unit, lane)
        cute.arch.sync_warp()
        if const_expr(self.writes):
            if lane == 0:
                if const_expr(spec.writes_last_state):
                    if destination.active:
                        address = unit.address
                        if const_expr(spec.dst_dtype is not None):
                            address = memory.address(state, destination.slot, unit.head, unit.first_row, 0).toint()
                        memory.bulk_store(memory.global_bytes(address), stage.at, self.unit_bytes)
                cute.arch.cp_async_bulk_commit_group()  # empty or not: `request` waits by counting units

    @cute.jit
    def zero_outputs(self, tensors: Tensors, unit: Unit, lane: Int32) -> None:
        """Store zeros to the outputs of a sequence that is padding."""
        for t in cutlass.range(unit.num_tokens, unroll=1):
            for i in cutlass.range(lane, self.config.rows, WARP, unroll=1):
                pointer = self.io.pointer(tensors.out, unit, t, unit.head, unit.first_row + i)
                memory.store_scalar(pointer, Float32(0.0), self.io.input_dtype)

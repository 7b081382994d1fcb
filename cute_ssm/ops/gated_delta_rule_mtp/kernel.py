"""`GatedDeltaRule`: up to 16 tokens of the gated delta rule per request, by products on tensor cores.

Per (request, value head), with the state S [V, K] and the equations of `reference.gated_delta_rule_products`:

    P = S K^T, R = S Q^T (raw keys and queries);   X = V - gamma kappa P;   U = X M^T with M = (1 + L)^-1 diag(beta)
    out = gamma rho R + U A^T;                      S_n = gamma_n S + (D_n kappa U) K

A CTA owns `rows` rows of one head, its warps 16 of them at a time.  A warp asks for its first tile of the state before
anything else, straight into registers; then all warps bring keys, queries and values to shared memory, the first one
computes the coefficients, which depend on no row, and every warp goes its own way: once a tile is multiplied, the next
one takes its registers, if nothing is to be written.

A *block* is 16 columns of a tile; lane ``4 g + t`` holds columns 4 t .. 4 t + 3 of rows g and g + 8 of it.  Products
sum over columns, so any order of them will do: elements (2 s, 2 s + 1) are the operand of step s of S K^T, and elements
(s, 2 + s) belong to the result of step s of U K.  So the state never moves between lanes.  A float32 state, and X, U
and the coefficients, are multiplied as two parts each; keys and queries are exact.

In shared memory, row r of keys and queries is token r; queries follow keys.  Column n of a product belongs to row
``row_of(n)`` of a group of 8 rows: lane t's two columns to rows t and 4 + (t ^ 2).  With that order, and rows that are
8 banks apart, neither kind of access to keys meets a bank twice.  Up to 4 tokens, keys and queries share one group:
even columns belong to keys, odd ones to queries, and the odd half of every operand is free for low parts.

A single token is passed by `kernels.gated_delta_sequential` instead, unless the config says otherwise; two may be.

PDL: everything is read and written after `griddepcontrol.wait`, because the state's last writer may be the upstream
kernel; dependents are released at once, and must wait likewise before they read.
"""

import functools
from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, math, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.ops._gated_delta.config import TILE, GatedDeltaRuleConfig, choose, shared_parts
from cute_ssm.ops.gated_delta_rule_mtp.sequential import GatedDeltaSequential
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec

PART = 8  # blocks of a state that are written at a time


class GatedDeltaRule(GatedDeltaSequential):
    """The kernel of a `GatedDeltaRuleSpec`; batch, tokens, heads, slots, strides and scale are dynamic."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig, arch: Arch):
        super().__init__(spec, config, arch)
        self.writes = spec.writes

    @staticmethod
    def default_config(spec: GatedDeltaRuleSpec, arch: Arch, units: int | None = None) -> GatedDeltaRuleConfig:
        """The config for `units` (request, value head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, tokens, heads, value_heads, slots = (cute.sym_int32() for _ in range(5))

        def indices(name, shape):
            return None if name is None else fake(convert.DTYPES[name], shape)

        keys, values = (batch, tokens, heads, spec.K), (batch, tokens, value_heads, spec.V)
        gates = (batch, tokens, value_heads)
        image = (value_heads, spec.V, spec.K)
        buffer = None
        if spec.write_buffer:
            buffer = fake(self.state_dtype, (cute.sym_int32(), cute.sym_int32(), *image), (1,), 4)
        return (
            *self.input_fakes(keys, values),
            fake(self.state_dtype, (slots, *image), (1,), 4),
            indices(spec.src_dtype, (batch,)),
            fake(Float32, (value_heads,)),
            fake(self.gate_dtype, gates),
            fake(self.dt_bias_dtype, (value_heads,)),
            fake(self.gate_dtype, gates),
            fake(self.output_dtype, values, (1,), 8 if spec.vector_output else 1),
            buffer,
            indices(spec.scatter_dtype, (batch, tokens)),
            indices(spec.dst_dtype, (batch,)),
            indices(spec.accepted_dtype, (batch,)),
            Float32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        state: cute.Tensor,
        initial_state_indices: cute.Tensor,
        A_log: cute.Tensor,
        a: cute.Tensor,
        dt_bias: cute.Tensor,
        b: cute.Tensor,
        output: cute.Tensor,
        buffer: Optional[cute.Tensor],
        ssm_state_indices: Optional[cute.Tensor],
        output_state_indices: Optional[cute.Tensor],
        accepted_steps: Optional[cute.Tensor],
        scale: Float32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.gated_delta_rule_mtp`."""
        batch, _, value_heads, _ = v.shape
        chunks = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        per_key = cute.FastDivmodDivisorV2(value_heads // q.shape[2])
        self.kernel(
            q, k, v, state, initial_state_indices, A_log, a, dt_bias, b, output, buffer, ssm_state_indices,
            output_state_indices, accepted_steps, scale, heads, per_key,
        ).launch(
            grid=[batch * value_heads * chunks, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,  # or ptxas may bound registers for the sake of more CTAs, and spill
            use_pdl=True,
            stream=stream,
        )  # fmt: skip
        if const_expr(not self.config.sequential):  # which uses none
            launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        state: cute.Tensor,
        src: cute.Tensor,
        A_log: cute.Tensor,
        a: cute.Tensor,
        dt_bias: cute.Tensor,
        b: cute.Tensor,
        out: cute.Tensor,
        buffer: Optional[cute.Tensor],
        scatter: Optional[cute.Tensor],
        dst: Optional[cute.Tensor],
        accepted: Optional[cute.Tensor],
        scale: Float32,
        heads: cute.FastDivmodDivisorV2,
        per_key: cute.FastDivmodDivisorV2,
    ):
        smem = SmemAllocator()
        parts = {} if self.config.sequential else shared_parts(self.spec, self.config.rows)
        shared = {name: smem.allocate(size, 128) for name, size in parts.items()}
        shared = {name: cute.recast_ptr(p, dtype=Float32) if name != "values" else p for name, p in shared.items()}
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        chunks = self.spec.V // self.config.rows
        unit = cute.arch.block_idx()[0]
        pair = unit // chunks
        first = (unit - pair * chunks) * self.config.rows
        i, h = divmod(pair, heads)
        slot = Int64(src[i])  # 64 bits: its product with the slot's stride passes 2^31 elements
        live = in_range(slot, state.shape[0])
        if const_expr(accepted is not None):
            live = live and in_range(Int64(accepted[i]), q.shape[1] + 1)
        if live:
            key_head, _ = divmod(h, per_key)
            tensors, targets = (q, k, v, state, A_log, a, dt_bias, b, out), (buffer, scatter, dst, accepted)
            if const_expr(self.config.sequential):
                self.walk(tensors, targets, scale, (i, h, key_head, first, slot))
            else:
                self.work(tensors, targets, shared, scale, (i, h, key_head, first, slot))
        elif const_expr(self.spec.zero_padding):
            self.clear_outputs(out, i, h, first, q.shape[1])

    @cute.jit
    def work(self, tensors, targets, shared, scale, place):
        """All rows of this CTA."""
        q, k, v, state, A_log, a, dt_bias, b, out = tensors
        i, h, key_head, first, slot = place
        tokens = q.shape[1]
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        mine = first + warp * (self.tiles * TILE)
        tile = self.load_tile(self.corner(state, (slot, h), mine, lane))
        keys, values = shared["keys"], shared["values"]
        count = self.chunk.tokens
        self.stage_keys(lambda t, c: memory.address(k, i, t, key_head, c), count, tokens, keys, thread)
        queries = keys + count * self.key_pitch
        self.stage_keys(lambda t, c: memory.address(q, i, t, key_head, c), count, tokens, queries, thread)
        self.stage_values(lambda t, c: memory.address(v, i, t, h, first + c), count, tokens, values, thread)
        if const_expr(self.writes):
            self.clear_row(keys + self.chunk.zeros, thread)
        cute.arch.sync_threads()
        if warp == 0:
            alpha, beta = self.gates(A_log, a, dt_bias, b, (i, h), tokens, lane)
            self.chunk.prepare(alpha, beta, scale, shared, lane)
        cute.arch.sync_threads()
        coefficients = self.chunk.load_coefficients(shared, lane)
        column = warp * (self.tiles * TILE)
        for m in cutlass.range_constexpr(self.tiles):
            row = mine + m * TILE
            ahead, load_ahead = None, None
            if const_expr(m + 1 < self.tiles):
                ahead = self.corner(state, (slot, h), row + TILE, lane)
                load_ahead = None if const_expr(self.writes) else functools.partial(self.load_block, ahead)
            products = self.chunk.products(tile, self.state_dtype, keys, lane)
            V = self.load_values(values, column + m * TILE, self.chunk, lane)
            U, O, following = self.chunk.solve(products, coefficients, V, lane, tile, load_ahead)
            self.emit(out, O, U, (i, h, row), values, column + m * TILE, tokens, lane)
            if const_expr(self.writes):
                self.write_states(state, targets, tile, U, shared, (i, h, slot), row, tokens, lane)
                if const_expr(ahead is not None):
                    following = self.load_tile(ahead)
            tile = following
        if const_expr(self.spec.vector_output):
            self.copy_outputs(out, (i, h, mine), values, column, tokens, lane)

    @cute.jit
    def gates(self, A_log, a, dt_bias, b, place, tokens, lane):
        """Decay and step of the lane's token."""
        i, h = place
        alpha, beta = Float32(1.0), Float32(0.0)
        if lane < tokens:
            x = memory.load_scalar(memory.address(a, i, lane, h), self.gate_dtype)
            beta = memory.load_scalar(memory.address(b, i, lane, h), self.gate_dtype)
            if const_expr(self.spec.gate_logits):
                x += memory.load_scalar(memory.address(dt_bias, h), self.dt_bias_dtype)
                alpha = math.gate_decay(memory.load_scalar(memory.address(A_log, h), Float32), x)
                beta = math.sigmoid(beta)
            else:
                alpha = math.exponential(x)
        return alpha, beta

    # ----------------------------------------------------------------------------------------------------------- states
    def write_states(self, state, targets, tile, U, shared, place, row, tokens, lane):
        """All states of this tile that the call asks for, a part of the columns at a time: registers are few."""
        for first in range(0, self.blocks, PART):
            blocks = range(first, min(first + PART, self.blocks))
            self.write_part(state, targets, (tile, U, shared, blocks), place, row, tokens, lane)

    @cute.jit
    def write_part(self, state, targets, sources, place, row, tokens, lane):
        """Some blocks of all states that the call asks for."""
        buffer, scatter, dst, accepted = targets
        i, h, slot = place
        if const_expr(buffer is not None):
            for t in cutlass.range(tokens, unroll=1):
                self.write_state(self.corner(buffer, (i, t, h), row, lane), sources, t, lane)
        if const_expr(scatter is not None):
            for t in cutlass.range(tokens, unroll=1):
                target = Int64(scatter[i, t])
                if in_range(target, state.shape[0]):
                    self.write_state(self.corner(state, (target, h), row, lane), sources, t, lane)
        if const_expr(self.spec.write_final):
            target = slot
            if const_expr(dst is not None):
                target = Int64(dst[i])
            count = tokens
            if const_expr(accepted is not None):
                count = Int32(accepted[i])
            if in_range(target, state.shape[0]):
                self.write_state(self.corner(state, (target, h), row, lane), sources, count - 1, lane)

    @cute.jit
    def write_state(self, corner, sources, t, lane):
        """Blocks of the tile of the state after token t, or of the tile itself if t is -1, to `corner`."""
        tile, U, shared, blocks = sources
        step = self.chunk.update_operands(U, shared, t, lane)
        for j in blocks:
            if const_expr(j % 4 == 0):  # or the compiler takes all keys out of the loop over tokens, into registers
                cute.arch.sync_warp()
            old = [convert.unpack(words, self.state_dtype) for words in tile[j]]
            self.store_block(corner, j, self.chunk.update(old, j, *step))

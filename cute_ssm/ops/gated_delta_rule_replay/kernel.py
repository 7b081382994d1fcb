"""`GatedDeltaRuleReplay`: new tokens of the gated delta rule, from a checkpoint and pending tokens.

Per (request, value head): a state S [V, K] of the pool, and rings with the keys, values, decays and steps of the tokens
that were accepted since S was stored.  The pending tokens are folded into S in registers, eight at a time
(`PendingTokens`); the result is stored if the request flushes; and then the new tokens are verified (`TokenChunk`).  So
outputs do not depend on whether their step flushes.

While pending tokens are folded, a tile is held in registers as float32.  The coefficients of all chunks are computed
before that: those of the new tokens by the first warp, those of pending ones by the others in turn.

PDL: everything is read and written after `griddepcontrol.wait`, because the upstream kernel may be the last writer of
the states; dependents are released at once, and must wait likewise before they read.
"""

import functools
from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Numeric, const_expr
from cutlass.cute.runtime import make_fake_stream

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, math, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import of_table
from cute_ssm.ops._gated_delta.arguments import ROWS
from cute_ssm.ops._gated_delta.chunk import TokenChunk
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose
from cute_ssm.ops._gated_delta.layout import PENDING_CHUNK, TILE, chunk_tokens
from cute_ssm.ops._gated_delta.outputs import OutputRows, clear_outputs
from cute_ssm.ops._gated_delta.pending import Pending, PendingTokens, Rings, chunk_count
from cute_ssm.ops._gated_delta.shared import SharedLayout, SharedMemory
from cute_ssm.ops._gated_delta.states import StateTiles, widened
from cute_ssm.ops._gated_delta.tokens import TokenRows, step_dtypes, step_layouts
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_replay.arguments import TABLE
from cute_ssm.ops.gated_delta_rule_replay.rings import RingWriter
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec


class Tensors(NamedTuple):
    """Arguments of `cute_ssm.gated_delta_rule_replay`."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    initial_state: cute.Tensor
    initial_state_indices: cute.Tensor
    k_cache: cute.Tensor
    v_cache: cute.Tensor
    g_cache: cute.Tensor
    beta_cache: cute.Tensor
    ring_start: cute.Tensor
    prev_num_accepted_tokens: cute.Tensor
    A_log: cute.Tensor
    a: cute.Tensor
    dt_bias: cute.Tensor
    b: cute.Tensor
    output: cute.Tensor

    @property
    def rings(self) -> Rings:
        """The history of all slots."""
        return Rings(self.k_cache, self.v_cache, self.g_cache, self.beta_cache)


class GatedDeltaRuleReplay:
    """The kernel of a `GatedDeltaRuleReplaySpec`; batch, tokens, window, heads, slots, strides, scale are dynamic."""

    def __init__(self, spec: GatedDeltaRuleReplaySpec, config: GatedDeltaRuleConfig, arch: Arch) -> None:
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.gate_dtype: type[Numeric] = convert.DTYPES[spec.gate_dtype]
        self.dt_bias_dtype: type[Numeric] = convert.DTYPES[spec.dt_bias_dtype]
        self.tiles_per_warp, self.threads = config.tiles(), WARP * config.warps
        input_dtype = convert.DTYPES[spec.input_dtype]
        self.layout = SharedLayout(spec.sizes, config.rows)
        self.chunk = TokenChunk(chunk_tokens(spec.tokens), spec.K, spec.l2norm)
        self.states = StateTiles(convert.DTYPES[spec.state_dtype], spec.K, spec.saturate)
        self.tokens = TokenRows(input_dtype, self.layout, self.threads, spec.input_bytes)
        self.pending = PendingTokens(input_dtype, spec.l2norm, self.layout, self.threads)
        self.writer = RingWriter(self.chunk.tokens, spec.K, config.rows, self.threads, spec.input_bytes)
        self.outputs = OutputRows(
            convert.DTYPES[spec.output_dtype], spec.vector_output, self.chunk, self.tokens, self.tiles_per_warp
        )

    @staticmethod
    def default_config(spec: GatedDeltaRuleReplaySpec, arch: Arch, units: Optional[int] = None) -> GatedDeltaRuleConfig:
        """Return the config for `units` (request, value head) pairs, by default for more than the GPU holds at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self) -> tuple[Any, ...]:
        """Return stand-ins for the arguments of `__call__`, with what is static and which sizes are equal."""
        spec = self.spec
        sizes = {"K": spec.K, "V": spec.V}
        return (
            *of_table(TABLE, step_dtypes(spec), sizes, {"rows": ROWS[False]}, step_layouts(spec)),
            Float32(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        initial_state: cute.Tensor,
        initial_state_indices: cute.Tensor,
        k_cache: cute.Tensor,
        v_cache: cute.Tensor,
        g_cache: cute.Tensor,
        beta_cache: cute.Tensor,
        ring_start: cute.Tensor,
        prev_num_accepted_tokens: cute.Tensor,
        A_log: cute.Tensor,
        a: cute.Tensor,
        dt_bias: cute.Tensor,
        b: cute.Tensor,
        output: cute.Tensor,
        scale: Float32,
        window: Int32,
        stream: Any,
    ) -> None:
        """Launch one CTA for each unit.  Shapes and types as in `cute_ssm.gated_delta_rule_replay`."""
        batch, value_heads = v.shape[0], v.shape[2]
        parts = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        group = cute.FastDivmodDivisorV2(value_heads // q.shape[2])
        tensors = Tensors(
            q, k, v, initial_state, initial_state_indices, k_cache, v_cache, g_cache, beta_cache, ring_start,
            prev_num_accepted_tokens, A_log, a, dt_bias, b, output,
        )  # fmt: skip
        self.kernel(tensors, scale, window, heads, group).launch(
            grid=[batch * value_heads * parts, 1, 1],
            block=[self.threads, 1, 1],
            # 0: ptxas bounds registers at 168.  If K or the threads are no power of two, that spills 8 or 16 bytes
            min_blocks_per_mp=int(any(n & (n - 1) for n in (self.spec.K, self.threads))),
            use_pdl=True,
            stream=stream,
        )
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        tensors: Tensors,
        scale: Float32,
        window: Int32,
        heads: cute.FastDivmodDivisorV2,
        group: cute.FastDivmodDivisorV2,
    ) -> None:
        """Process rows of one head.  `heads` divides by value_heads, `group` by value_heads / heads."""
        shared = self.layout.allocate()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        parts = self.spec.V // self.config.rows
        block = cute.arch.block_idx()[0]
        pair = block // parts
        first_row = (block - pair * parts) * self.config.rows
        i, h = divmod(pair, heads)
        slot = Int64(tensors.initial_state_indices[i])
        slots, length = tensors.initial_state.shape[0], tensors.k_cache.shape[2]
        start, count = Int32(0), Int32(-1)
        if in_range(slot, slots):
            start, count = tensors.ring_start[slot], tensors.prev_num_accepted_tokens[slot]
        if count >= 0 and count <= window and in_range(start, length):
            key_head, head_in_group = divmod(h, group)
            unit = Unit(i, h, key_head, head_in_group, first_row, slot)
            self.run(tensors, unit, Pending(start, count, length), shared, scale, window)
        elif const_expr(self.spec.zero_padding):
            dtype = convert.DTYPES[self.spec.output_dtype]
            count = tensors.q.shape[1]
            clear_outputs(tensors.output, dtype, i, h, first_row, self.config.rows, count, self.threads)

    @cute.jit
    def run(
        self, tensors: Tensors, unit: Unit, pending: Pending, shared: SharedMemory, scale: Float32, window: Int32
    ) -> None:
        """Process all rows of a unit."""
        state, coordinate = tensors.initial_state, (unit.slot, unit.head)
        count = tensors.q.shape[1]
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        first_row = unit.first_row + warp * (self.tiles_per_warp * TILE)
        tile = self.states.load(self.states.corner(state, coordinate, first_row, lane))
        new = self.layout.new_chunk(shared)
        used = chunk_count(pending.count) * PENDING_CHUNK
        self.pending.stage(tensors.rings, shared, unit, pending, used, thread)
        self.tokens.stage(tensors.q, tensors.k, tensors.v, unit, self.chunk, new, thread)
        self.writer.append(tensors.k, tensors.v, tensors.rings, unit, pending, count, thread)
        cute.arch.sync_threads()
        chunks = chunk_count(pending.count)
        self.prepare(tensors, unit, pending, shared, scale, warp, lane)
        cute.arch.sync_threads()
        flush = pending.count + count > window and pending.count > 0
        column = warp * (self.tiles_per_warp * TILE)
        for m in cutlass.range_constexpr(self.tiles_per_warp):
            row = first_row + m * TILE
            load_ahead = None
            if const_expr(m + 1 < self.tiles_per_warp):
                ahead = self.states.corner(state, coordinate, row + TILE, lane)
                load_ahead = functools.partial(self.states.load_block, ahead)
            loaded = tile
            tile = widened(loaded, self.states.dtype)
            for c in cutlass.range(chunks, unroll=1):
                tile = self.pending.fold(tile, shared, c, column + m * TILE, lane)
            if flush:
                self.states.store(self.states.corner(state, coordinate, row, lane), tile)
            products = self.chunk.products(tile, Float32, new.keys, lane)
            V = self.tokens.load_values(new.values, column + m * TILE, self.chunk, lane)
            pinned = lane
            if const_expr(self.spec.K == 256):  # otherwise addresses stay in registers through the loop, and some spill
                pinned = memory.pinned(Int32(lane))
            coefficients = self.chunk.load_coefficients(new.tables, pinned)
            solution = self.chunk.solve(products, coefficients, V, lane, loaded, load_ahead)
            self.outputs.store_tile(
                tensors.output, solution.outputs, solution.U, unit, row, new.values, column + m * TILE, count, lane
            )
            tile = solution.following
        if const_expr(self.spec.vector_output):
            self.outputs.copy(tensors.output, unit, first_row, new.values, column, count, lane)

    @cute.jit
    def prepare(
        self,
        tensors: Tensors,
        unit: Unit,
        pending: Pending,
        shared: SharedMemory,
        scale: Float32,
        warp: Int32,
        lane: Int32,
    ) -> None:
        """Fill the tables of all chunks, each by one warp."""
        if warp == 0:
            alpha, beta = self.new_gates(tensors, unit, pending, lane)
            self.chunk.prepare(alpha, beta, scale, self.layout.new_chunk(shared), lane)
        others = (warp + (self.config.warps - 1)) % self.config.warps
        for c in cutlass.range(others, chunk_count(pending.count), self.config.warps, unroll=1):
            self.pending.prepare(tensors.rings, shared, unit, pending, c, lane)

    @cute.jit
    def new_gates(self, tensors: Tensors, unit: Unit, pending: Pending, lane: Int32) -> tuple[Float32, Float32]:
        """Return decay and step of the lane's new token, 1 and 0 past the last token, and append them to the rings."""
        i, h = unit.request, unit.head
        alpha, beta = Float32(1.0), Float32(0.0)
        if lane < tensors.q.shape[1]:
            x = memory.load_scalar(memory.address(tensors.a, i, lane, h), self.gate_dtype)
            x += memory.load_scalar(memory.address(tensors.dt_bias, h), self.dt_bias_dtype)
            exponent, _ = math.gate_exponent(memory.load_scalar(memory.address(tensors.A_log, h), Float32), x)
            alpha = math.exponential(-exponent)
            beta = math.sigmoid(memory.load_scalar(memory.address(tensors.b, i, lane, h), self.gate_dtype))
            self.writer.append_gates(tensors.rings, unit, pending, lane, -exponent, beta)
        return alpha, beta

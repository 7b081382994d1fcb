"""`MaterializeGatedDelta`: the state that pending tokens of the gated delta rule lead to, from one slot into another.

Per (row of the batch, value head): the state S [V, K] of the slot that is read passes its first j pending tokens as in
`kernels.gated_delta_replay`, whose parts this kernel is composed of: the bits are those that a step which flushes
stores.  It is then rounded to nearest even.  With j = 0, if both pools have the same type, its bytes are copied.

A slot or cursor out of range, or j beyond the pending tokens, makes a row of the batch padding: nothing is written for
it.  Rows of the rings behind token j are not read.
"""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.ops._gated_delta.coefficients import BLOCK
from cute_ssm.ops._gated_delta.config import PENDING, TILE, GatedDeltaRuleConfig, choose_materialize, shared_parts
from cute_ssm.ops.gated_delta_rule_replay.kernel import GatedDeltaRuleReplay, Pending, Rings, Unit
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec


class Tile(NamedTuple):
    """Rows from `row` on of one head's state, in the slot that is read and in that which is written."""

    source: Int64
    target: Int64
    head: Int32
    row: Int32


class MaterializeGatedDelta:
    """The kernel of a `MaterializeGatedDeltaSpec`; batch, heads, slots, lengths of rings and strides are dynamic."""

    def __init__(self, spec: MaterializeGatedDeltaSpec, config: GatedDeltaRuleConfig, arch: Arch):
        self.spec, self.config = spec, config
        self.replay = GatedDeltaRuleReplay(spec.replay(), config, arch)
        self.state_dtype, self.out_dtype = convert.DTYPES[spec.state_dtype], convert.DTYPES[spec.out_dtype]
        self.copies = spec.state_dtype == spec.out_dtype

    @staticmethod
    def default_config(
        spec: MaterializeGatedDeltaSpec, arch: Arch, units: int | None = None
    ) -> GatedDeltaRuleConfig:  # fmt: skip
        """The config for `units` (row, value head) pairs, by default for more than the GPU can hold at once."""
        return choose_materialize(spec, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, heads, value_heads, slots, out_slots, length = (cute.sym_int32() for _ in range(6))
        dtype = convert.DTYPES[spec.input_dtype]
        return (
            fake(self.state_dtype, (slots, value_heads, spec.V, spec.K), (1,), 4),
            fake(dtype, (slots, heads, length, spec.K), (1,), 4),
            fake(dtype, (slots, value_heads, length, spec.V), (1,), 8),
            fake(Float32, (slots, value_heads, length)),
            fake(Float32, (slots, value_heads, length)),
            fake(Int32, (slots,)),
            fake(Int32, (slots,)),
            fake(self.out_dtype, (out_slots, value_heads, spec.V, spec.K), (1,), 4),
            fake(spec.src_dtype, (batch,)),
            fake(spec.dst_dtype, (batch,)),
            None if spec.count_dtype is None else fake(spec.count_dtype, (batch,)),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        state: cute.Tensor,
        k_cache: cute.Tensor,
        v_cache: cute.Tensor,
        g_cache: cute.Tensor,
        beta_cache: cute.Tensor,
        ring_start: cute.Tensor,
        prev_num_accepted_tokens: cute.Tensor,
        out: cute.Tensor,
        src: cute.Tensor,
        dst: cute.Tensor,
        counts: Optional[cute.Tensor],
        window: Int32,
        stream,
    ):
        """Shapes and types as in `cute_ssm.serving.materialize_gated_delta`."""
        value_heads = state.shape[1]
        parts = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        per_key = cute.FastDivmodDivisorV2(value_heads // k_cache.shape[1])
        self.kernel(
            state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens, out, src, dst, counts,
            window, heads, per_key,
        ).launch(
            grid=[src.shape[0] * value_heads * parts, 1, 1],
            block=[WARP * self.config.warps, 1, 1],
            stream=stream,
        )  # fmt: skip
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        state: cute.Tensor,
        k_cache: cute.Tensor,
        v_cache: cute.Tensor,
        g_cache: cute.Tensor,
        beta_cache: cute.Tensor,
        ring_start: cute.Tensor,
        pending_counts: cute.Tensor,
        out: cute.Tensor,
        src: cute.Tensor,
        dst: cute.Tensor,
        counts: Optional[cute.Tensor],
        window: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_key: cute.FastDivmodDivisorV2,
    ):
        smem = SmemAllocator()
        sizes = shared_parts(self.replay.spec, self.config.rows)
        shared = {name: smem.allocate(size, 128) for name, size in sizes.items()}
        shared = {name: cute.recast_ptr(p, dtype=Float32) if name != "values" else p for name, p in shared.items()}
        parts = self.spec.V // self.config.rows
        unit = cute.arch.block_idx()[0]
        pair = unit // parts
        first = (unit - pair * parts) * self.config.rows
        i, h = divmod(pair, heads)
        source, target = Int64(src[i]), Int64(dst[i])
        length = k_cache.shape[2]
        start, pending = Int32(0), Int32(-1)
        if in_range(source, state.shape[0]) and in_range(target, out.shape[0]):
            start, pending = ring_start[source], pending_counts[source]
        count = Int64(pending)
        if const_expr(counts is not None):
            count = Int64(counts[i])
        live = in_range(pending, window + 1) and in_range(start, length)
        if live and in_range(count, Int64(pending) + 1):
            key_head, _ = divmod(h, per_key)
            rings = Rings(k_cache, v_cache, g_cache, beta_cache)
            place = Unit(i, h, key_head, first, source, Int32(0))
            self.work(rings, state, out, shared, place, target, Pending(start, Int32(count), length))

    @cute.jit
    def work(self, rings, state, out, shared, place, target, ring):
        """All rows of this CTA."""
        h, first, source, count = place.head, place.first, place.slot, ring.tokens
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        column = warp * (self.replay.tiles * TILE)
        chunks = (count + (PENDING - 1)) // PENDING
        if count > 0:
            self.stage(rings, shared, place, ring, chunks, thread)
            cute.arch.sync_threads()
            for c in cutlass.range(warp, chunks, self.config.warps, unroll=1):
                alpha, beta = self.replay.pending_gates(rings, place, ring, c, lane)
                self.replay.pending.prepare(alpha, beta, Float32(1.0), self.replay.pending_places(shared, c), lane)
            cute.arch.sync_threads()
        for m in cutlass.range_constexpr(self.replay.tiles):
            places = Tile(source, target, h, first + column + m * TILE)
            if const_expr(self.copies):
                if count == 0:
                    self.copy_tile(state, out, places, lane)
                else:
                    self.fold_tile(state, out, places, shared, chunks, column + m * TILE, lane)
            else:
                self.fold_tile(state, out, places, shared, chunks, column + m * TILE, lane)

    @cute.jit
    def stage(self, rings, shared, place, ring, chunks, thread):
        """Keys and values of the pending tokens to shared memory, zeros behind them up to whole chunks."""
        h, key_head, first, source = place.head, place.key_head, place.first, place.slot
        start, count, length = ring
        most, used = self.spec.window, chunks * PENDING

        def at(row):
            return self.replay.ring_row(self.replay.ring_row(start + row, length), length)

        def key(t, c):
            return memory.address(rings.k, source, key_head, at(t), c)

        def value(t, c):
            return memory.address(rings.v, source, h, at(t), first + c)

        self.replay.stage_keys(key, most, count, shared["keys"], thread, used)
        self.replay.stage_values(value, most, count, shared["values"], thread, used)

    @cute.jit
    def fold_tile(self, state, out, places, shared, chunks, column, lane):
        """A tile after the pending tokens, rounded into memory."""
        source, target, h, row = places
        tile = self.replay.load_tile(self.replay.corner(state, (source, h), row, lane))
        tile = [[self.replay.widen(words) for words in pair] for pair in tile]
        for c in cutlass.range(chunks, unroll=1):
            tile = self.replay.advance(tile, shared, c, column, lane)
        # or the compiler computes the addresses early, and keeps them
        target, h, row, lane = (memory.pinned(value) for value in (target, Int32(h), Int32(row), Int32(lane)))
        corner = self.replay.corner(out, (target, h), row, lane)
        n_bytes = 4 * self.out_dtype.width // 8
        for j in cutlass.range_constexpr(self.replay.blocks):
            for half in cutlass.range_constexpr(2):
                values = convert.unpack(tile[j][half], Float32)
                memory.store(corner[half] + BLOCK * j, values, self.out_dtype, n_bytes, self.spec.saturate)

    @cute.jit
    def copy_tile(self, state, out, places, lane):
        """The bytes of a tile."""
        source, target, h, row = places
        corner = self.replay.corner(out, (target, h), row, lane)
        tile = self.replay.load_tile(self.replay.corner(state, (source, h), row, lane))
        for j in cutlass.range_constexpr(self.replay.blocks):
            for half in cutlass.range_constexpr(2):
                memory.store_words(corner[half] + BLOCK * j, tile[j][half])

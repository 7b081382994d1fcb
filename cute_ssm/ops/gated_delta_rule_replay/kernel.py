"""`GatedDeltaRuleReplay`: new tokens of the gated delta rule from a checkpoint and the pending tokens behind it.

Per (request, value head): a state S [V, K] of the pool, and a ring with the keys, values, decays and steps of the
tokens that were accepted since S was stored.  S passes the pending tokens in registers, eight at a time by
`TokenChunk`; is stored, if the request flushes; and then the new tokens are verified as by `kernels.gated_delta_rule`,
whose layouts are used throughout.  So outputs do not depend on whether their step flushes.

While a tile passes its chunks its registers hold float32.  The coefficients of all chunks are computed before that,
those of the new tokens by the first warp, those of pending ones by the others in turn.

New keys, values and gates go to the ring behind the pending tokens, to rows that no CTA of this launch reads: a ring
has room for the window and for them.  Values are appended by the CTA of their rows, gates by the first CTA of a value
head, keys by the first CTA of the first value head that uses them.

PDL: as in `kernels.gated_delta_rule`.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, launch, math, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.ops._gated_delta.coefficients import TokenChunk
from cute_ssm.ops._gated_delta.config import (
    PENDING,
    TILE,
    GatedDeltaRuleConfig,
    choose,
    shared_parts,
    table_parts,
)
from cute_ssm.ops._gated_delta.rows import KEY_BYTES, VALUE_BYTES, GatedDeltaRows
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec


class Rings(NamedTuple):
    """The history of all slots, by its tensors."""

    k: cute.Tensor
    v: cute.Tensor
    g: cute.Tensor
    beta: cute.Tensor


class Pending(NamedTuple):
    """Where a slot's pending tokens are in rings of `length` rows."""

    start: Int32
    tokens: Int32
    length: Int32


class Unit(NamedTuple):
    """Rows of one head's state from `first` on, of row `row` of the batch; `nth` of the value heads of its key head."""

    row: Int32
    head: Int32
    key_head: Int32
    first: Int32
    slot: Int64
    nth: Int32


class GatedDeltaRuleReplay(GatedDeltaRows):
    """The kernel of a `GatedDeltaRuleReplaySpec`; batch, tokens, window, heads, slots, strides, scale are dynamic."""

    def __init__(self, spec: GatedDeltaRuleReplaySpec, config: GatedDeltaRuleConfig, arch: Arch):
        super().__init__(spec, config, arch)
        self.pending = TokenChunk(PENDING, spec.K, spec.l2norm, queries=False)

    @staticmethod
    def default_config(spec: GatedDeltaRuleReplaySpec, arch: Arch, units: int | None = None) -> GatedDeltaRuleConfig:
        """The config for `units` (request, value head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, tokens, heads, value_heads, slots, length = (cute.sym_int32() for _ in range(6))
        keys, values = (batch, tokens, heads, spec.K), (batch, tokens, value_heads, spec.V)
        gates = (batch, tokens, value_heads)
        return (
            *self.input_fakes(keys, values),
            fake(self.state_dtype, (slots, value_heads, spec.V, spec.K), (1,), 4),
            fake(convert.DTYPES[spec.src_dtype], (batch,)),
            fake(self.input_dtype, (slots, heads, length, spec.K), (1,), 4),
            fake(self.input_dtype, (slots, value_heads, length, spec.V), (1,), 8),
            fake(Float32, (slots, value_heads, length)),
            fake(Float32, (slots, value_heads, length)),
            fake(Int32, (slots,)),
            fake(Int32, (slots,)),
            fake(Float32, (value_heads,)),
            fake(self.gate_dtype, gates),
            fake(self.dt_bias_dtype, (value_heads,)),
            fake(self.gate_dtype, gates),
            fake(self.output_dtype, values, (1,), 8 if spec.vector_output else 1),
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
        state: cute.Tensor,
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
        stream,
    ):
        """Shapes and types as in `cute_ssm.gated_delta_rule_replay`."""
        batch, _, value_heads, _ = v.shape
        chunks = self.spec.V // self.config.rows
        heads = cute.FastDivmodDivisorV2(value_heads)
        per_key = cute.FastDivmodDivisorV2(value_heads // q.shape[2])
        self.kernel(
            q, k, v, state, initial_state_indices, k_cache, v_cache, g_cache, beta_cache, ring_start,
            prev_num_accepted_tokens, A_log, a, dt_bias, b, output, scale, window, heads, per_key,
        ).launch(
            grid=[batch * value_heads * chunks, 1, 1],
            block=[self.threads, 1, 1],
            # ptxas bounds registers at 168, and spills 8 or 16 bytes, where K or the threads are no power of two
            min_blocks_per_mp=int(any(n & (n - 1) for n in (self.spec.K, self.threads))),
            use_pdl=True,
            stream=stream,
        )  # fmt: skip
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
        k_cache: cute.Tensor,
        v_cache: cute.Tensor,
        g_cache: cute.Tensor,
        beta_cache: cute.Tensor,
        ring_start: cute.Tensor,
        pending_counts: cute.Tensor,
        A_log: cute.Tensor,
        a: cute.Tensor,
        dt_bias: cute.Tensor,
        b: cute.Tensor,
        out: cute.Tensor,
        scale: Float32,
        window: Int32,
        heads: cute.FastDivmodDivisorV2,
        per_key: cute.FastDivmodDivisorV2,
    ):
        smem = SmemAllocator()
        shared = {name: smem.allocate(size, 128) for name, size in shared_parts(self.spec, self.config.rows).items()}
        shared = {name: cute.recast_ptr(p, dtype=Float32) if name != "values" else p for name, p in shared.items()}
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        parts = self.spec.V // self.config.rows
        unit = cute.arch.block_idx()[0]
        pair = unit // parts
        first = (unit - pair * parts) * self.config.rows
        i, h = divmod(pair, heads)
        slot = Int64(src[i])  # 64 bits: its product with the slot's stride passes 2^31 elements
        slots, length = state.shape[0], k_cache.shape[2]
        start, count = Int32(0), Int32(-1)
        if in_range(slot, slots):
            start, count = ring_start[slot], pending_counts[slot]
        if count >= 0 and count <= window and in_range(start, length):
            key_head, nth = divmod(h, per_key)
            new, rings = (q, k, v, A_log, a, dt_bias, b), Rings(k_cache, v_cache, g_cache, beta_cache)
            self.work(new, rings, (state, out), shared, (scale, window),
                      Unit(i, h, key_head, first, slot, nth), Pending(start, count, length))  # fmt: skip
        elif const_expr(self.spec.zero_padding):
            self.clear_outputs(out, i, h, first, q.shape[1])

    @cute.jit
    def work(self, new, rings, results, shared, scalars, place, ring):
        """All rows of this CTA."""
        state, out = results
        scale, window = scalars
        i, h, first, slot, count = place.row, place.head, place.first, place.slot, ring.tokens
        tokens = new[0].shape[1]
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        mine = first + warp * (self.tiles * TILE)
        tile = self.load_tile(self.corner(state, (slot, h), mine, lane))
        self.stage(new, rings, shared, place, ring, tokens, thread)
        cute.arch.sync_threads()
        chunks = (count + (PENDING - 1)) // PENDING
        self.prepare_chunks(new, rings, shared, scale, place, ring, (warp, chunks, tokens), lane)
        cute.arch.sync_threads()
        latest = self.new_places(shared)
        flush = count + tokens > window and count > 0
        column = warp * (self.tiles * TILE)
        for m in cutlass.range_constexpr(self.tiles):
            row = mine + m * TILE
            load_ahead = None
            if const_expr(m + 1 < self.tiles):
                load_ahead = functools.partial(self.load_block, self.corner(state, (slot, h), row + TILE, lane))
            loaded = tile
            tile = [[self.widen(words) for words in pair] for pair in loaded]
            for c in cutlass.range(chunks, unroll=1):
                tile = self.advance(tile, shared, c, column + m * TILE, lane)
            if flush:
                corner = self.corner(state, (slot, h), row, lane)
                for j in cutlass.range_constexpr(self.blocks):
                    self.store_block(corner, j, [convert.unpack(words, Float32) for words in tile[j]])
            products = self.chunk.products(tile, Float32, latest["keys"], lane)
            V = self.load_values(latest["values"], column + m * TILE, self.chunk, lane)
            here = lane
            if const_expr(self.spec.K == 256):  # or addresses are kept through the loop, and some of them spilled
                here = memory.pinned(Int32(lane))
            coefficients = self.chunk.load_coefficients(latest, here)
            U, O, following = self.chunk.solve(products, coefficients, V, lane, loaded, load_ahead)
            self.emit(out, O, U, (i, h, row), latest["values"], column + m * TILE, tokens, lane)
            tile = following
        if const_expr(self.spec.vector_output):
            self.copy_outputs(out, (i, h, mine), latest["values"], column, tokens, lane)

    # ------------------------------------------------------------------------------------------------------------ ring
    @cute.jit
    def ring_row(self, row, length):
        """The row of a ring that `row` rows behind its first one, less than twice its length, is."""
        return row - length if row >= length else row

    def stage(self, new, rings, shared, place, ring, tokens, thread):
        """Pending and new keys, queries and values to shared memory; new keys and values to the ring."""
        q, k, v = new[:3]
        k_cache, v_cache = rings.k, rings.v
        i, h, key_head, first, slot, nth = place
        start, count, length = ring
        latest = self.new_places(shared)
        most, fresh = self.spec.window, self.chunk.tokens

        def at(row):
            return self.ring_row(self.ring_row(start + row, length), length)

        used = (count + (PENDING - 1)) // PENDING * PENDING
        self.stage_keys(
            lambda t, c: memory.address(k_cache, slot, key_head, at(t), c), most, count, shared["keys"], thread,
            used, KEY_BYTES,
        )  # fmt: skip
        self.stage_values(
            lambda t, c: memory.address(v_cache, slot, h, at(t), first + c), most, count, shared["values"], thread,
            used, VALUE_BYTES,
        )  # fmt: skip
        queries = latest["keys"] + fresh * self.key_pitch
        self.stage_keys(lambda t, c: memory.address(k, i, t, key_head, c), fresh, tokens, latest["keys"], thread)
        self.stage_keys(lambda t, c: memory.address(q, i, t, key_head, c), fresh, tokens, queries, thread)
        self.stage_values(lambda t, c: memory.address(v, i, t, h, first + c), fresh, tokens, latest["values"], thread)
        self.append(
            lambda t, c: memory.address(v, i, t, h, first + c),
            lambda t, c: memory.address(v_cache, slot, h, at(count + t), first + c),
            (fresh, self.config.rows, 8), tokens, thread,
        )  # fmt: skip
        self.append(
            lambda t, c: memory.address(k, i, t, key_head, c),
            lambda t, c: memory.address(k_cache, slot, key_head, at(count + t), c),
            (fresh, self.spec.K, 4), self.if_first(tokens, nth, first), thread,
        )  # fmt: skip

    @cute.jit
    def if_first(self, count, nth, first):
        """`count` in the CTA with the first rows of the first value head of a key head, else 0."""
        return count if nth == 0 and first == 0 else Int32(0)

    def append(self, source, target, sizes, live, thread):
        """Copy the first `live` of (rows, columns), so many elements at a time, to the ring."""
        rows, columns, step = sizes
        per_row = columns // step
        for turn in range(-(-rows * per_row // self.threads)):
            piece = thread + turn * self.threads
            row, column = piece // per_row, piece % per_row * step
            self.append_piece(source(row, column), target(row, column), step, row < live)

    @cute.jit
    def append_piece(self, source, target, count, live):
        if live:
            memory.store_words(target, memory.load_packed(source, count // 2, self.value_bytes))

    # ---------------------------------------------------------------------------------------------------------- chunks
    def new_places(self, shared):
        """Where the chunk of new tokens has its keys, values and coefficients."""
        behind = self.spec.window
        return {
            **shared,
            "keys": shared["keys"] + behind * self.key_pitch,
            "values": shared["values"] + behind * self.value_pitch * 2,
        }

    def pending_places(self, shared, c):
        """The same of chunk c of the pending tokens."""
        parts = table_parts(PENDING, queries=False)
        places = {
            "keys": shared["keys"] + c * (PENDING * self.key_pitch),
            "values": shared["values"] + c * (PENDING * self.value_pitch * 2),
        }
        at = c * (sum(parts.values()) // 4)
        for name, size in parts.items():
            places[name] = shared["pending"] + at
            at += size // 4
        return places

    @cute.jit
    def prepare_chunks(self, new, rings, shared, scale, place, ring, work, lane):
        """The coefficients of all chunks, each by one warp."""
        warp, chunks, tokens = work
        if warp == 0:
            alpha, beta = self.new_gates(new, rings, place, ring, tokens, lane)
            self.chunk.prepare(alpha, beta, scale, self.new_places(shared), lane)
        others = (warp + (self.config.warps - 1)) % self.config.warps
        for c in cutlass.range(others, chunks, self.config.warps, unroll=1):
            alpha, beta = self.pending_gates(rings, place, ring, c, lane)
            self.pending.prepare(alpha, beta, Float32(1.0), self.pending_places(shared, c), lane)

    @cute.jit
    def new_gates(self, new, rings, place, ring, tokens, lane):
        """Decay and step of the lane's new token; its logarithm and step also to the ring."""
        _, _, _, A_log, a, dt_bias, b = new
        i, h, first, slot = place.row, place.head, place.first, place.slot
        start, count, length = ring
        alpha, beta = Float32(1.0), Float32(0.0)
        if lane < tokens:
            x = memory.load_scalar(memory.address(a, i, lane, h), self.gate_dtype)
            x += memory.load_scalar(memory.address(dt_bias, h), self.dt_bias_dtype)
            exponent, _ = math.gate_exponent(memory.load_scalar(memory.address(A_log, h), Float32), x)
            alpha = math.exponential(-exponent)
            beta = math.sigmoid(memory.load_scalar(memory.address(b, i, lane, h), self.gate_dtype))
            if first == 0:
                row = self.ring_row(self.ring_row(start + count, length) + lane, length)
                memory.store_scalar(memory.address(rings.g, slot, h, row), -exponent, Float32)
                memory.store_scalar(memory.address(rings.beta, slot, h, row), beta, Float32)
        return alpha, beta

    @cute.jit
    def pending_gates(self, rings, place, ring, c, lane):
        """Decay and step of the lane's token of chunk c, from the ring."""
        h, slot = place.head, place.slot
        start, count, length = ring
        alpha, beta = Float32(1.0), Float32(0.0)
        token = c * PENDING + lane
        if lane < PENDING and token < count:
            row = self.ring_row(start + token, length)
            alpha = math.exponential(memory.load_scalar(memory.address(rings.g, slot, h, row), Float32))
            beta = memory.load_scalar(memory.address(rings.beta, slot, h, row), Float32)
        return alpha, beta

    def advance(self, tile, shared, c, column, lane):
        """The tile after the pending tokens of chunk c; those past the last one change nothing, by a step of 0."""
        places = self.pending_places(shared, c)
        products = self.pending.products(tile, Float32, places["keys"], lane)
        V = self.load_values(places["values"], column, self.pending, lane)
        U, _, _ = self.pending.solve(products, self.pending.load_coefficients(places, lane), V, lane)
        step = self.pending.update_operands(U, places, PENDING - 1, lane)
        after = []
        for j in range(self.blocks):
            old = [convert.unpack(words, Float32) for words in tile[j]]
            after.append([convert.pack(row, Float32) for row in self.pending.update(old, j, *step)])
        return after

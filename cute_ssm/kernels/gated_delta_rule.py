"""`GatedDeltaRule`: up to 16 tokens of the gated delta rule per request, by products on tensor cores.

Per (request, value head), with the state S [V, K] and the equations of `reference.gated_delta_rule_products`:

    P = S K^T, R = S Q^T (raw keys and queries);   X = V - gamma kappa P;   U = X M^T with M = (1 + L)^-1 diag(beta)
    out = gamma rho R + U A^T;                      S_n = gamma_n S + (D_n kappa U) K

A CTA owns `rows` rows of one head, its warps 16 of them at a time.  A warp asks for its first tile of the state before
anything else, straight into registers; then all warps bring keys, queries and values to shared memory, the first one
computes the coefficients, which depend on no row, and every warp goes its own way: while a tile is multiplied, the
next one takes its registers, if nothing is to be written.

A *block* is 16 columns of a tile; lane ``4 g + t`` holds columns 4 t .. 4 t + 3 of rows g and g + 8 of it.  Products
sum over columns, so any order of them will do: elements (2 s, 2 s + 1) are the operand of step s of S K^T, and elements
(s, 2 + s) belong to the result of step s of U K.  So the state never moves between lanes.  A float32 state, and X, U
and the coefficients, are multiplied as two parts each; keys and queries are exact.

In shared memory, row r of keys and queries is token r; queries follow keys.  Column n of a product belongs to row
``row_of(n)`` of a group of 8 rows: lane t's two columns to rows t and 4 + (t ^ 2).  With that order, and rows that are
8 banks apart, neither kind of access to keys meets a bank twice.  Up to 4 tokens, keys and queries share one group:
even columns belong to keys, odd ones to queries, and the odd half of every operand is free for low parts.

PDL: everything is read and written after `griddepcontrol.wait`, because the state's last writer may be the upstream
kernel; dependents are released at once, and must wait likewise before they read.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from cute_ssm.arch import Arch
from cute_ssm.device import convert, memory, mma
from cute_ssm.kernels.gated_delta_coefficients import BLOCK, TokenCoefficients, row_of
from cute_ssm.spec import GatedDeltaRuleSpec
from cute_ssm.tuning.gated_delta_rule import (
    KEY_PAD,
    TILE,
    VALUE_PAD,
    WARP,
    GatedDeltaRuleConfig,
    choose,
    shared_parts,
)

PART = 8  # blocks of a state that are written at a time


class GatedDeltaRule(TokenCoefficients):
    """The kernel of a `GatedDeltaRuleSpec`; batch, tokens, heads, slots, strides and scale are dynamic."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.state_dtype = convert.DTYPES[spec.state_dtype]
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.output_dtype = convert.DTYPES[spec.output_dtype]
        self.gate_dtype = convert.DTYPES[spec.gate_dtype]
        self.dt_bias_dtype = convert.DTYPES[spec.dt_bias_dtype]
        self.tokens = spec.tokens
        self.shared_group = spec.tokens == 4  # keys and queries are rows of one group
        self.key_groups = max(1, spec.tokens // 8)
        self.groups = 2 * spec.tokens // 8
        self.blocks = spec.K // BLOCK
        self.key_pitch = spec.K + KEY_PAD
        self.value_pitch = config.rows + VALUE_PAD
        self.pitch = spec.tokens + 4  # of tables of coefficients; column `tokens` of the decays is that of the state
        self.tiles = config.tiles()
        self.threads = WARP * config.warps
        self.exact_state = spec.state_dtype != "float32"
        self.writes = spec.write_final or spec.write_buffer or spec.scatter_dtype is not None

    @staticmethod
    def default_config(spec: GatedDeltaRuleSpec, arch: Arch, units: int | None = None) -> GatedDeltaRuleConfig:
        """The config for `units` (request, value head) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        batch, tokens, heads, value_heads, slots = (cute.sym_int32() for _ in range(5))

        def tensor(dtype, shape, inner=(), align=1):
            """Free strides but for the innermost ones given; accesses of `align` elements."""
            outer = tuple(cute.sym_int64(divisibility=align) for _ in shape[len(inner) :])
            return make_fake_tensor(dtype, shape, outer + inner, assumed_align=align * dtype.width // 8)

        def indices(name, shape):
            return None if name is None else tensor(convert.DTYPES[name], shape)

        keys, values = (batch, tokens, heads, spec.K), (batch, tokens, value_heads, spec.V)
        gates = (batch, tokens, value_heads)
        image = (value_heads, spec.V, spec.K)
        buffer = None
        if spec.write_buffer:
            buffer = tensor(self.state_dtype, (cute.sym_int32(), cute.sym_int32(), *image), (1,), 4)
        return (
            tensor(self.input_dtype, keys, (1,), 4),
            tensor(self.input_dtype, keys, (1,), 4),
            tensor(self.input_dtype, values, (1,), 8),
            tensor(self.state_dtype, (slots, *image), (1,), 4),
            indices(spec.src_dtype, (batch,)),
            tensor(Float32, (value_heads,)),
            tensor(self.gate_dtype, gates),
            tensor(self.dt_bias_dtype, (value_heads,)),
            tensor(self.gate_dtype, gates),
            tensor(self.output_dtype, values, (1,), 8 if spec.vector_output else 1),
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
            use_pdl=True,
            stream=stream,
        )  # fmt: skip

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
        shared = {name: smem.allocate(size, 128) for name, size in shared_parts(self.spec, self.config.rows).items()}
        shared = {name: cute.recast_ptr(p, dtype=Float32) if name != "values" else p for name, p in shared.items()}
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        chunks = self.spec.V // self.config.rows
        unit = cute.arch.block_idx()[0]
        pair = unit // chunks
        first = (unit - pair * chunks) * self.config.rows
        i, h = divmod(pair, heads)
        slot = Int64(src[i])  # 64 bits: its product with the slot's stride passes 2^31 elements
        if slot >= 0:
            key_head, _ = divmod(h, per_key)
            self.work((q, k, v, state, A_log, a, dt_bias, b, out), (buffer, scatter, dst, accepted), shared, scale,
                      (i, h, key_head, first, slot))  # fmt: skip
        elif const_expr(self.spec.zero_padding):
            thread = cute.arch.thread_idx()[0]
            for token in cutlass.range(q.shape[1], unroll=1):
                for r in cutlass.range(first + thread, first + self.config.rows, self.threads, unroll=1):
                    memory.store_scalar(memory.address(out, i, token, h, r), Float32(0.0), self.output_dtype)

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
        self.stage_keys(k, (i, key_head), tokens, keys, thread)
        self.stage_keys(q, (i, key_head), tokens, keys + self.tokens * self.key_pitch, thread)
        self.stage_values(v, (i, h, first), tokens, values, thread)
        cute.arch.sync_threads()
        if warp == 0:
            self.prepare(A_log, a, dt_bias, b, scale, shared, (i, h), tokens, lane)
        cute.arch.sync_threads()
        coefficients = self.load_coefficients(shared, lane)
        column = warp * (self.tiles * TILE)
        for m in cutlass.range_constexpr(self.tiles):
            row = mine + m * TILE
            ahead = None
            if const_expr(m + 1 < self.tiles):
                ahead = self.corner(state, (slot, h), row + TILE, lane)
            products, following = self.products(tile, keys, lane, None if const_expr(self.writes) else ahead)
            U, O = self.solve(products, coefficients, self.load_values(values, column + m * TILE, lane))
            self.emit(out, O, U, (i, h, row), values, column + m * TILE, tokens, lane)
            if const_expr(self.writes):
                self.write_states(state, targets, tile, U, shared, (i, h, slot), row, tokens, lane)
                if const_expr(ahead is not None):
                    following = self.load_tile(ahead)
            tile = following
        if const_expr(self.spec.vector_output):
            self.copy_outputs(out, (i, h, mine), values, column, tokens, lane)

    # ------------------------------------------------------------------------------------------------------------ tiles
    def corner(self, tensor, place, row, lane):
        """Pointers to this lane's columns of the first block, in its two rows of a tile."""
        r, c = row + lane // 4, lane % 4 * 4
        return [memory.address(tensor, *place, r + half, c) for half in (0, 8)]

    def load_block(self, corner, j):
        """Words of both rows of block j."""
        n_bytes = 4 * self.state_dtype.width // 8
        bits = convert.word_bits(self.state_dtype, n_bytes)
        return [memory.load_words(p + BLOCK * j, n_bytes * 8 // bits, bits) for p in corner]

    def load_tile(self, corner):
        return [self.load_block(corner, j) for j in range(self.blocks)]

    def stage_keys(self, tensor, place, tokens, target, thread):
        """Rows of keys or queries as float32; zeros past the last token."""
        i, head = place
        per_row = self.spec.K // 4
        count = self.tokens * per_row
        for step in range(-(-count // self.threads)):
            piece = thread + step * self.threads
            row, column = piece // per_row, piece % per_row * 4
            self.stage_piece(
                tensor, (i, row, head, column), tokens, target + (row * self.key_pitch + column), piece, count
            )

    @cute.jit
    def stage_piece(self, tensor, place, tokens, target, piece, count):
        if piece < count:
            values = [Float32(0.0)] * 4
            if place[1] < tokens:
                n_bytes = 4 * self.input_dtype.width // 8
                values = memory.load(memory.address(tensor, *place), self.input_dtype, 4, n_bytes)
            memory.store(target, values, Float32, 16)

    @cute.jit
    def stage_values(self, v, place, tokens, target, thread):
        """This CTA's columns of v as they are; zeros past the last token."""
        i, h, first = place
        per_row = self.config.rows // 8
        count = self.tokens * per_row
        for step in cutlass.range_constexpr(-(-count // self.threads)):
            piece = thread + step * self.threads
            if piece < count:
                row, column = piece // per_row, piece % per_row * 8
                words = [Int32(0)] * 4
                if row < tokens:
                    words = memory.load_words(memory.address(v, i, row, h, first + column), 4)
                memory.store_words(target + (row * self.value_pitch + column) * 2, words)

    def value_rows(self, values, column, lane, group, available):
        """Where this lane's row of the transposed matrices lies: 8 tokens by 16 columns of values."""
        row = row_of(lane & 7) & (available - 1)
        return values + ((8 * group + row) * self.value_pitch + column + (lane >> 3 & 1) * 8) * 2

    def load_values(self, values, column, lane):
        """v of this lane's rows and tokens, in the order of products; one list of 4 per group."""
        result = []
        for group in range(self.key_groups):
            words = mma.load_matrices(self.value_rows(values, column, lane, group, min(self.tokens, 8)), 2)
            result.append(convert.unpack(words, self.input_dtype))
        return result

    # ------------------------------------------------------------------------------------------------------- arithmetic
    def products(self, tile, keys, lane, ahead):
        """Products of a tile with all keys and queries, a list of 4 per group; and the tile at `ahead`, if any."""
        high = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        low = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        following = []
        for j in range(self.blocks):
            rows = [self.fragment(keys, lane, group, j) for group in range(self.groups)]
            x, y = (convert.unpack(words, self.state_dtype) for words in tile[j])
            if ahead is not None:
                following.append(self.load_block(ahead, j))
            for s in (0, 2):
                operand = [x[s], y[s], x[s + 1], y[s + 1]]
                rest = None
                if not self.exact_state:
                    operand, rest = mma.split(operand)
                for group in range(self.groups):
                    high[group] = mma.mma_tf32(operand, rows[group][s : s + 2], high[group])
                    if rest is not None:
                        low[group] = mma.mma_tf32(rest, rows[group][s : s + 2], low[group])
        if not self.exact_state:
            high = [[x + y for x, y in zip(*pair)] for pair in zip(high, low)]
        return high, following

    def multiply(self, parts, operand, total):
        """total + (high + low) (high + low)^T, small products first; in the order of products."""
        (high, low), (right, right_low) = parts, operand
        for left, other in ((low, right_low), (low, right), (high, right_low), (high, right)):
            total = mma.mma_tf32([left[0], left[2], left[1], left[3]], other, total)
        return total

    def solve(self, products, coefficients, v):
        """(U, outputs) of a tile: lists of 4 per group; up to 4 tokens, of 2: rows g and g + 8 of the lane's token."""
        zero = [Float32(0.0)] * 4
        if self.shared_group:
            key_scale, query_scale, (high, low) = coefficients
            (c,) = products
            x = [cute.math.fma(-key_scale, c[2 * n], v[0][2 * n]) for n in range(2)]
            top, rest = mma.split_fully(x)
            total = zero
            for part in (low, high):
                total = mma.mma_tf32([*top, *rest], [part[0], part[0]], total)
            return [[total[0], total[2]]], [[cute.math.fma(query_scale, c[n], total[n]) for n in (1, 3)]]
        key_scales, query_scales, operands = coefficients
        groups = range(self.key_groups)
        X, U, O = [], [], []
        for n in groups:
            X.append(mma.split_fully([cute.math.fma(-key_scales[n][e & 1], products[n][e], v[n][e]) for e in range(4)]))
        for n in groups:
            total = zero
            for inner in range(n + 1):
                total = self.multiply(X[inner], operands["solution", n, inner], total)
            U.append(total)
        parts = [mma.split_fully(u) for u in U]
        for n in groups:
            total = zero
            for inner in range(n + 1):
                total = self.multiply(parts[inner], operands["mix", n, inner], total)
            R = products[self.key_groups + n]
            O.append([cute.math.fma(query_scales[n][e & 1], R[e], total[e]) for e in range(4)])
        return U, O

    # ---------------------------------------------------------------------------------------------------------- outputs
    @cute.jit
    def emit(self, out, O, U, place, values, column, tokens, lane):
        """Outputs of a tile: to shared memory in place of values, or straight to their place."""
        i, h, row = place
        if const_expr(self.spec.vector_output):
            cute.arch.sync_warp()
            for n in cutlass.range_constexpr(self.key_groups):
                pairs = O[n]
                if const_expr(self.shared_group):  # rows 0 to 3 of the group take what no one reads
                    pairs = [U[0][0], O[0][0], U[0][1], O[0][1]]
                words = convert.pack(pairs, self.output_dtype)
                mma.store_matrices(self.value_rows(values, column, lane, n, 8), words)
        else:
            t, r = lane & 3, row + (lane >> 2)
            for n in cutlass.range_constexpr(self.key_groups):
                for e in cutlass.range_constexpr(len(O[n])):
                    token, half = t ^ 2, e
                    if const_expr(not self.shared_group):
                        token, half = 8 * n + (t if const_expr(e % 2 == 0) else 4 + (t ^ 2)), e // 2
                    if token < tokens:
                        memory.store_scalar(memory.address(out, i, token, h, r + 8 * half), O[n][e], self.output_dtype)

    @cute.jit
    def copy_outputs(self, out, place, values, column, tokens, lane):
        """This warp's columns of all tokens' outputs, from shared memory."""
        i, h, row = place
        cute.arch.sync_warp()
        per_token = 2 * self.tiles
        first = 4 if const_expr(self.shared_group) else 0
        for step in cutlass.range_constexpr(-(-self.tokens * per_token // WARP)):
            piece = lane + step * WARP
            token, at = piece // per_token, piece % per_token * 8
            if token < tokens:
                words = memory.load_words(values + ((first + token) * self.value_pitch + column + at) * 2, 4)
                memory.store_words(memory.address(out, i, token, h, row + at), words)

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
                self.write_state(self.corner(buffer, (i, t, h), row, lane), sources, t, Boolean(True), lane)
        if const_expr(scatter is not None):
            for t in cutlass.range(tokens, unroll=1):
                target = Int64(scatter[i, t])
                if target >= 0:
                    self.write_state(self.corner(state, (target, h), row, lane), sources, t, Boolean(True), lane)
        if const_expr(self.spec.write_final):
            target = slot
            if const_expr(dst is not None):
                target = Int64(dst[i])
            last, some = tokens - 1, Boolean(True)
            if const_expr(accepted is not None):
                count = cutlass.min(Int32(accepted[i]), tokens)
                last, some = cutlass.max(count, 1) - 1, count > 0
            if target >= 0:
                self.write_state(self.corner(state, (target, h), row, lane), sources, last, some, lane)

    @cute.jit
    def write_state(self, corner, sources, t, some, lane):
        """Blocks of the tile of the state after token t, or of the tile itself if not `some`, to `corner`."""
        tile, U, shared, blocks = sources
        g, lane_t = lane >> 2, lane & 3
        decays = shared["decays"] + t * self.pitch
        kappas = shared["vectors"] + 2 * self.tokens
        gamma = self.read(decays + self.tokens)
        nothing = Float32(0.0)
        if const_expr(self.spec.accepted_dtype is not None):
            gamma = gamma if some else Float32(1.0)
        columns = [lane_t] if const_expr(self.shared_group) else [lane_t, 4 + (lane_t ^ 2)]
        operands, rows = [], []
        for n in cutlass.range_constexpr(self.key_groups):
            weights = [self.read(decays + (8 * n + c)) * self.read(kappas + (8 * n + c)) for c in columns]
            if const_expr(self.spec.accepted_dtype is not None):
                weights = [w if some else nothing for w in weights]
            high, low = mma.split_fully([U[n][e] * weights[e % len(columns)] for e in range(len(U[n]))])
            if const_expr(self.shared_group):  # the second half of the operand is free for the low part
                operands.append([[*high, *low]])
                columns = columns * 2
            else:
                operands.append([[part[0], part[2], part[1], part[3]] for part in (low, high)])
            rows.append([shared["keys"] + ((8 * n + c) * self.key_pitch + 2 * g) for c in columns])
        for j in blocks:
            if const_expr(j % 4 == 0):  # or the compiler takes all keys out of the loop over tokens, into registers
                cute.arch.sync_warp()
            old = [convert.unpack(words, self.state_dtype) for words in tile[j]]
            new = [[None] * 4, [None] * 4]
            right = [[memory.load(p + BLOCK * j, Float32, 2, 8) for p in pointers] for pointers in rows]
            for s in cutlass.range_constexpr(2):
                total = [Float32(0.0)] * 4
                for n in cutlass.range_constexpr(self.key_groups):
                    for operand in operands[n]:
                        total = mma.mma_tf32(operand, [pair[s] for pair in right[n]], total)
                for half in cutlass.range_constexpr(2):
                    for e in cutlass.range_constexpr(2):
                        at = s + 2 * e
                        new[half][at] = cute.math.fma(gamma, old[half][at], total[2 * half + e])
            for half in cutlass.range_constexpr(2):
                n_bytes = 4 * self.state_dtype.width // 8
                memory.store(corner[half] + BLOCK * j, new[half], self.state_dtype, n_bytes)

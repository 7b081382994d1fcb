"""`GatedDeltaSequential`: one or two tokens of the gated delta rule, one after the other, without shared memory.

A warp passes its tiles, in the layout of `kernels.gated_delta_rule`, by itself:

    P = S k, R = S q (raw keys and queries);   u = beta (v - alpha kappa P);   out = alpha rho R + rho kappa (k q) u
    S <- alpha S + kappa u k^T

Both products are taken of the state before the token, in one sweep over it; only the four lanes of a row have to add
up.  All that a warp reads is asked for at once, and no warp waits for another: where there are few requests, that is
what counts.  Where there are many the memory is busy anyway.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.ops._gated_delta.coefficients import BLOCK, EPSILON
from cute_ssm.ops._gated_delta.config import TILE
from cute_ssm.ops._gated_delta.rows import GatedDeltaRows

LANES = 4  # that share a row
MOST_KEPT = 256  # elements of keys that are kept in registers, as they are: pinned, or they would be kept as float32


class GatedDeltaSequential(GatedDeltaRows):
    """The form of `GatedDeltaRule` with ``config.sequential``: the number of tokens is that of the spec."""

    @cute.jit
    def walk(self, tensors, targets, scale, place):
        """All rows of this CTA."""
        q, k, v, state, A_log, a, dt_bias, b, out = tensors
        i, h, key_head, first, slot = place
        tokens = range(self.spec.tokens)
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        rows = [first + (warp * self.tiles + m) * TILE for m in range(self.tiles)]
        tile = self.load_tile(self.corner(state, (slot, h), rows[0], lane))
        places = [(i, t, key_head) for t in tokens]
        words = [[self.load_row(x, place, lane) for x in (k, q)] for place in places]
        values = [[self.load_column(v, (i, t, h), row, lane) for t in tokens] for row in rows]
        gates = self.gates(A_log, a, dt_bias, b, (i, h), self.spec.tokens, lane)
        scalars = [self.scalars(words[t], gates, scale, t) for t in tokens]
        for m in cutlass.range_constexpr(self.tiles):
            tile = [[self.widen(pair) for pair in block] for block in tile]
            self.write(tile, targets, state, (i, h, slot), rows[m], -1, lane)
            for t in cutlass.range_constexpr(self.spec.tokens):
                row = [[[memory.pinned(w) for w in pair] for pair in part] for part in words[t]]
                if const_expr(self.spec.K * self.spec.tokens > MOST_KEPT):
                    here = memory.pinned(Int32(lane))
                    row = [self.load_row(x, places[t], here) for x in (k, q)]
                tile, o = self.step(tile, row, scalars[t], values[m][t], t)
                self.store_output(memory.address(out, i, t, h, rows[m] + lane // LANES), o, lane)
                self.write(tile, targets, state, (i, h, slot), rows[m], t, lane)
            if const_expr(m + 1 < self.tiles):
                tile = self.load_tile(self.corner(state, (slot, h), rows[m + 1], lane))

    def load_row(self, tensor, place, lane):
        """Words of this lane's columns of a key or query, a list per block."""
        row = memory.address(tensor, *place, lane % LANES * 4)
        return [memory.load_packed(row + BLOCK * j, 2, self.key_bytes) for j in range(self.blocks)]

    def load_column(self, v, place, row, lane):
        """Values of this lane's two rows of a tile."""
        return [
            memory.load_scalar(memory.address(v, *place, row + lane // LANES + 8 * half), self.input_dtype)
            for half in range(2)
        ]

    def scalars(self, words, gates, scale, t):
        """What a token multiplies by: decay, step, decayed norm of the key, norm of the key, and two for outputs."""
        alpha, beta = (cute.arch.shuffle_sync(gate, t) for gate in gates)
        squares = [Float32(0.0)] * 3  # of keys and of queries, and their products
        for j in range(self.blocks):
            x, y = (convert.unpack(row[j], self.input_dtype) for row in words)
            for e in range(4):
                for n, (left, right) in enumerate(((x, x), (y, y), (y, x))):
                    squares[n] = cute.math.fma(left[e], right[e], squares[n])
        kk, qq, kq = (self.of_row(value) for value in squares)
        kappa, rho = Float32(1.0), Float32(scale)
        if self.spec.l2norm:
            kappa, rho = math.rsqrt(kk + EPSILON), rho * math.rsqrt(qq + EPSILON)
        return alpha, beta, alpha * kappa, kappa, alpha * rho, rho * kappa * kq

    def step(self, tile, words, scalars, values, t):
        """(tile after a token, outputs of its two rows)."""
        alpha, beta, decayed, kappa, direct, mixed = scalars
        sums = [Float32(0.0)] * 4  # P of both rows, R of both rows
        for j in range(self.blocks):
            x, y = (convert.unpack(row[j], self.input_dtype) for row in words)
            for half in range(2):
                old = convert.unpack(tile[j][half], Float32)
                for e in range(4):
                    sums[half] = cute.math.fma(old[e], x[e], sums[half])
                    sums[2 + half] = cute.math.fma(old[e], y[e], sums[2 + half])
        sums = [self.of_row(value) for value in sums]
        u = [beta * cute.math.fma(-decayed, sums[n], values[n]) for n in range(2)]
        o = [cute.math.fma(direct, sums[2 + n], mixed * u[n]) for n in range(2)]
        if t + 1 == self.spec.tokens and not self.writes:
            return tile, o
        weights = [kappa * x for x in u]
        after = []
        for j in range(self.blocks):
            key = convert.unpack(words[0][j], self.input_dtype)
            after.append([self.passed(tile[j][half], key, alpha, weights[half]) for half in range(2)])
        return after, o

    def passed(self, words, key, alpha, weight):
        """Four elements of the state after a token."""
        old = convert.unpack(words, Float32)
        return convert.pack([cute.math.fma(weight, x, alpha * s) for x, s in zip(key, old)], Float32)

    def of_row(self, value):
        """The sum over the lanes of a row, the same bits in all of them."""
        for distance in (1, 2):
            value = value + math.exchanged(value, distance)
        return value

    @cute.jit
    def store_output(self, pointer, o, lane):
        """Outputs of rows g and g + 8, by the first two lanes of a row."""
        value = o[1] if lane & 1 == 1 else o[0]
        if lane & 2 == 0:
            memory.store_scalar(pointer + (lane & 1) * 8, value, self.output_dtype)

    @cute.jit
    def write(self, tile, targets, state, place, row, t, lane):
        """The tile after token t, or before the first one if t is -1, to all places that the call asks for."""
        buffer, scatter, dst, accepted = targets
        i, h, slot = place
        lane = memory.pinned(Int32(lane))  # or addresses of all stores are computed early, and kept
        if const_expr(buffer is not None and t >= 0):
            self.store_tile(tile, self.corner(buffer, (i, t, h), row, lane))
        if const_expr(scatter is not None and t >= 0):
            target = Int64(scatter[i, t])
            if in_range(target, state.shape[0]):
                self.store_tile(tile, self.corner(state, (target, h), row, lane))
        if const_expr(self.spec.write_final):
            target, last = slot, Boolean(t + 1 == self.spec.tokens)
            if const_expr(dst is not None):
                target = Int64(dst[i])
            if const_expr(accepted is not None):
                last = Int32(accepted[i]) == t + 1
            if const_expr(accepted is not None or t + 1 == self.spec.tokens):
                if last and in_range(target, state.shape[0]):
                    self.store_tile(tile, self.corner(state, (target, h), row, lane))

    def store_tile(self, tile, corner):
        """A tile, rounded to nearest even."""
        for j in range(self.blocks):
            self.store_block(corner, j, [convert.unpack(words, Float32) for words in tile[j]])

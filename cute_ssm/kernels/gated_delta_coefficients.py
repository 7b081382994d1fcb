"""`TokenCoefficients`: what `kernels.gated_delta_rule` knows of tokens before it looks at a row of the state.

Products of keys and queries by tensor core, decays, the triangular solve, and all of it as the operands of a lane.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from cute_ssm.device import convert, math, memory, mma

BLOCK = 16  # columns of a tile that a warp holds four a lane and row
EPSILON = 1e-6


def row_of(n):
    """Row, of a group of 8, that column n of a product belongs to."""
    half = n >> 1
    return half if isinstance(n, int) and n % 2 == 0 else ((n & 1) * 4) + (half ^ ((n & 1) * 2))


class TokenCoefficients:
    """The part of `GatedDeltaRule` that one warp of a CTA runs for all, and how lanes read its results."""

    @cute.jit
    def prepare(self, A_log, a, dt_bias, b, scale, shared, place, tokens, lane):
        """All that does not depend on rows of the state, by one warp; lane c is token, or column, c."""
        count, pitch = self.tokens, self.pitch
        i, h = place
        alpha, beta = Float32(1.0), Float32(0.0)
        if lane < tokens:
            x = memory.load_scalar(memory.address(a, i, lane, h), self.gate_dtype)
            x += memory.load_scalar(memory.address(dt_bias, h), self.dt_bias_dtype)
            alpha = math.gate_decay(memory.load_scalar(memory.address(A_log, h), Float32), x)
            beta = math.sigmoid(memory.load_scalar(memory.address(b, i, lane, h), self.gate_dtype))
        self.store_gram(shared, lane)
        cute.arch.sync_warp()
        solve, mix, decays, vectors = (shared[name] for name in ("solve", "mix", "decays", "vectors"))
        kappa, rho = Float32(1.0), Float32(scale)
        column = cutlass.min(lane, count - 1)
        if const_expr(self.spec.l2norm):
            kappa = math.rsqrt(self.read(solve + column * (pitch + 1)) + EPSILON)
            rho *= math.rsqrt(self.read(vectors + (count + column)) + EPSILON)
        step = beta * kappa
        decay = Float32(0.0) if lane < count else Float32(1.0)
        for t in cutlass.range_constexpr(count):
            decay *= cute.arch.shuffle_sync(alpha, t)
            decay = Float32(1.0) if lane == t else decay
            weight = decay * kappa
            row_step, row_rho = cute.arch.shuffle_sync(step, t), cute.arch.shuffle_sync(rho, t)
            at = t * pitch + lane
            if lane <= count:
                memory.store_words(decays + at, [convert.as_word(decay)])
            if lane < count:
                memory.store_words(solve + at, [convert.as_word(row_step * weight * self.read(solve + at))])
                memory.store_words(mix + at, [convert.as_word(row_rho * weight * self.read(mix + at))])
        cute.arch.sync_warp()
        solution = self.substitute(solve, beta, lane)
        target = shared["solution"]
        if lane < count:
            for t in cutlass.range_constexpr(count):
                memory.store_words(target + (t * pitch + lane), [convert.as_word(solution[t])])
            if const_expr(self.shared_group):
                for t in cutlass.range_constexpr(count):
                    total = Float32(0.0)
                    row = self.read_row(mix + t * pitch, t + 1)
                    for j in cutlass.range_constexpr(t + 1):
                        total = cute.math.fma(row[j], solution[j], total)
                    memory.store_words(target + ((count + t) * pitch + lane), [convert.as_word(total)])
            gamma = self.read(decays + (lane * pitch + count))
            for n, value in enumerate((gamma * kappa, gamma * rho, kappa)):
                memory.store_words(vectors + (n * count + lane), [convert.as_word(value)])

    def read(self, pointer):
        """One float32 of shared memory."""
        return memory.load_scalar(pointer, Float32)

    def read_row(self, pointer, count):
        """At least `count` floats of a row of a table."""
        return memory.load(pointer, Float32, -(-count // 4) * 4, 16)

    def substitute(self, solve, beta, lane):
        """Column `lane` of (1 + L)^-1 diag(beta), from the strict lower triangle of L."""
        solution = []
        for t in range(self.tokens):
            total = self.choose(lane, t, beta)
            row = self.read_row(solve + t * self.pitch, t) if t else []
            for j in range(t):
                total = cute.math.fma(-row[j], solution[j], total)
            solution.append(total)
        return solution

    @cute.jit
    def choose(self, lane, t, value):
        return value if lane == t else Float32(0.0)

    def fragment(self, keys, lane, group, j):
        """Columns 4 t .. 4 t + 3 of block j of this lane's row of a group of keys or queries."""
        row = keys + (row_of(lane >> 2) * self.key_pitch + (lane & 3) * 4)
        return memory.load(row + (8 * group * self.key_pitch + BLOCK * j), Float32, 4, 16)

    def store_gram(self, shared, lane):
        """Products of keys and queries with keys into `solve` and `mix`, squares of queries into the second vector."""
        if self.shared_group:
            wanted = [((0, None), [0])]
        elif self.key_groups == 1:
            wanted = [((0, 1), [0, 1])]
        else:
            wanted = [((0, 1), [0, 1]), ((2, 3), [0, 1, 2, 3])]
        sums = {(pair, n): [Float32(0.0)] * 4 for pair, columns in wanted for n in columns}
        zero = [Float32(0.0)] * 4
        for j in range(self.blocks):
            rows = [self.fragment(shared["keys"], lane, group, j) for group in range(self.groups)]
            for (pair, n), total in sums.items():
                low, high = rows[pair[0]], zero if pair[1] is None else rows[pair[1]]
                for s in (0, 2):
                    total = mma.mma_tf32([low[s], high[s], low[s + 1], high[s + 1]], rows[n][s : s + 2], total)
                sums[pair, n] = total
        for (pair, n), total in sums.items():
            for half, group in enumerate(pair):
                if group is not None:
                    self.store_products(shared, total[2 * half : 2 * half + 2], group, n, lane)

    @cute.jit
    def store_products(self, shared, values, group, n, lane):
        """Two products of row `row_of(g)` of a group with rows of group n."""
        g, t = lane >> 2, lane & 3
        row = 8 * group + row_of(g)
        table = shared["solve"] + row * self.pitch  # `mix` follows
        first_query = self.tokens
        if const_expr(8 * n < first_query):
            memory.store_words(table + (8 * n + t), [convert.as_word(values[0])])
        if const_expr(8 * n + 4 < first_query):
            memory.store_words(table + (8 * n + 4 + (t ^ 2)), [convert.as_word(values[1])])
        elif const_expr(group == n):  # sums of squares of queries are on the diagonal
            if g == 2 * t + 1:
                memory.store_words(shared["vectors"] + row, [convert.as_word(values[1])])
            if const_expr(8 * n >= first_query):
                if g == 2 * t:
                    memory.store_words(shared["vectors"] + row, [convert.as_word(values[0])])

    def load_coefficients(self, shared, lane):
        """What this lane multiplies products by (two floats per group each), and its operands, in two parts."""
        g, t = lane >> 2, lane & 3
        columns = [t, 4 + (t ^ 2)]
        vectors, solution, mix = shared["vectors"], shared["solution"], shared["mix"]
        if self.shared_group:
            row = solution + row_of(g) * self.pitch
            return (
                self.read(vectors + t),
                self.read(vectors + (self.tokens + (t ^ 2))),
                mma.split_fully([self.read(row + t)]),
            )
        scales = [
            [
                [self.read(vectors + (n * self.tokens + 8 * group + c)) for c in columns]
                for group in range(self.key_groups)
            ]
            for n in range(2)
        ]
        operands = {}
        for name, table in (("solution", solution), ("mix", mix)):
            for out in range(self.key_groups):
                for inner in range(out + 1):
                    row = table + ((8 * out + row_of(g)) * self.pitch + 8 * inner)
                    operands[name, out, inner] = mma.split_fully([self.read(row + c) for c in columns])
        return scales[0], scales[1], operands

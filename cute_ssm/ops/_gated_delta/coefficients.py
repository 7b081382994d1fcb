"""`TokenChunk`: up to 16 tokens of one head, and what a tile of the state is multiplied by to pass them.

One warp prepares a chunk for its CTA: products of keys and queries by tensor core, decays, the triangular solve.  Every
warp then reads the results as operands, and takes each of its tiles through products, solution, and update.  The
notation is that of `kernels.gated_delta_rule`.

No value of a token reaches outputs of earlier ones, or states before it.  What later tokens are multiplied by is zero,
exactly; but 0 times NaN or infinity is NaN.  So each warp looks at what it is about to multiply, and where any of it
could be such a value, an overflow included, it passes the tokens of that tile one after the other (`in_turn`), with
zeros in place of later ones.  Updates of the state take neither keys nor anything else of later tokens in any case.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import convert, math, memory, mma
from cute_ssm.ops._gated_delta.config import KEY_PAD, zeros_at

BLOCK = 16  # columns of a tile that a warp holds four a lane and row
EPSILON = 1e-6


def row_of(n):
    """Row, of a group of 8, that column n of a product belongs to."""
    half = n >> 1
    return half if isinstance(n, int) and n % 2 == 0 else ((n & 1) * 4) + (half ^ ((n & 1) * 2))


def read(pointer):
    """One float32 of shared memory."""
    return memory.load_scalar(pointer, Float32)


def read_row(pointer, count):
    """At least `count` floats of a row of a table."""
    return memory.load(pointer, Float32, -(-count // 4) * 4, 16)


class TokenChunk:
    """Tokens that are multiplied at once.

    `shared`, of all methods, holds pointers to ``keys`` (and queries behind them) as float32, and to the tables of
    `tuning.gated_delta_rule.table_parts`.
    """

    def __init__(self, tokens: int, K: int, l2norm: bool, queries: bool = True):
        """4, 8 or 16 tokens; without queries there are no outputs, and at least 8 tokens."""
        self.tokens, self.l2norm, self.queries = tokens, l2norm, queries
        self.shared_group = tokens == 4  # keys and queries are rows of one group
        self.key_groups = max(1, tokens // 8)
        self.groups = 2 * tokens // 8 if queries else self.key_groups
        self.blocks = K // BLOCK
        self.key_pitch = K + KEY_PAD
        self.pitch = tokens + 4  # of tables; column `tokens` of the weights is the decay of the state
        self.zeros = zeros_at(tokens, K)

    # ---------------------------------------------------------------------------------------------------- coefficients
    @cute.jit
    def prepare(self, alpha, beta, scale, shared, lane):
        """All that does not depend on rows of the state, by one warp.

        Lane c is token, or column, c, with its decay and step: 1 and 0 past the last token.  `scale` of queries.
        Above the diagonal, only `mix` and `solution` are read, and are zero whatever later tokens are.
        """
        count, pitch = self.tokens, self.pitch
        self.store_gram(shared, lane)
        cute.arch.sync_warp()
        solve, weights, vectors = (shared[name] for name in ("solve", "weights", "vectors"))
        kappa, rho = Float32(1.0), Float32(scale)
        column = cutlass.min(lane, count - 1)
        if const_expr(self.l2norm):
            kappa = math.rsqrt(read(solve + column * (pitch + 1)) + EPSILON)
            if const_expr(self.queries):
                rho *= math.rsqrt(read(vectors + (count + column)) + EPSILON)
        step = beta * kappa
        kappa = kappa if lane < count else Float32(1.0)
        token = lane if lane < count else Int32(-1)  # all tokens are behind the state
        decay = Float32(1.0)
        for t in cutlass.range_constexpr(count):
            passed = decay * cute.arch.shuffle_sync(alpha, t)
            decay = passed if token < t else decay
            weight = decay * kappa
            row_step, row_rho = cute.arch.shuffle_sync(step, t), cute.arch.shuffle_sync(rho, t)
            at = t * pitch + lane
            if lane <= count:
                memory.store_words(weights + (at + pitch), [convert.as_word(weight)])
                if const_expr(t == 0):
                    memory.store_words(weights + lane, [convert.as_word(Float32(1.0))])
            if lane < count:
                memory.store_words(solve + at, [convert.as_word(row_step * weight * read(solve + at))])
                if const_expr(self.queries):
                    mix = shared["mix"]
                    value = row_rho * weight * read(mix + at)
                    if const_expr(not self.shared_group):  # there, what is above the diagonal is not read
                        value = value if token < t + 1 else Float32(0.0)
                    memory.store_words(mix + at, [convert.as_word(value)])
        cute.arch.sync_warp()
        solution = self.substitute(solve, beta, lane)
        target = shared["solution"]
        if lane < count:
            for t in cutlass.range_constexpr(count):
                memory.store_words(target + (t * pitch + lane), [convert.as_word(solution[t])])
            if const_expr(self.shared_group):
                for t in cutlass.range_constexpr(count):
                    total = Float32(0.0)
                    row = read_row(shared["mix"] + t * pitch, t + 1)
                    for j in cutlass.range_constexpr(t + 1):
                        total = cute.math.fma(row[j], solution[j], total)
                    memory.store_words(target + ((count + t) * pitch + lane), [convert.as_word(total)])
            gamma = read(weights + ((lane + 1) * pitch + count))
            for n, value in enumerate((gamma * kappa, gamma * rho)):
                if const_expr(self.queries or n != 1):
                    memory.store_words(vectors + (n * count + lane), [convert.as_word(value)])

    def substitute(self, solve, beta, lane):
        """Column `lane` of (1 + L)^-1 diag(beta), from the strict lower triangle of L."""
        solution = []
        for t in range(self.tokens):
            total = self.choose(lane, t, beta)
            row = read_row(solve + t * self.pitch, t) if t else []
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
        if self.groups == 1:
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
        vectors, solution = shared["vectors"], shared["solution"]
        if self.shared_group:
            row = solution + row_of(g) * self.pitch
            return (
                read(vectors + t),
                read(vectors + (self.tokens + (t ^ 2))),
                mma.split_fully([read(row + t)]),
            )
        scales = [
            [[read(vectors + (n * self.tokens + 8 * group + c)) for c in columns] for group in range(self.key_groups)]
            for n in range(2 if self.queries else 1)
        ]
        operands = {}
        for name in ("solution", "mix") if self.queries else ("solution",):
            for out in range(self.key_groups):
                for inner in range(out + 1):
                    row = shared[name] + ((8 * out + row_of(g)) * self.pitch + 8 * inner)
                    operands[name, out, inner] = mma.split_fully([read(row + c) for c in columns])
        return (*scales, operands)

    # ----------------------------------------------------------------------------------------------------------- tiles
    def products(self, tile, dtype, keys, lane):
        """Products of a tile of `dtype` with all keys and queries, a list of 4 per group."""
        exact = dtype is not Float32
        high = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        low = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        for j in range(self.blocks):
            rows = [self.fragment(keys, lane, group, j) for group in range(self.groups)]
            x, y = (convert.unpack(words, dtype) for words in tile[j])
            for s in (0, 2):
                operand = [x[s], y[s], x[s + 1], y[s + 1]]
                rest = None
                if not exact:
                    operand, rest = mma.split(operand)
                for group in range(self.groups):
                    high[group] = mma.mma_tf32(operand, rows[group][s : s + 2], high[group])
                    if rest is not None:
                        low[group] = mma.mma_tf32(rest, rows[group][s : s + 2], low[group])
        if not exact:
            high = [[x + y for x, y in zip(*pair)] for pair in zip(high, low)]
        return high

    def multiply(self, parts, operand, total):
        """total + (high + low) (high + low)^T, small products first; in the order of products."""
        (high, low), (right, right_low) = parts, operand
        for left, other in ((low, right_low), (low, right), (high, right_low), (high, right)):
            total = mma.mma_tf32([left[0], left[2], left[1], left[3]], other, total)
        return total

    def triangular(self, values, operands, name):
        """Products of all groups with a lower triangular matrix, a list of 4 per group."""
        parts = [mma.split_fully(group) for group in values]
        result = []
        for n in range(self.key_groups):
            total = [Float32(0.0)] * 4
            for inner in range(n + 1):
                total = self.multiply(parts[inner], operands[name, n, inner], total)
            result.append(total)
        return result

    def solve(self, products, coefficients, v, lane, following=None, load_ahead=None):
        """(U, outputs, next tile): lists of 4 per group; up to 4 tokens, of 2: rows g and g + 8 of the lane's token.

        Without queries there are no outputs, None, and U is that of tokens which all belong to the state.
        `load_ahead` loads one block of the next tile, of the types of `following`, a tile that nobody needs.
        """
        key_scales, operands = coefficients[0], coefficients[-1]
        if self.shared_group:
            (c,) = products
            X = [[cute.math.fma(-key_scales, c[2 * n], v[0][2 * n]) for n in range(2)]]
            R, query_scales = [[c[1], c[3]]], [[coefficients[1]] * 2]
        else:
            groups = range(self.key_groups)
            X = [[cute.math.fma(-key_scales[n][e & 1], products[n][e], v[n][e]) for e in range(4)] for n in groups]
            if not self.queries:
                return self.triangular(X, operands, "solution"), None, None
            R, query_scales = products[self.key_groups :], [[x[e & 1] for e in range(4)] for x in coefficients[1]]
        U, O, following = self.isolated(X, operands, lane, following, load_ahead)
        O = [[cute.math.fma(scale, r, o) for scale, r, o in zip(*lists)] for lists in zip(query_scales, R, O)]
        return U, O, following

    def both(self, X, operands):
        """(U, A U) of up to 4 tokens."""
        (high, low) = operands
        top, rest = mma.split_fully(X[0])
        total = [Float32(0.0)] * 4
        for part in (low, high):
            total = mma.mma_tf32([*top, *rest], [part[0], part[0]], total)
        return [[total[0], total[2]]], [[total[1], total[3]]]

    @cute.jit
    def isolated(self, X, operands, lane, following, load_ahead):
        """(U, A U, next tile), where no zero of M or A is multiplied by what is not finite.

        Up to 4 tokens, both are products with X; else A U is one with U, which is not finite wherever X is not.  The
        next tile is asked for behind the branch: loads ahead of it ptxas moves up into the products, which takes 197
        registers in place of 144 (8 tokens, sm_90a, ptxas 13.0).
        """
        U = X if const_expr(self.shared_group) else self.triangular(X, operands, "solution")
        values = [x for group in U for x in group]
        squares = values[0] * values[0]
        for x in values[1:]:
            squares = cute.math.fma(x, x, squares)
        O = X
        if not cute.arch.vote_all_sync(squares < Float32.inf):
            U, O = self.in_turn(X, operands, lane)
            if const_expr(load_ahead is not None):
                following = [load_ahead(j) for j in range(self.blocks)]
        else:
            if const_expr(load_ahead is not None):
                following = [load_ahead(j) for j in range(self.blocks)]
            if const_expr(self.shared_group):
                U, O = self.both(X, operands)
            else:
                O = self.triangular(U, operands, "mix")
        return U, O, following

    @cute.jit
    def in_turn(self, X, operands, lane):
        """(U, A U), each token's from it and earlier ones alone; those of finite tokens are the same bits."""
        lane = memory.pinned(Int32(lane))  # or what depends on it is computed before the branch
        U = [[Float32(0.0)] * len(x) for x in X]
        O = [[Float32(0.0)] * len(x) for x in X]
        for t in cutlass.range(self.tokens, unroll=1):
            kept = self.until(t, X, lane)
            if const_expr(self.shared_group):
                u, o = self.both(kept, operands)
                U = self.replaced(t, U, u, self.key_tokens(lane))
            else:
                U = self.replaced(t, U, self.triangular(kept, operands, "solution"), self.key_tokens(lane))
                o = self.triangular(U, operands, "mix")
            O = self.replaced(t, O, o, self.query_tokens(lane))
        return U, O

    def key_tokens(self, lane):
        """The tokens that elements of a product with keys belong to."""
        t = lane & 3
        if self.shared_group:
            return [[t] * 2]
        return [[8 * n + (t if e % 2 == 0 else 4 + (t ^ 2)) for e in range(4)] for n in range(self.key_groups)]

    def query_tokens(self, lane):
        """The same of a product with queries."""
        return [[(lane & 3) ^ 2] * 2] if self.shared_group else self.key_tokens(lane)

    def until(self, t, X, lane):
        """X, with zeros for tokens later than t."""
        tokens = self.key_tokens(lane)
        nothing = Float32(0.0)
        return [[cutlass.select_(j <= t, x, nothing) for j, x in zip(*lists)] for lists in zip(tokens, X)]

    def replaced(self, t, old, new, tokens):
        """`old`, with what `new` has of token t."""
        return [[cutlass.select_(j == t, y, x) for j, x, y in zip(*lists)] for lists in zip(tokens, old, new)]

    @cute.jit
    def update_operands(self, U, shared, last, lane):
        """(decay, operands, pointers to keys) of `update` to the state after token `last`; -1: before the first.

        Later tokens' keys and U, which need not be finite, are replaced by zeros; after a Python int there are none.
        """
        g, lane_t = lane >> 2, lane & 3
        table = shared["weights"] + (last + 1) * self.pitch
        columns = [lane_t] if const_expr(self.shared_group) else [lane_t, 4 + (lane_t ^ 2)]
        operands, rows = [], []
        for n in cutlass.range_constexpr(self.key_groups):
            weights = [read(table + (8 * n + c)) for c in columns]
            values = [U[n][e] * weights[e % len(columns)] for e in range(len(U[n]))]
            keys = [shared["keys"] + ((8 * n + c) * self.key_pitch + 2 * g) for c in columns]
            if const_expr(not isinstance(last, int)):
                seen = [8 * n + c <= last for c in columns]
                values = [cutlass.select_(seen[e % len(columns)], x, Float32(0.0)) for e, x in enumerate(values)]
                zeros = shared["keys"] + (self.zeros + 2 * g)
                keys = [memory.either(some, row, zeros) for some, row in zip(seen, keys)]
            high, low = mma.split_fully(values)
            if const_expr(self.shared_group):  # the second half of the operand is free for the low part
                operands.append([[*high, *low]])
                keys = keys * 2
            else:
                operands.append([[part[0], part[2], part[1], part[3]] for part in (low, high)])
            rows.append(keys)
        return read(table + self.tokens), operands, rows

    def update(self, old, j, gamma, operands, rows):
        """Block j of the state after a token: four floats of both rows, from those of `old`."""
        new = [[None] * 4, [None] * 4]
        right = [[memory.load(p + BLOCK * j, Float32, 2, 8) for p in pointers] for pointers in rows]
        for s in range(2):
            total = [Float32(0.0)] * 4
            for n in range(self.key_groups):
                for operand in operands[n]:
                    total = mma.mma_tf32(operand, [pair[s] for pair in right[n]], total)
            for half in range(2):
                for e in range(2):
                    at = s + 2 * e
                    new[half][at] = cute.math.fma(gamma, old[half][at], total[2 * half + e])
        return new

"""`TokenChunk`: up to 16 tokens of one head, and the products that apply them to a tile of the state.

With the state S [V, K], raw keys K and queries Q, values V, decays gamma (products of the tokens' decays alpha), steps
beta, and norms kappa and rho of keys and queries (see `gated_delta_rule_products` in the reference of the operator):

    P = S K^T, R = S Q^T;   X = V - gamma kappa P;   U = X M^T with M = (1 + L)^-1 diag(beta)
    out = gamma rho R + U A^T;                       S_n = gamma_n S + (D_n kappa U) K

One warp prepares a chunk for its CTA: products of keys and queries by tensor core, decays, the triangular solve.  Every
warp then reads the results as operands, and for each of its tiles computes products, solution, and update.

*Order of elements.*  Products sum over columns, so the order of columns is arbitrary: of the four columns that a lane
holds in a block (see `states`), elements (2 s, 2 s + 1) are the operand of step s of S K^T, and elements (s, 2 + s)
belong to the result of step s of U K.  So the state never moves between lanes.  A float32 state, and X, U and the
coefficients, are multiplied as two parts each; keys and queries are exact.

*Order of tokens.*  In shared memory, row r of keys and queries is token r; queries follow keys.  Column n of a product
belongs to row ``row_of(n)`` of a group of 8 rows: the two columns of lane t to rows t and 4 + (t ^ 2).  With that
order, and rows that are 8 banks apart, neither kind of access to keys has bank conflicts.  Up to 4 tokens, keys and
queries share one group: even columns belong to keys, odd ones to queries, and the odd half of every operand is free for
low parts.

*Isolation.*  No value of a token affects outputs of earlier tokens, or states before it.  Coefficients of later tokens
are exactly zero; but 0 times NaN or infinity is NaN.  So each warp tests the values that it is about to multiply, and
if any could be NaN or infinite, an overflow included, it processes the tokens of that tile one after the other
(`_token_by_token`), with zeros in place of later ones.  Updates of the state never read keys or values of later tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric, const_expr

from cute_ssm.device import convert, math, memory, mma
from cute_ssm.ops._gated_delta.layout import BLOCK, KEY_PAD, zeros_offset
from cute_ssm.ops._gated_delta.shared import ChunkMemory, Tables
from cute_ssm.ops._gated_delta.states import Block, Tile

EPSILON = 1e-6

Groups = list[list[Float32]]  # of each group of 8 tokens, a lane's elements of a product
LoadBlock = Callable[[int], Block]


class Coefficients(NamedTuple):
    """A lane's factors and operands of `TokenChunk.solve`.

    Attributes
    ----------
    key_scales, query_scales : list of list of Float32
        For each group, the factors of products with keys and with queries; none for queries if there are none.
    solution, mix : list of list of Parts
        Operands of the lower triangular matrices M and A, by group of rows and group of columns.  With 4 tokens, one
        operand in `solution` holds both, and `mix` is empty, as it is without queries.
    """

    key_scales: Groups
    query_scales: Groups
    solution: list[list[mma.Parts]]
    mix: list[list[mma.Parts]]


class Solution(NamedTuple):
    """Results of `TokenChunk.solve`: of each group, 4 elements a lane; up to 4 tokens, rows g and g + 8 of its token.

    Attributes
    ----------
    U : list of list of Float32
        Updates, which `TokenChunk.update` adds to the state.
    outputs : list of list of Float32
    following : Tile
        The next tile, if it was loaded.
    """

    U: Groups
    outputs: Groups
    following: Tile


class Update(NamedTuple):
    """A lane's part in the update of the state to some token.

    Attributes
    ----------
    decay : Float32
        Factor of the state before the chunk.
    operands : list of list of list of Float32
        Weighted updates, by group and part.
    keys : list of list of Pointer
        Rows of keys, by group.
    """

    decay: Float32
    operands: list[list[list[Float32]]]
    keys: list[list[cute.Pointer]]


class _Rows(NamedTuple):
    """Two groups of rows that are multiplied at once, by number; None: zeros."""

    low: int
    high: Optional[int]


class _Gram(NamedTuple):
    """Products of two groups of rows with the rows of one group."""

    rows: _Rows
    columns: int
    products: list[Float32]


def row_of(n: Any) -> Any:
    """Return the row, of a group of 8, that column n of a product belongs to."""
    half = n >> 1
    return half if isinstance(n, int) and n % 2 == 0 else ((n & 1) * 4) + (half ^ ((n & 1) * 2))


def read(pointer: cute.Pointer) -> Float32:
    """Load one float32 from shared memory."""
    return memory.load_scalar(pointer, Float32)


def read_row(pointer: cute.Pointer, count: int) -> list[Float32]:
    """Load at least `count` floats of a row of a table."""
    return memory.load(pointer, Float32, -(-count // 4) * 4, 16)


def store(pointer: cute.Pointer, value: Float32) -> None:
    """Store one float32 to shared memory."""
    memory.store_words(pointer, [convert.as_word(value)])


class TokenChunk:
    """Tokens that are multiplied at once."""

    def __init__(self, tokens: int, K: int, l2norm: bool, queries: bool = True) -> None:
        """Take 4, 8 or 16 tokens; at least 8 without queries, which means that there are no outputs."""
        self.tokens, self.l2norm, self.queries = tokens, l2norm, queries
        self.shared_group = tokens == 4  # keys and queries are rows of one group
        self.key_groups = max(1, tokens // 8)
        self.groups = 2 * tokens // 8 if queries else self.key_groups
        self.blocks = K // BLOCK
        self.key_pitch = K + KEY_PAD
        self.pitch = tokens + 4  # of tables; column `tokens` of the weights is the decay of the state
        self.zeros = zeros_offset(tokens, K)

    # ---------------------------------------------------------------------------------------------------- coefficients
    @cute.jit
    def prepare(self, alpha: Float32, beta: Float32, scale: Float32, chunk: ChunkMemory, lane: Int32) -> None:
        """Fill the tables of the chunk, which depend on no row of the state, by one warp.

        Lane c has token, or column, c: its decay `alpha` and step `beta`, 1 and 0 past the last token.  `scale` is the
        factor of queries.  Above the diagonal, only `mix` and `solution` are read, and are zero whatever later tokens
        hold.
        """
        count, pitch, tables = self.tokens, self.pitch, chunk.tables
        self._store_gram(chunk, lane)
        cute.arch.sync_warp()
        kappa, rho = Float32(1.0), Float32(scale)
        column = cutlass.min(lane, count - 1)
        if const_expr(self.l2norm):
            kappa = math.rsqrt(read(tables.solve + column * (pitch + 1)) + EPSILON)
            if const_expr(self.queries):
                rho *= math.rsqrt(read(tables.vectors + (count + column)) + EPSILON)
        step = beta * kappa
        kappa = kappa if lane < count else Float32(1.0)
        token = lane if lane < count else Int32(-1)  # the column of the state precedes all tokens
        decay = Float32(1.0)
        for t in cutlass.range_constexpr(count):
            decayed = decay * cute.arch.shuffle_sync(alpha, t)
            decay = decayed if token < t else decay
            weight = decay * kappa
            row_step, row_rho = cute.arch.shuffle_sync(step, t), cute.arch.shuffle_sync(rho, t)
            offset = t * pitch + lane
            if lane <= count:
                store(tables.weights + (offset + pitch), weight)
                if const_expr(t == 0):
                    store(tables.weights + lane, Float32(1.0))
            if lane < count:
                store(tables.solve + offset, row_step * weight * read(tables.solve + offset))
                if const_expr(self.queries):
                    value = row_rho * weight * read(tables.mix + offset)
                    if const_expr(not self.shared_group):  # there, nothing above the diagonal is read
                        value = value if token < t + 1 else Float32(0.0)
                    store(tables.mix + offset, value)
        cute.arch.sync_warp()
        solution = self._substitute(tables, beta, lane)
        if lane < count:
            for t in cutlass.range_constexpr(count):
                store(tables.solution + (t * pitch + lane), solution[t])
            if const_expr(self.shared_group):
                for t in cutlass.range_constexpr(count):
                    total = Float32(0.0)
                    row = read_row(tables.mix + t * pitch, t + 1)
                    for j in cutlass.range_constexpr(t + 1):
                        total = cute.math.fma(row[j], solution[j], total)
                    store(tables.solution + ((count + t) * pitch + lane), total)
            gamma = read(tables.weights + ((lane + 1) * pitch + count))
            for n, value in enumerate((gamma * kappa, gamma * rho)):
                if const_expr(self.queries or n != 1):
                    store(tables.vectors + (n * count + lane), value)

    def _substitute(self, tables: Tables, beta: Float32, lane: Int32) -> list[Float32]:
        """Return column `lane` of (1 + L)^-1 diag(beta), from the strict lower triangle of L."""
        solution: list[Float32] = []
        for t in range(self.tokens):
            total = self._if_lane(lane, t, beta)
            row = read_row(tables.solve + t * self.pitch, t) if t else []
            for j in range(t):
                total = cute.math.fma(-row[j], solution[j], total)
            solution.append(total)
        return solution

    @cute.jit
    def _if_lane(self, lane: Int32, t: int, value: Float32) -> Float32:
        return value if lane == t else Float32(0.0)

    def _fragment(self, keys: cute.Pointer, lane: Int32, group: int, j: int) -> list[Float32]:
        """Load columns 4 t .. 4 t + 3 of block j of this lane's row of a group of keys or queries."""
        row = keys + (row_of(lane >> 2) * self.key_pitch + (lane & 3) * 4)
        return memory.load(row + (8 * group * self.key_pitch + BLOCK * j), Float32, 4, 16)

    def _store_gram(self, chunk: ChunkMemory, lane: Int32) -> None:
        """Store products with keys in `solve` and `mix`, and squares of queries in the second vector."""
        if self.groups == 1:
            wanted = [(_Rows(0, None), [0])]
        elif self.key_groups == 1:
            wanted = [(_Rows(0, 1), [0, 1])]
        else:
            wanted = [(_Rows(0, 1), [0, 1]), (_Rows(2, 3), [0, 1, 2, 3])]
        zero = [Float32(0.0)] * 4
        grams = [_Gram(rows, n, [Float32(0.0)] * 4) for rows, columns in wanted for n in columns]
        for j in range(self.blocks):
            fragments = [self._fragment(chunk.keys, lane, group, j) for group in range(self.groups)]
            grams = [gram._replace(products=self._add_gram(gram, fragments, zero)) for gram in grams]
        for gram in grams:
            for half, group in enumerate(gram.rows):
                if group is not None:
                    values = gram.products[2 * half : 2 * half + 2]
                    self._store_products(chunk.tables, values, group, gram.columns, lane)

    def _add_gram(self, gram: _Gram, fragments: Groups, zero: list[Float32]) -> list[Float32]:
        """Return the products with those of one block of columns added."""
        low = fragments[gram.rows.low]
        high = zero if gram.rows.high is None else fragments[gram.rows.high]
        columns, total = fragments[gram.columns], gram.products
        for s in (0, 2):
            total = mma.mma_tf32([low[s], high[s], low[s + 1], high[s + 1]], columns[s : s + 2], total)
        return total

    @cute.jit
    def _store_products(self, tables: Tables, values: list[Float32], group: int, n: int, lane: Int32) -> None:
        """Store two products of row `row_of(g)` of a group with rows of group n."""
        g, t = lane >> 2, lane & 3
        row = 8 * group + row_of(g)
        table = tables.solve + row * self.pitch  # `mix` follows
        first_query = self.tokens
        if const_expr(8 * n < first_query):
            store(table + (8 * n + t), values[0])
        if const_expr(8 * n + 4 < first_query):
            store(table + (8 * n + 4 + (t ^ 2)), values[1])
        elif const_expr(group == n):  # sums of squares of queries are on the diagonal
            if g == 2 * t + 1:
                store(tables.vectors + row, values[1])
            if const_expr(8 * n >= first_query):
                if g == 2 * t:
                    store(tables.vectors + row, values[0])

    def load_coefficients(self, tables: Tables, lane: Int32) -> Coefficients:
        """Load this lane's factors and operands."""
        g, t = lane >> 2, lane & 3
        columns = [t, 4 + (t ^ 2)]
        if self.shared_group:
            row = tables.solution + row_of(g) * self.pitch
            key_scale, query_scale = read(tables.vectors + t), read(tables.vectors + (self.tokens + (t ^ 2)))
            return Coefficients([[key_scale]], [[query_scale]], [[mma.split_fully([read(row + t)])]], [])
        key_scales = self._scales(tables.vectors, 0, columns)
        query_scales = self._scales(tables.vectors, 1, columns) if self.queries else []
        solution = self._triangle(tables.solution, g, columns)
        mix = self._triangle(tables.mix, g, columns) if self.queries else []
        return Coefficients(key_scales, query_scales, solution, mix)

    def _scales(self, vectors: cute.Pointer, n: int, columns: list[Int32]) -> Groups:
        """Load the factors of two columns of each group, of vector n."""
        return [
            [read(vectors + (n * self.tokens + 8 * group + c)) for c in columns] for group in range(self.key_groups)
        ]

    def _triangle(self, table: cute.Pointer, g: Int32, columns: list[Int32]) -> list[list[mma.Parts]]:
        """Load the operands of a lower triangular matrix, by group of rows and group of columns."""
        operands = []
        for out in range(self.key_groups):
            rows = [table + ((8 * out + row_of(g)) * self.pitch + 8 * inner) for inner in range(out + 1)]
            operands.append([mma.split_fully([read(row + c) for c in columns]) for row in rows])
        return operands

    # ----------------------------------------------------------------------------------------------------------- tiles
    def products(self, tile: Tile, dtype: type[Numeric], keys: cute.Pointer, lane: Int32) -> Groups:
        """Return the products of a tile of `dtype` with all keys and queries."""
        exact = dtype is not Float32
        high = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        low = [[Float32(0.0)] * 4 for _ in range(self.groups)]
        for j in range(self.blocks):
            fragments = [self._fragment(keys, lane, group, j) for group in range(self.groups)]
            x, y = (convert.unpack(words, dtype) for words in tile[j])
            for s in (0, 2):
                operand = [x[s], y[s], x[s + 1], y[s + 1]]
                rest = None
                if not exact:
                    operand, rest = mma.split(operand)
                for group in range(self.groups):
                    high[group] = mma.mma_tf32(operand, fragments[group][s : s + 2], high[group])
                    if rest is not None:
                        low[group] = mma.mma_tf32(rest, fragments[group][s : s + 2], low[group])
        if not exact:
            high = [[x + y for x, y in zip(*pair)] for pair in zip(high, low)]
        return high

    def _multiply(self, left: mma.Parts, right: mma.Parts, total: list[Float32]) -> list[Float32]:
        """Return total + left right^T, small products first; in the order of products."""
        for x, y in ((left.low, right.low), (left.low, right.high), (left.high, right.low), (left.high, right.high)):
            total = mma.mma_tf32([x[0], x[2], x[1], x[3]], y, total)
        return total

    def _triangular(self, values: Groups, operands: list[list[mma.Parts]]) -> Groups:
        """Return the products of all groups with a lower triangular matrix."""
        parts = [mma.split_fully(group) for group in values]
        result = []
        for n in range(self.key_groups):
            total = [Float32(0.0)] * 4
            for inner in range(n + 1):
                total = self._multiply(parts[inner], operands[n][inner], total)
            result.append(total)
        return result

    def updates(self, products: Groups, coefficients: Coefficients, v: Groups) -> Groups:
        """Return the updates of a tile, U, of a chunk without queries, whose tokens all belong to the state."""
        return self._triangular(self._residuals(products, coefficients, v), coefficients.solution)

    def solve(
        self,
        products: Groups,
        coefficients: Coefficients,
        v: Groups,
        lane: Int32,
        following: Tile,
        load_ahead: Optional[LoadBlock],
    ) -> Solution:
        """Return the updates and outputs of a tile, and the next tile.

        `load_ahead` loads one block of the next tile, of the types of `following`, a tile that is no longer used.
        """
        X = self._residuals(products, coefficients, v)
        if self.shared_group:
            (c,) = products
            R = [[c[1], c[3]]]
        else:
            R = products[self.key_groups :]
        U, mixed, following = self._isolated(X, coefficients, lane, following, load_ahead)
        outputs = []
        for scales, r, o in zip(coefficients.query_scales, R, mixed):
            factors = scales * 2 if self.shared_group else [scales[e & 1] for e in range(4)]
            outputs.append([cute.math.fma(*terms) for terms in zip(factors, r, o)])
        return Solution(U, outputs, following)

    def _residuals(self, products: Groups, coefficients: Coefficients, v: Groups) -> Groups:
        """Return X."""
        scales = coefficients.key_scales
        if self.shared_group:
            (c,) = products
            return [[cute.math.fma(-scales[0][0], c[2 * n], v[0][2 * n]) for n in range(2)]]
        groups = range(self.key_groups)
        return [[cute.math.fma(-scales[n][e & 1], products[n][e], v[n][e]) for e in range(4)] for n in groups]

    def _both(self, X: Groups, coefficients: Coefficients) -> tuple[Groups, Groups]:
        """Return U and A U of up to 4 tokens."""
        operand, values = coefficients.solution[0][0], mma.split_fully(X[0])
        total = [Float32(0.0)] * 4
        for part in (operand.low, operand.high):
            total = mma.mma_tf32([*values.high, *values.low], [part[0], part[0]], total)
        return [[total[0], total[2]]], [[total[1], total[3]]]

    @cute.jit
    def _isolated(
        self,
        X: Groups,
        coefficients: Coefficients,
        lane: Int32,
        following: Tile,
        load_ahead: Optional[LoadBlock],
    ) -> tuple[Groups, Groups, Tile]:
        """Return U, A U and the next tile; no zero of M or A is multiplied by NaN or infinity.

        Up to 4 tokens, both are products with X; with more, A U is a product with U, which is not finite wherever X is
        not.  The next tile is loaded after the branch: ptxas moves loads ahead of the branch up into the products,
        which takes 197 registers in place of 144 (8 tokens, sm_90a, ptxas 13.0).
        """
        U = X if const_expr(self.shared_group) else self._triangular(X, coefficients.solution)
        values = [x for group in U for x in group]
        squares = values[0] * values[0]
        for x in values[1:]:
            squares = cute.math.fma(x, x, squares)
        mixed = X
        if not cute.arch.vote_all_sync(squares < Float32.inf):
            U, mixed = self._token_by_token(X, coefficients, lane)
            following = self._load_ahead(following, load_ahead)
        else:
            following = self._load_ahead(following, load_ahead)
            if const_expr(self.shared_group):
                U, mixed = self._both(X, coefficients)
            else:
                mixed = self._triangular(U, coefficients.mix)
        return U, mixed, following

    def _load_ahead(self, following: Tile, load_ahead: Optional[LoadBlock]) -> Tile:
        """Return the next tile, or `following` if there is none."""
        return following if load_ahead is None else [load_ahead(j) for j in range(self.blocks)]

    @cute.jit
    def _token_by_token(self, X: Groups, coefficients: Coefficients, lane: Int32) -> tuple[Groups, Groups]:
        """Return U and A U, each token's computed from it and earlier ones alone; finite tokens get the same bits."""
        lane = memory.pinned(Int32(lane))  # otherwise LLVM computes what depends on it before the branch
        U = [[Float32(0.0)] * len(x) for x in X]
        mixed = [[Float32(0.0)] * len(x) for x in X]
        for t in cutlass.range(self.tokens, unroll=1):
            masked = self._until(t, X, lane)
            if const_expr(self.shared_group):
                u, o = self._both(masked, coefficients)
                U = self._replaced(t, U, u, self._key_tokens(lane))
            else:
                U = self._replaced(t, U, self._triangular(masked, coefficients.solution), self._key_tokens(lane))
                o = self._triangular(U, coefficients.mix)
            mixed = self._replaced(t, mixed, o, self._query_tokens(lane))
        return U, mixed

    def _key_tokens(self, lane: Int32) -> list[list[Int32]]:
        """Return the tokens that elements of a product with keys belong to."""
        t = lane & 3
        if self.shared_group:
            return [[t] * 2]
        return [[8 * n + (t if e % 2 == 0 else 4 + (t ^ 2)) for e in range(4)] for n in range(self.key_groups)]

    def _query_tokens(self, lane: Int32) -> list[list[Int32]]:
        """Return the tokens that elements of a product with queries belong to."""
        return [[(lane & 3) ^ 2] * 2] if self.shared_group else self._key_tokens(lane)

    def _until(self, t: Int32, X: Groups, lane: Int32) -> Groups:
        """Return X with zeros for tokens later than t."""
        tokens = self._key_tokens(lane)
        zero = Float32(0.0)
        return [[cutlass.select_(j <= t, x, zero) for j, x in zip(*lists)] for lists in zip(tokens, X)]

    def _replaced(self, t: Int32, old: Groups, new: Groups, tokens: list[list[Int32]]) -> Groups:
        """Return `old` with the elements of token t taken from `new`."""
        return [[cutlass.select_(j == t, y, x) for j, x, y in zip(*lists)] for lists in zip(tokens, old, new)]

    @cute.jit
    def load_update(self, U: Groups, chunk: ChunkMemory, last: Any, lane: Int32) -> Update:
        """Return the operands of `update` to the state after token `last`; -1: before the first token.

        A dynamic `last` masks keys and U of later tokens, which need not be finite, by zeros.  If `last` is a Python
        int, it is that of the last token, and nothing is masked.
        """
        g, lane_t = lane >> 2, lane & 3
        table = chunk.tables.weights + (last + 1) * self.pitch
        columns = [lane_t] if const_expr(self.shared_group) else [lane_t, 4 + (lane_t ^ 2)]
        operands, rows = [], []
        for n in cutlass.range_constexpr(self.key_groups):
            weights = [read(table + (8 * n + c)) for c in columns]
            values = [U[n][e] * weights[e % len(columns)] for e in range(len(U[n]))]
            keys = [chunk.keys + ((8 * n + c) * self.key_pitch + 2 * g) for c in columns]
            if const_expr(not isinstance(last, int)):
                visible = [8 * n + c <= last for c in columns]
                values = [cutlass.select_(visible[e % len(columns)], x, Float32(0.0)) for e, x in enumerate(values)]
                zeros = chunk.keys + (self.zeros + 2 * g)
                keys = [memory.either(use, row, zeros) for use, row in zip(visible, keys)]
            high, low = mma.split_fully(values)
            if const_expr(self.shared_group):  # the second half of the operand is free for the low part
                operands.append([[*high, *low]])
                keys = keys * 2
            else:
                operands.append([[part[0], part[2], part[1], part[3]] for part in (low, high)])
            rows.append(keys)
        return Update(read(table + self.tokens), operands, rows)

    def update(self, old: Sequence[list[Float32]], j: int, update: Update) -> list[list[Float32]]:
        """Return block j of the state after a token, four floats of both rows, from those of the state before."""
        new: list[list[Float32]] = [[None] * 4, [None] * 4]
        right = [[memory.load(p + BLOCK * j, Float32, 2, 8) for p in pointers] for pointers in update.keys]
        for s in range(2):
            total = [Float32(0.0)] * 4
            for n in range(self.key_groups):
                for operand in update.operands[n]:
                    total = mma.mma_tf32(operand, [pair[s] for pair in right[n]], total)
            for half in range(2):
                for e in range(2):
                    c = s + 2 * e
                    new[half][c] = cute.math.fma(update.decay, old[half][c], total[2 * half + e])
        return new

    def advanced(self, tile: Tile, update: Update, part: int = 0) -> Tile:
        """Return a tile of float32 after a token, from that before the chunk.

        Keys are loaded ahead within `part` blocks, to limit registers; 0: within all.
        """
        after = []
        for j, block in enumerate(tile):
            if part and j % part == 0:
                cute.arch.sync_warp()
            old = [convert.unpack(words, Float32) for words in block]
            after.append([convert.pack(row, Float32) for row in self.update(old, j, update)])
        return after

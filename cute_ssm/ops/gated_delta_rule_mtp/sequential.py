"""`SequentialTokens`: one or two tokens of a request, one after the other, without shared memory.

Each warp processes its tiles on its own:

    P = S k, R = S q (raw keys and queries);   u = beta (v - alpha kappa P);   out = alpha rho R + rho kappa (k q) u
    S <- alpha S + kappa u k^T

Both products are of the state before the token, in one pass over it; only the four lanes of a row add up their sums.
All loads of a warp are issued at once, and no warp waits for another.  This minimizes latency with few requests; with
many, memory is busy in any case.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Numeric, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory
from cute_ssm.device.bounds import in_range
from cute_ssm.ops._gated_delta.chunk import EPSILON
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig
from cute_ssm.ops._gated_delta.layout import BLOCK, TILE
from cute_ssm.ops._gated_delta.states import StateTiles, Tile, widened
from cute_ssm.ops._gated_delta.tokens import KEY_BYTES
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_mtp.gates import TokenGates
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.ops.gated_delta_rule_mtp.tensors import Tensors

LANES = 4  # that share a row
MAX_REGISTER_KEYS = 256  # elements of keys that stay in registers, pinned as words; LLVM would keep them as float32

Row = list[list[Numeric]]  # words of a lane's columns of a key or query, by block


class TokenRow(NamedTuple):
    """Key and query of a token."""

    key: Row
    query: Row


class Factors(NamedTuple):
    """Scalars of a token, in the notation above.

    Attributes
    ----------
    alpha, beta : Float32
        Decay and step.
    kappa : Float32
        Norm of the key.
    P, R, u : Float32
        Factors of P in u, and of R and u in the output: alpha kappa, alpha rho, rho kappa (k q).
    """

    alpha: Float32
    beta: Float32
    kappa: Float32
    P: Float32
    R: Float32
    u: Float32


class SequentialTokens:
    """The path of `GatedDeltaRule` with ``config.sequential``; the number of tokens is that of the spec."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig) -> None:
        self.spec, self.tiles_per_warp = spec, config.tiles()
        self.states = StateTiles(convert.DTYPES[spec.state_dtype], spec.K, spec.saturate)
        self.input_dtype: type[Numeric] = convert.DTYPES[spec.input_dtype]
        self.output_dtype: type[Numeric] = convert.DTYPES[spec.output_dtype]
        self.key_bytes = min(KEY_BYTES, spec.input_bytes)
        self.gates = TokenGates(spec)

    def allocate(self) -> None:
        """Allocate nothing: this path uses no shared memory."""

    @cute.jit
    def run(self, tensors: Tensors, unit: Unit, shared: None, scale: Float32) -> None:
        """Process all rows of a unit."""
        state, i, h = tensors.initial_state, unit.request, unit.head
        tokens = range(self.spec.tokens)
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP)
        rows = [unit.first_row + (warp * self.tiles_per_warp + m) * TILE for m in range(self.tiles_per_warp)]
        tile = self.states.load(self.states.corner(state, (unit.slot, h), rows[0], lane))
        words = [self.load_row(tensors, unit, t, lane) for t in tokens]
        values = [[self.load_column(tensors.v, unit, t, row, lane) for t in tokens] for row in rows]
        alpha, beta = self.gates.load(tensors, unit, self.spec.tokens, lane)
        factors = [self.factors(words[t], alpha, beta, scale, t) for t in tokens]
        for m in cutlass.range_constexpr(self.tiles_per_warp):
            tile = widened(tile, self.states.dtype)
            self.write(tile, tensors, unit, rows[m], -1, lane)
            for t in cutlass.range_constexpr(self.spec.tokens):
                token = TokenRow(*([[memory.pinned(w) for w in block] for block in row] for row in words[t]))
                if const_expr(self.spec.K * self.spec.tokens > MAX_REGISTER_KEYS):
                    token = self.load_row(tensors, unit, t, memory.pinned(Int32(lane)))
                tile, o = self.step(tile, token, factors[t], values[m][t], t)
                self.store_output(memory.address(tensors.output, i, t, h, rows[m] + lane // LANES), o, lane)
                self.write(tile, tensors, unit, rows[m], t, lane)
            if const_expr(m + 1 < self.tiles_per_warp):
                tile = self.states.load(self.states.corner(state, (unit.slot, h), rows[m + 1], lane))

    def load_row(self, tensors: Tensors, unit: Unit, t: int, lane: Int32) -> TokenRow:
        """Return the words of this lane's columns of a token's key and query."""
        return TokenRow(*(self.load_columns(x, unit, t, lane) for x in (tensors.k, tensors.q)))

    def load_columns(self, tensor: cute.Tensor, unit: Unit, t: int, lane: Int32) -> Row:
        """Return the words of this lane's columns of a row of keys or queries."""
        row = memory.address(tensor, unit.request, t, unit.key_head, lane % LANES * 4)
        return [memory.load_packed(row + BLOCK * j, 2, self.key_bytes) for j in range(self.states.blocks)]

    def load_column(self, v: cute.Tensor, unit: Unit, t: int, row: Int32, lane: Int32) -> list[Float32]:
        """Return the values of this lane's two rows of a tile."""
        return [
            memory.load_scalar(
                memory.address(v, unit.request, t, unit.head, row + lane // LANES + 8 * half), self.input_dtype
            )
            for half in range(2)
        ]

    def factors(self, token: TokenRow, alpha: Float32, beta: Float32, scale: Float32, t: int) -> Factors:
        """Return the scalars of token t, from the gates of all tokens, one a lane."""
        alpha, beta = cute.arch.shuffle_sync(alpha, t), cute.arch.shuffle_sync(beta, t)
        squares = [Float32(0.0)] * 3  # k k, q q and k q
        for j in range(self.states.blocks):
            x, y = (convert.unpack(row[j], self.input_dtype) for row in token)
            for e in range(4):
                for n, (left, right) in enumerate(((x, x), (y, y), (y, x))):
                    squares[n] = cute.math.fma(left[e], right[e], squares[n])
        kk, qq, kq = (self.row_sum(value) for value in squares)
        kappa, rho = Float32(1.0), Float32(scale)
        if self.spec.l2norm:
            kappa, rho = math.rsqrt(kk + EPSILON), rho * math.rsqrt(qq + EPSILON)
        return Factors(alpha, beta, kappa, alpha * kappa, alpha * rho, rho * kappa * kq)

    def step(
        self, tile: Tile, token: TokenRow, factors: Factors, values: list[Float32], t: int
    ) -> tuple[Tile, list[Float32]]:
        """Return the tile after a token, and the outputs of its two rows."""
        sums = [Float32(0.0)] * 4  # P of both rows, R of both rows
        for j in range(self.states.blocks):
            x, y = (convert.unpack(row[j], self.input_dtype) for row in token)
            for half in range(2):
                old = convert.unpack(tile[j][half], Float32)
                for e in range(4):
                    sums[half] = cute.math.fma(old[e], x[e], sums[half])
                    sums[2 + half] = cute.math.fma(old[e], y[e], sums[2 + half])
        sums = [self.row_sum(value) for value in sums]
        u = [factors.beta * cute.math.fma(-factors.P, sums[n], values[n]) for n in range(2)]
        o = [cute.math.fma(factors.R, sums[2 + n], factors.u * u[n]) for n in range(2)]
        if t + 1 == self.spec.tokens and not self.spec.writes:
            return tile, o
        weights = [factors.kappa * x for x in u]
        after = []
        for j in range(self.states.blocks):
            key = convert.unpack(token.key[j], self.input_dtype)
            after.append([self.advance(tile[j][half], key, factors.alpha, weights[half]) for half in range(2)])
        return after, o

    def advance(self, words: list[Numeric], key: list[Float32], alpha: Float32, weight: Float32) -> list[Numeric]:
        """Return four elements of the state after a token."""
        old = convert.unpack(words, Float32)
        return convert.pack([cute.math.fma(weight, x, alpha * s) for x, s in zip(key, old)], Float32)

    def row_sum(self, value: Float32) -> Float32:
        """Return the sum over the lanes of a row, with the same bits in all of them."""
        for distance in (1, 2):
            value = value + math.exchanged(value, distance)
        return value

    @cute.jit
    def store_output(self, pointer: cute.Pointer, o: list[Float32], lane: Int32) -> None:
        """Store the outputs of rows g and g + 8, by the first two lanes of a row."""
        value = o[1] if lane & 1 == 1 else o[0]
        if lane & 2 == 0:
            memory.store_scalar(pointer + (lane & 1) * 8, value, self.output_dtype)

    @cute.jit
    def write(self, tile: Tile, tensors: Tensors, unit: Unit, row: Int32, t: int, lane: Int32) -> None:
        """Write the tile after token t, or before the first token if t is -1, wherever the call asks for it."""
        state, buffer, i, h = tensors.initial_state, tensors.intermediate_states_buffer, unit.request, unit.head
        lane = memory.pinned(Int32(lane))  # otherwise addresses of all stores are computed early and kept in registers
        if const_expr(buffer is not None and t >= 0):
            self.states.store(self.states.corner(buffer, (i, t, h), row, lane), tile)
        if const_expr(tensors.ssm_state_indices is not None and t >= 0):
            indices = tensors.ssm_state_indices
            slot = Int64(indices[i, t])
            if in_range(slot, state.shape[0]):
                self.states.store(self.states.corner(state, (slot, h), row, lane), tile)
        if const_expr(self.spec.write_final):
            slot, last = unit.slot, Boolean(t + 1 == self.spec.tokens)
            if const_expr(tensors.output_state_indices is not None):
                destinations = tensors.output_state_indices
                slot = Int64(destinations[i])
            if const_expr(tensors.accepted_steps is not None):
                accepted_steps = tensors.accepted_steps
                last = Int32(accepted_steps[i]) == t + 1
            if const_expr(tensors.accepted_steps is not None or t + 1 == self.spec.tokens):
                if last and in_range(slot, state.shape[0]):
                    self.states.store(self.states.corner(state, (slot, h), row, lane), tile)

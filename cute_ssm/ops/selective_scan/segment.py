"""`SegmentScan`: scan consecutive tokens of a channel, with their B and C staged in shared memory.

Per token, with A' = A log2(e), and with h in the registers of the lanes that share the channel:

    delta' = softplus(delta + bias);  h <- 2^(A' delta') h + (delta' u) B;  y = h . C + D u;  out = y silu(z)

B and C of the next tile of tokens are loaded while the current tile is scanned, and staged as float32 [token][state] in
the other half of a double buffer, from which all channels of the CTA read them.  Rows of u, delta and z are read in
*blocks* of 8 tokens, aligned in the row; each lane reads its share, u and delta one block ahead.  Tokens of a block
outside of the segment have delta' = 0 and B = 0, which does not change a bit of h.

The y of a token is summed in `chains` partial sums, whose states and order do not depend on the number of lanes: quad q
of the states is part of chain q modulo `chains`.
"""

from typing import Any, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory, scan
from cute_ssm.device.scan import TokenRange
from cute_ssm.ops.selective_scan.config import (
    BLOCK,
    LANE_STATES,
    QUAD,
    SelectiveScanConfig,
    chains,
    padded_states,
)
from cute_ssm.ops.selective_scan.operands import Channel, ColumnBlock
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.ops.selective_scan.states import ChannelStates

NO_STEP = -30000.0  # a delta whose softplus is zero, whatever the bias and its type


class SegmentScan:
    """Scans of a `SelectiveScanSpec`; a carry pass has no outputs, and adds up delta' behind the states."""

    def __init__(
        self, spec: SelectiveScanSpec, config: SelectiveScanConfig, states: ChannelStates, carry: bool
    ) -> None:
        self.spec, self.states, self.carry = spec, states, carry
        self.dtype = convert.DTYPES[spec.input_dtype]
        self.lanes, self.threads, self.tokens = config.lanes, WARP * config.warps, config.tokens
        self.padded = padded_states(spec)  # columns of B, and of C, in shared memory
        self.pitch = self.padded if carry else 2 * self.padded  # floats of a token in shared memory
        self.shared_floats = 2 * self.tokens * self.pitch
        self.chains = chains(spec) // config.lanes  # of a lane
        self.lane_tokens = BLOCK // config.lanes  # tokens of a block whose scalars and outputs a lane owns
        self.tile_blocks = config.tokens // BLOCK
        self.thread_blocks = -(-self.pitch * self.tile_blocks // self.threads)  # blocks of B and C that a thread brings
        # with this many states, ptxas runs out of registers if it loads B and C of several tokens at once
        self.one_token_at_a_time = config.splits > 1 and states.count > LANE_STATES

    @cute.jit
    def scan(self, channel: Channel, h: list[Float32], tokens: TokenRange) -> list[Float32]:
        """Scan a range of tokens that is not empty; returns the states after it."""
        lane = channel.thread % self.lanes
        first = tokens.begin & -BLOCK
        tiles = (tokens.end - first + (self.tokens - 1)) // self.tokens
        self.stage(channel.shared, self.load_columns(channel, first, tokens), channel.thread)
        cute.arch.sync_threads()
        words = self.load_rows(channel, first, tokens, lane)
        for i in cutlass.range(tiles):
            token = first + i * self.tokens
            next_columns = self.load_columns(channel, token + self.tokens, tokens)
            tile = channel.shared + (i % 2) * (self.tokens * self.pitch)
            blocks = cutlass.min(Int32(self.tile_blocks), (tokens.end - token + (BLOCK - 1)) // BLOCK)
            for k in cutlass.range(blocks):
                block_token, columns = token + k * BLOCK, tile + k * (BLOCK * self.pitch)
                h, words = self.scan_block(channel, words, h, columns, block_token, tokens, lane)
            self.stage(channel.shared + ((i + 1) % 2) * (self.tokens * self.pitch), next_columns, channel.thread)
            cute.arch.sync_threads()
        return h

    # ------------------------------------------------------------------------------------------------ loads and stores
    @cute.jit
    def load_rows(self, channel: Channel, token: Int32, tokens: TokenRange, lane: Int32) -> list[Int32]:
        """Load this lane's tokens of u and delta of the block from `token` on."""
        whole = token >= tokens.begin and token + BLOCK <= tokens.end
        outside = NO_STEP if const_expr(self.spec.delta_softplus) else 0.0
        share, aligned = self.lane_tokens, self.spec.aligned
        rows = (channel.rows.u, channel.rows.delta)
        words: list[Int32] = scan.load_pieces(
            rows, token + lane * share, tokens, whole, channel.active, share, aligned, outside
        )
        return words

    @cute.jit
    def column_blocks(
        self, B: cute.Tensor, C: cute.Tensor, row: Int32, group: Int32, thread: Int32
    ) -> list[ColumnBlock]:
        """Return the blocks of B and C that this thread brings of each tile."""
        found = []
        for p in cutlass.range_constexpr(self.thread_blocks):
            number = thread + p * self.threads
            column = number % self.pitch
            state = column if column < self.padded else column - self.padded
            inside = state if state < self.spec.dstate else Int32(0)
            start = memory.address(B, row, group, inside, 0).toint()
            if column >= self.padded:  # never in a carry pass
                start = memory.address(C, row, group, inside, 0).toint()
            active = state < self.spec.dstate and number < self.pitch * self.tile_blocks
            pointer = cute.make_ptr(self.dtype, start, cute.AddressSpace.gmem, assumed_align=self.dtype.width // 8)
            found.append(ColumnBlock(pointer, number // self.pitch * BLOCK, active))
        return found

    @cute.jit
    def load_columns(self, channel: Channel, token: Int32, tokens: TokenRange) -> list[list[Int32]]:
        """Load this thread's blocks of B and C of the tile from `token` on."""
        loaded = []
        for p in cutlass.range_constexpr(self.thread_blocks):
            block = channel.columns[p]
            first = token + block.token
            whole = first >= tokens.begin and first + BLOCK <= tokens.end
            active = block.active and first < tokens.end
            loaded.append(scan.load_pieces([block.row], first, tokens, whole, active, BLOCK, self.spec.aligned))
        return loaded

    @cute.jit
    def stage(self, tile: cute.Pointer, loaded: list[list[Int32]], thread: Int32) -> None:
        """Write this thread's blocks of B and C to shared memory, token by token."""
        for p in cutlass.range_constexpr(self.thread_blocks):
            number = thread + p * self.threads
            values = scan.unpack_piece(loaded[p], self.dtype, BLOCK)
            target = tile + (number % self.pitch + number // self.pitch * (BLOCK * self.pitch))
            if const_expr((p + 1) * self.threads <= self.pitch * self.tile_blocks):
                for t in cutlass.range_constexpr(BLOCK):
                    memory.store_scalar(target + t * self.pitch, values[t], Float32)
            elif number < self.pitch * self.tile_blocks:
                for t in cutlass.range_constexpr(BLOCK):
                    memory.store_scalar(target + t * self.pitch, values[t], Float32)

    # ------------------------------------------------------------------------------------------------------ arithmetic
    @cute.jit
    def scan_block(
        self,
        channel: Channel,
        words: list[Int32],
        h: list[Float32],
        columns: cute.Pointer,
        token: Int32,
        tokens: TokenRange,
        lane: Int32,
    ) -> tuple[list[Float32], list[Int32]]:
        """Scan the block from `token` on, whose B and C are at `columns`, and store its outputs, if there are any.

        `words` are its u and delta.  Returns the states after it, and u and delta of the next block, whose loads are in
        flight during the arithmetic, like those of z.
        """
        rows, active = channel.rows, channel.active
        aligned, share = self.spec.aligned, self.lane_tokens
        whole = token >= tokens.begin and token + BLOCK <= tokens.end
        first = token + lane * share
        half = len(words) // 2
        inputs = scan.unpack_piece(words[:half], self.dtype, share)
        steps = self.steps(scan.unpack_piece(words[half:], self.dtype, share), channel.delta_bias)
        if const_expr(not self.spec.delta_softplus):
            if not whole:
                inside = [first + t >= tokens.begin and first + t < tokens.end for t in range(share)]
                steps = [step if held else Float32(0.0) for step, held in zip(steps, inside)]
        gains = [step * value for step, value in zip(steps, inputs)]
        next_words = self.load_rows(channel, token + BLOCK, tokens, lane)
        gates: Any = None
        if const_expr(self.spec.has_z and not self.carry):
            gates = scan.load_pieces([rows.z], first, tokens, whole, active, share, aligned)
        h, sums = self.advance(channel.rates, h, steps, gains, columns + lane * QUAD)
        if const_expr(not self.carry):
            sums = scan.scatter_sums(sums, lane, self.lanes)
            if const_expr(channel.D is not None):
                sums = [cute.math.fma(channel.D, value, y) for value, y in zip(inputs, sums)]
            targets, results = [rows.out], [sums]
            if const_expr(self.spec.has_z):
                gates = scan.unpack_piece(gates, self.dtype, share)
                results = [[y * math.fast_silu(gate) for y, gate in zip(sums, gates)]]
            if const_expr(self.spec.ungated):
                targets, results = [rows.out, rows.ungated], [*results, sums]
            scan.store_pieces(targets, first, results, tokens, whole, active, aligned)
        return h, next_words

    def steps(self, values: list[Float32], bias: Optional[Float32]) -> list[Float32]:
        """Return delta' of delta."""
        if bias is not None:
            values = [value + bias for value in values]
        return [math.fast_softplus(value) for value in values] if self.spec.delta_softplus else values

    def advance(
        self,
        rates: list[Float32],
        h: list[Float32],
        steps: list[Float32],
        gains: list[Float32],
        columns: cute.Pointer,
    ) -> tuple[list[Float32], list[Float32]]:
        """Advance a lane's states by a block; returns them and this lane's part of the dot products with C.

        A carry pass has no such products; the last of its `h` is the sum of delta', token by token.
        """
        if self.carry and self.one_token_at_a_time:
            return self.advance_in_a_loop(rates, h, steps, gains, columns), []
        sums = []
        for t in range(BLOCK):
            step, gain = self.of_token(steps, t), self.of_token(gains, t)
            h, total = self.advance_token(rates, h, step, gain, columns + t * self.pitch)
            sums.append(total)
            if self.one_token_at_a_time:
                cute.arch.sync_warp()
        return h, sums

    @cute.jit
    def advance_in_a_loop(
        self,
        rates: list[Float32],
        h: list[Float32],
        steps: list[Float32],
        gains: list[Float32],
        columns: cute.Pointer,
    ) -> list[Float32]:
        """`advance` of a carry pass in which each lane owns one token of a block."""
        for t in cutlass.range(BLOCK, unroll=1):
            step, gain = self.of_token(steps, t), self.of_token(gains, t)
            h, _ = self.advance_token(rates, h, step, gain, columns + t * self.pitch)
        return h

    def advance_token(
        self, rates: list[Float32], h: list[Float32], step: Float32, gain: Float32, columns: cute.Pointer
    ) -> tuple[list[Float32], Optional[Float32]]:
        """Advance a lane's states by a token whose B and C begin at `columns`; returns them and a part of h . C."""
        h = list(h)
        chains: list[Optional[Float32]] = [None] * self.chains
        for i in range(self.states.quads):
            quad = columns + i * self.lanes * QUAD
            B = memory.load(quad, Float32, QUAD, 16)
            C = None if self.carry else memory.load(quad + self.padded, Float32, QUAD, 16)
            chain = i % self.chains
            for j in range(QUAD):
                n = i * QUAD + j
                h[n] = cute.math.fma(math.power_of_two(step * rates[n]), h[n], gain * B[j])
                if C is not None:
                    total = chains[chain]
                    chains[chain] = h[n] * C[j] if total is None else cute.math.fma(h[n], C[j], total)
        if self.carry:
            return [*h[:-1], h[-1] + step], None
        return h, scan.sum_chains(chains)

    def of_token(self, values: list[Float32], t: Int32 | int) -> Float32:
        """Return the scalar of token t, from the lane that owns it; t is dynamic only if lanes own one token each."""
        if self.lanes == 1:
            return values[t]
        source_lane = first_lane(self.lanes) + t // self.lane_tokens
        return cute.arch.shuffle_sync(values[t % self.lane_tokens if self.lane_tokens > 1 else 0], source_lane)


def first_lane(lanes: int) -> Int32:
    """Return the first lane of the aligned segment of `lanes` lanes that this lane is part of."""
    return cute.arch.lane_idx() & -lanes

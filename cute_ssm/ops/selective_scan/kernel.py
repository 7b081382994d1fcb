"""`SelectiveScan`: the selective state update over all tokens of every sequence.

Per (sequence, channel), with the states h [dstate] and the equations of `cute_ssm.ops.selective_scan.reference`,
token by token:

    delta' = softplus(delta + bias);  h <- 2^(A' delta') h + (delta' u) B;  y = h . C + D u;  out = y silu(z)

with A' = A log2(e).  `lanes` lanes share a channel and keep its states, and A', in registers for the whole sequence, so
nothing is scanned across lanes or tokens: five instructions a (token, channel, state) are the arithmetic.

A CTA owns a tile of channels of one group, persistently one (sequence, tile) after another.  B and C of the next
`tokens` tokens are loaded while those of the last are worked on, and staged as float32 [token][state] in the other half
of a double buffer, where all its channels read them.  Rows of u, delta and z are read in *blocks* of 8 tokens, aligned
in the row, each lane its share, u and delta one block ahead.  Tokens of a block outside the sequence have delta' = 0
and B = 0, which leaves h as it is, bit for bit.

The y of a token is summed in `chains` partial sums, whose states and order do not depend on `lanes`: lane j holds the
quads (4 neighbouring states) j, j + lanes, ..., and quad q is part of chain q modulo `chains`.

In place: every lane reads its tokens of a row before it writes them, so outputs may be the rows of u, delta or z.

Long sequences of few channels are scanned in `splits` *parts* at once, by two launches.  The recurrence is linear in h,
and what a part does to the states that it starts from is 2^(A' sum delta').  The *carry pass* scans every part but a
sequence's last for the states it ends with, from zero (the first part from the initial state), and writes these and
the sum of delta' to `carried`.  The other pass finds the states that a part starts from by folding, part by part, what
those before it carry, and scans it as if it were a sequence.  It reads tokens of its own part alone, and initial states
from `carried`, so that no part reads what another has overwritten, in a row or in the pool.  Parts are cut at multiples
of 8 tokens from the sequence's beginning, and nothing waits for another CTA.

PDL: everything is read and written after `griddepcontrol.wait`; dependents are released at once and wait likewise.
"""

from typing import Optional

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream
from cutlass.memory import SmemAllocator

from cute_ssm.arch import Arch
from cute_ssm.device import convert, launch, math, memory, scan
from cute_ssm.device.fakes import fake
from cute_ssm.ops.selective_scan.config import (
    BLOCK,
    LANE_STATES,
    QUAD,
    WARP,
    SelectiveScanConfig,
    carried_columns,
    chains,
    choose,
    padded_states,
)
from cute_ssm.ops.selective_scan.extents import Extents
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec

NO_STEP = -30000.0  # a delta whose softplus is zero whatever its bias, of any type


class SelectiveScan:
    """The kernel of a `SelectiveScanSpec`; batch, channels, groups, tokens, slots and strides are dynamic.

    With `carry` it is the carry pass of one that splits sequences.
    """

    def __init__(self, spec: SelectiveScanSpec, config: SelectiveScanConfig, arch: Arch, carry: bool = False):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.dtype = convert.DTYPES[spec.input_dtype]
        self.state_dtype = convert.DTYPES.get(spec.state_dtype)
        self.lanes = config.lanes
        self.threads = WARP * config.warps
        self.carry, self.splits = carry, config.splits
        self.first = SelectiveScan(spec, config, arch, carry=True) if config.splits > 1 and not carry else None
        self.padded = padded_states(spec)  # columns of B, and of C, in shared memory
        self.pitch = self.padded if carry else 2 * self.padded  # floats of a token in shared memory
        self.quads = self.padded // (QUAD * config.lanes)  # of a lane
        # so many states that loads of several tokens at once, which this keeps apart, would take registers from them
        self.crowded = config.splits > 1 and self.quads * QUAD > LANE_STATES
        self.folded = 4 if self.quads <= 4 else 1  # rows of `carried` whose loads travel together
        self.chains = chains(spec) // config.lanes  # of a lane
        self.share = BLOCK // config.lanes  # tokens of a block whose scalars and outputs a lane owns
        self.tokens = config.tokens
        self.blocks = config.tokens // BLOCK
        self.extents = Extents(self)
        self.pieces = -(-self.pitch * self.blocks // self.threads)  # blocks of B and C that a thread brings

    @staticmethod
    def default_config(spec: SelectiveScanSpec, arch: Arch, units: int | None = None) -> SelectiveScanConfig:
        """The config for `units` (sequence, channel) pairs, by default for more than the GPU can hold at once."""
        return choose(spec, arch, units if units is not None else 1 << 20, 1 << 20, 1, arch.sm_count)

    # ------------------------------------------------------------------------------------------------------------ host
    def fakes(self):
        """Arguments of `__call__` as the compiler sees them: what is static, and which sizes are equal."""
        spec = self.spec
        dim, groups, slots, length = (cute.sym_int32() for _ in range(4))
        rows = cute.sym_int32()  # of u: sequences, or 1 if they are packed
        sequences = rows if spec.query_dtype is None else cute.sym_int32()

        def rows_of(dtype, shape, align=1):
            return fake(dtype, shape, (1,), align)

        def optional(wanted, *args):
            return rows_of(*args) if wanted else None

        def indices(wanted):
            return fake(spec.cache_dtype, (sequences,)) if wanted else None

        wide = 16 * 8 // self.dtype.width if spec.aligned else 1
        quad = QUAD if spec.aligned_states else 1
        channels, columns = (rows, dim, length), (rows, groups, spec.dstate, length)
        cache = indices(spec.cache_dtype is not None and not spec.blocks)
        query = None if spec.query_dtype is None else rows_of(spec.query_dtype, (cute.sym_int32(),))
        if spec.blocks:
            cache = rows_of(spec.cache_dtype, (sequences, cute.sym_int32()))
        ends = optional(spec.chunks, spec.cache_dtype, (cute.sym_int32(),))
        return (
            rows_of(self.dtype, channels, wide),
            optional(spec.state_dtype is not None, self.state_dtype, (slots, dim, spec.dstate), quad),
            rows_of(self.dtype, channels, wide),
            rows_of(Float32, (dim, spec.dstate), quad),
            rows_of(self.dtype, columns, wide),
            rows_of(self.dtype, columns, wide),
            fake(Float32, (dim,)) if spec.has_D else None,
            optional(spec.has_z, self.dtype, channels, wide),
            fake(Float32, (dim,)) if spec.has_bias else None,
            query,
            cache,
            fake(cutlass.Uint8, (sequences,)) if spec.has_initial else None,
            indices(spec.blocks),
            indices(spec.blocks),
            indices(spec.blocks),
            ends,
            indices(spec.chunks),
            rows_of(self.dtype, channels, wide),
            optional(spec.ungated, self.dtype, channels, wide),
            optional(self.splits > 1, Float32, (sequences, self.splits, dim, carried_columns(spec)), QUAD),
            Int64(0),
            Int32(0),
            Int32(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        u: cute.Tensor,
        ssm_states: Optional[cute.Tensor],
        delta: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        delta_bias: Optional[cute.Tensor],
        query_start_loc: Optional[cute.Tensor],
        cache_indices: Optional[cute.Tensor],
        has_initial_state: Optional[cute.Tensor],
        block_idx_first_scheduled_token: Optional[cute.Tensor],
        block_idx_last_scheduled_token: Optional[cute.Tensor],
        initial_state_idx: Optional[cute.Tensor],
        cu_chunk_seqlen: Optional[cute.Tensor],
        last_chunk_indices: Optional[cute.Tensor],
        out: cute.Tensor,
        ungated: Optional[cute.Tensor],
        carried: Optional[cute.Tensor],
        null_block_id: Int64,
        block_size: Int32,
        sequences: Int32,
        max_ctas: Int32,
        stream,
    ):
        """Shapes as in `cute_ssm.selective_scan`, packed ones with a 1 in front; `max_ctas` bounds the grid.

        `carried` (sequences, splits, dim, columns) is scratch: what parts hand on, see the head of this file.
        """
        groups = B.shape[1]
        channels = self.threads // self.lanes
        per_group = u.shape[1] // groups
        tiles = (per_group + channels - 1) // channels
        if const_expr(self.first is not None):
            units = sequences * groups * tiles * (self.splits - 1)
            self.first.kernel(
                u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
                block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
                last_chunk_indices, out, ungated, carried, null_block_id, block_size, units, tiles, per_group,
            ).launch(
                grid=[cutlass.min(units, max_ctas), 1, 1],
                block=[self.threads, 1, 1],
                min_blocks_per_mp=1,
                use_pdl=True,
                stream=stream,
            )  # fmt: skip
            launch.prefer_shared()
        units = sequences * groups * tiles * self.splits
        self.kernel(
            u, ssm_states, delta, A, B, C, D, z, delta_bias, query_start_loc, cache_indices, has_initial_state,
            block_idx_first_scheduled_token, block_idx_last_scheduled_token, initial_state_idx, cu_chunk_seqlen,
            last_chunk_indices, out, ungated, carried, null_block_id, block_size, units, tiles, per_group,
        ).launch(
            grid=[cutlass.min(units, max_ctas), 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,  # without it ptxas spills a few registers for the sake of more CTAs
            use_pdl=True,
            stream=stream,
        )  # fmt: skip
        launch.prefer_shared()

    # ---------------------------------------------------------------------------------------------------------- device
    @cute.kernel
    def kernel(
        self,
        u: cute.Tensor,
        states: Optional[cute.Tensor],
        delta: cute.Tensor,
        A: cute.Tensor,
        B: cute.Tensor,
        C: cute.Tensor,
        D: Optional[cute.Tensor],
        z: Optional[cute.Tensor],
        bias: Optional[cute.Tensor],
        query_start: Optional[cute.Tensor],
        cache: Optional[cute.Tensor],
        has_initial: Optional[cute.Tensor],
        first_block: Optional[cute.Tensor],
        last_block: Optional[cute.Tensor],
        initial_block: Optional[cute.Tensor],
        chunk_ends: Optional[cute.Tensor],
        last_chunk: Optional[cute.Tensor],
        out: cute.Tensor,
        ungated: Optional[cute.Tensor],
        carried: Optional[cute.Tensor],
        null_slot: Int64,
        block_size: Int32,
        units: Int32,
        tiles: Int32,
        per_group: Int32,
    ):
        thread = cute.arch.thread_idx()[0]
        smem = SmemAllocator().allocate_array(Float32, 2 * self.tokens * self.pitch)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        metadata = (query_start, cache, has_initial, first_block, last_block, initial_block, chunk_ends, last_chunk)
        all_tiles = tiles * (u.shape[1] // per_group)
        per_sequence = all_tiles * (self.splits - self.carry)
        unit, stride = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        while unit < units:
            b = unit // per_sequence
            part, tile = Int32(0), unit - b * per_sequence
            if const_expr(self.splits > 1):
                part = tile // all_tiles
                tile = tile - part * all_tiles
            group = tile // tiles
            within = (tile - group * tiles) * (self.threads // self.lanes) + thread // self.lanes
            channel, valid = group * per_group + within, within < per_group
            begin, end, slot, real, initial = self.extents.extent(metadata, u, states, b, null_slot)
            low, high = begin, end
            if const_expr(self.splits > 1):
                low, high = self.part_extent(begin, end, part)
                real = real and low < high
                if const_expr(self.carry):  # the last part has a state to keep, if it is the first
                    real = real and (high < end or part == 0)
            if real:
                row = b if const_expr(query_start is None) else Int32(0)
                # lanes beyond the last channel read the weights of another, and nothing that is written
                known = channel if valid else group * per_group
                rates = [a * math.LOG2E for a in self.load_quads(memory.address(A, known, 0), thread % self.lanes)]
                weights = [None if const_expr(t is None) else Float32(t[known]) for t in (D, bias)]
                rows = [
                    None if const_expr(t is None) else memory.address(t, row, known, 0)
                    for t in (u, delta, z, out, ungated)
                ]
                columns = self.column_rows(B, C, row, group, thread)
                args = (rows, columns, weights, rates, smem, thread, valid)
                if const_expr(self.carry):
                    self.hand_on(args, states, carried, b, part, slot, known, low, high, end, initial)
                else:
                    h = [Float32(0.0)] * (QUAD * self.quads)
                    if const_expr(self.splits > 1):
                        if valid:
                            h = self.fold(carried, b, part, known, rates, initial, thread % self.lanes)
                    elif const_expr(states is not None):
                        if initial and valid:
                            h = self.load_quads(memory.address(states, slot, known, 0), thread % self.lanes)
                    if const_expr(self.spec.blocks):
                        extent, cut = (begin, end), (low, high)
                        self.extents.segments(
                            args, h, metadata, states, b, known, extent, cut, null_slot, block_size
                        )  # fmt: skip
                    elif low < high:
                        h = self.segment(args, h, low, high)
                        if const_expr(states is not None):
                            if valid and high == end:
                                self.store_quads(memory.address(states, slot, known, 0), h, thread % self.lanes)
            unit += stride

    # ------------------------------------------------------------------------------------------------------- sequences
    @cute.jit
    def segment(self, args, h, begin, stop):
        """Scan tokens [begin, stop), not empty; returns the states after them."""
        rows, columns, weights, rates, smem, thread, valid = args
        lane = thread % self.lanes
        first = begin & -BLOCK
        tiles = (stop - first + (self.tokens - 1)) // self.tokens
        self.stage(smem, self.load_columns(columns, first, begin, stop, thread), thread)
        cute.arch.sync_threads()
        ahead = self.load_rows(rows, first, begin, stop, lane, valid)
        for i in cutlass.range(tiles):
            token = first + i * self.tokens
            brought = self.load_columns(columns, token + self.tokens, begin, stop, thread)
            tile = smem + (i % 2) * (self.tokens * self.pitch)
            blocks = cutlass.min(Int32(self.blocks), (stop - token + (BLOCK - 1)) // BLOCK)
            for k in cutlass.range(blocks):
                at, staged = token + k * BLOCK, tile + k * (BLOCK * self.pitch)
                h, ahead = self.block(rows, ahead, weights, rates, h, staged, at, begin, stop, lane, valid)
            self.stage(smem + ((i + 1) % 2) * (self.tokens * self.pitch), brought, thread)
            cute.arch.sync_threads()
        return h

    # ---------------------------------------------------------------------------------------------------------- parts
    @cute.jit
    def part_extent(self, begin, end, part):
        """First token and end of a part of a sequence; empty if the sequence is too short for it."""
        size = ((end - begin + (self.splits - 1)) // self.splits + (BLOCK - 1)) & -BLOCK
        low = cutlass.min(begin + part * size, end)
        return low, cutlass.min(low + size, end)

    @cute.jit
    def hand_on(self, args, states, carried, b, part, slot, channel, low, high, end, initial):
        """Scan a part for what it carries: row part + 1 of `carried`; the first part keeps initial states in row 0."""
        thread, valid = args[5:]
        lane = thread % self.lanes
        h = [Float32(0.0)] * (QUAD * self.quads)
        if const_expr(states is not None):
            if part == 0 and initial and valid:
                h = self.load_quads(memory.address(states, slot, channel, 0), lane)
                self.store_quads(memory.address(carried, b, 0, channel, 0), h, lane, True)
        if high < end:
            *added, elapsed = self.segment(args, [*h, Float32(0.0)], low, high)
            if valid:
                row = memory.address(carried, b, part + 1, channel, 0)
                self.store_quads(row, added, lane, True)
                if lane == 0:
                    memory.store_scalar(row + (carried_columns(self.spec) - QUAD), elapsed, Float32)

    @cute.jit
    def fold(self, carried, b, part, channel, rates, initial, lane):
        """States that a part starts from: 2^(A' sum delta') applied to those of the part before, plus what it adds."""
        h = [Float32(0.0)] * (QUAD * self.quads)
        if part > 0 or initial:
            row = cutlass.min(part, 1)
            h = self.load_quads(memory.address(carried, b, row, channel, 0), lane, True)
        for i in cutlass.range(2, part + 1, unroll=self.folded):
            row = memory.address(carried, b, i, channel, 0)
            added = self.load_quads(row, lane, True)
            elapsed = memory.load_scalar(row + (carried_columns(self.spec) - QUAD), Float32)
            for n in cutlass.range_constexpr(QUAD * self.quads):
                h[n] = cute.math.fma(math.power_of_two(elapsed * rates[n]), h[n], added[n])
        return h

    # ------------------------------------------------------------------------------------------------ loads and stores
    @cute.jit
    def load_rows(self, rows, token, begin, stop, lane, valid):
        """This lane's tokens of u and delta of the block from `token` on, as words."""
        whole = token >= begin and token + BLOCK <= stop
        outside = NO_STEP if const_expr(self.spec.delta_softplus) else 0.0
        share, aligned = self.share, self.spec.aligned
        return scan.load_pieces(
            rows[:2], token + lane * share, scan.TokenRange(begin, stop), whole, valid, share, aligned, outside
        )

    @cute.jit
    def column_rows(self, B, C, row, group, thread):
        """(row of B or C, first token in a tile, whether it exists) of each block that this thread brings."""
        found = []
        for p in cutlass.range_constexpr(self.pieces):
            number = thread + p * self.threads
            column = number % self.pitch
            state = column if column < self.padded else column - self.padded
            known = state if state < self.spec.dstate else Int32(0)
            start = memory.address(B, row, group, known, 0).toint()
            if column >= self.padded:  # never in the carry pass
                start = memory.address(C, row, group, known, 0).toint()
            exists = state < self.spec.dstate and number < self.pitch * self.blocks
            pointer = cute.make_ptr(self.dtype, start, cute.AddressSpace.gmem, assumed_align=self.dtype.width // 8)
            found.append((pointer, number // self.pitch * BLOCK, exists))
        return found

    @cute.jit
    def load_columns(self, columns, token, begin, stop, thread):
        """This thread's blocks of B and C in the tile from `token` on, as words."""
        brought = []
        for p in cutlass.range_constexpr(self.pieces):
            pointer, offset, exists = columns[p]
            at = token + offset
            whole = at >= begin and at + BLOCK <= stop
            near = exists and at < stop
            brought.append(
                scan.load_pieces([pointer], at, scan.TokenRange(begin, stop), whole, near, BLOCK, self.spec.aligned)
            )
        return brought

    @cute.jit
    def stage(self, tile, brought, thread):
        """Write this thread's blocks of B and C to shared memory, token by token."""
        for p in cutlass.range_constexpr(self.pieces):
            number = thread + p * self.threads
            values = scan.unpack_piece(brought[p], self.dtype, BLOCK)
            target = tile + (number % self.pitch + number // self.pitch * (BLOCK * self.pitch))
            if const_expr((p + 1) * self.threads <= self.pitch * self.blocks):
                for t in cutlass.range_constexpr(BLOCK):
                    memory.store_scalar(target + t * self.pitch, values[t], Float32)
            elif number < self.pitch * self.blocks:
                for t in cutlass.range_constexpr(BLOCK):
                    memory.store_scalar(target + t * self.pitch, values[t], Float32)

    @cute.jit
    def load_quads(self, row, lane, padded: cutlass.Constexpr = False):
        """This lane's states, or rates, of a channel; zeros beyond dstate.  `padded`: the row has whole quads."""
        dtype = row.dtype
        values = []
        for i in cutlass.range_constexpr(self.quads):
            state = (lane + i * self.lanes) * QUAD
            got = [Float32(0.0)] * QUAD
            if const_expr(self.spec.aligned_states or padded):
                if state < self.spec.dstate:
                    got = memory.load(row + state, dtype, QUAD, QUAD * dtype.width // 8)
            else:
                for j in cutlass.range_constexpr(QUAD):
                    value = Float32(0.0)
                    if state + j < self.spec.dstate:
                        value = memory.load_scalar(row + (state + j), dtype)
                    got[j] = value
            values += got
        return values

    @cute.jit
    def store_quads(self, row, values, lane, padded: cutlass.Constexpr = False):
        """Round and store this lane's states of a channel; see `load_quads`."""
        dtype = row.dtype
        for i in cutlass.range_constexpr(self.quads):
            state = (lane + i * self.lanes) * QUAD
            if const_expr(self.spec.aligned_states or padded):
                if state < self.spec.dstate:
                    quad = values[i * QUAD : (i + 1) * QUAD]
                    memory.store(row + state, quad, dtype, QUAD * dtype.width // 8, self.spec.saturate)
            else:
                for j in cutlass.range_constexpr(QUAD):
                    if state + j < self.spec.dstate:
                        memory.store_scalar(row + (state + j), values[i * QUAD + j], dtype, self.spec.saturate)

    # ------------------------------------------------------------------------------------------------------ arithmetic
    @cute.jit
    def block(self, rows, words, weights, rates, h, tile, token, begin, stop, lane, valid):
        """Scan the block from `token` on, whose B and C are at `tile`, and store its outputs, if this pass has some.

        `words` are its u and delta.  Returns the states after it, and u and delta of the next block, which travel while
        this one is scanned, like z.
        """
        D, bias = weights
        aligned, share = self.spec.aligned, self.share
        whole = token >= begin and token + BLOCK <= stop
        mine = token + lane * share
        half = len(words) // 2
        inputs = scan.unpack_piece(words[:half], self.dtype, share)
        steps = self.steps(scan.unpack_piece(words[half:], self.dtype, share), bias)
        if const_expr(not self.spec.delta_softplus):
            if not whole:
                inside = [mine + t >= begin and mine + t < stop for t in range(share)]
                steps = [step if held else Float32(0.0) for step, held in zip(steps, inside)]
        gains = [step * value for step, value in zip(steps, inputs)]
        ahead = self.load_rows(rows, token + BLOCK, begin, stop, lane, valid)
        gates = None
        if const_expr(self.spec.has_z and not self.carry):
            gates = scan.load_pieces(rows[2:3], mine, scan.TokenRange(begin, stop), whole, valid, share, aligned)
        h, sums = self.advance(rates, h, steps, gains, tile + lane * QUAD)
        if const_expr(not self.carry):
            sums = scan.scatter_sums(sums, lane, self.lanes)
            if const_expr(D is not None):
                sums = [cute.math.fma(D, value, y) for value, y in zip(inputs, sums)]
            targets, results = rows[3:4], [sums]
            if const_expr(self.spec.has_z):
                gates = scan.unpack_piece(gates, self.dtype, share)
                results = [[y * math.fast_silu(gate) for y, gate in zip(sums, gates)]]
            if const_expr(self.spec.ungated):
                targets, results = rows[3:5], [*results, sums]
            scan.store_pieces(targets, mine, results, scan.TokenRange(begin, stop), whole, valid, aligned)
        return h, ahead

    def steps(self, values, bias):
        """delta' of delta."""
        if bias is not None:
            values = [value + bias for value in values]
        return [math.fast_softplus(value) for value in values] if self.spec.delta_softplus else values

    def advance(self, rates, h, steps, gains, columns):
        """Advance a lane's states by a block; returns them and this lane's part of the dot products with C.

        The carry pass has no such products; the last of its `h` is the sum of delta', token by token.
        """
        if self.carry and self.crowded:
            return self.advance_in_a_loop(rates, h, steps, gains, columns), []
        sums = []
        for t in range(BLOCK):
            step, gain = self.of_token(steps, t), self.of_token(gains, t)
            h, total = self.advance_token(rates, h, step, gain, columns + t * self.pitch)
            sums.append(total)
            if self.crowded:
                cute.arch.sync_warp()
        return h, sums

    @cute.jit
    def advance_in_a_loop(self, rates, h, steps, gains, columns):
        """`advance` of a carry pass whose lanes own one token of a block each."""
        for t in cutlass.range(BLOCK, unroll=1):
            step, gain = self.of_token(steps, t), self.of_token(gains, t)
            h, _ = self.advance_token(rates, h, step, gain, columns + t * self.pitch)
        return h

    def advance_token(self, rates, h, step, gain, columns):
        """Advance a lane's states by a token whose B, and C, begin at `columns`."""
        h = list(h)
        chains = [None] * self.chains
        for i in range(self.quads):
            at = columns + i * self.lanes * QUAD
            B = memory.load(at, Float32, QUAD, 16)
            C = None if self.carry else memory.load(at + self.padded, Float32, QUAD, 16)
            chain = i % self.chains
            for j in range(QUAD):
                n = i * QUAD + j
                h[n] = cute.math.fma(math.power_of_two(step * rates[n]), h[n], gain * B[j])
                if not self.carry:
                    total = chains[chain]
                    chains[chain] = h[n] * C[j] if total is None else cute.math.fma(h[n], C[j], total)
        if self.carry:
            return [*h[:-1], h[-1] + step], None
        return h, scan.sum_chains(chains)

    def of_token(self, values, t):
        """The scalar of a token, from the lane that owns it; t may be a register if lanes own one each."""
        if self.lanes == 1:
            return values[t]
        owner = lane_base(self.lanes) + t // self.share
        return cute.arch.shuffle_sync(values[t % self.share if self.share > 1 else 0], owner)


def lane_base(lanes):
    """First lane of the segment of `lanes` lanes that this one is part of."""
    return cute.arch.lane_idx() & -lanes

"""`Consumer`: the warps of `CheckpointingSSU` that multiply, a tile of the state at a time.

Everything is transposed: rows of results are rows of the state, and columns are up to eight new tokens.

    out^T [rows, tokens] = S0 C^T scaled by e^{c_{k+t}} + x^T CB^T,   CB[t, j] = e^{c_{k+t} - c_j} dt'_j (C_t . B_j)

The words of C serve twice: as the second operand of S0 C^T, and as the first of C B^T, whose result has the order of
the second operand of x^T CB^T.  So the products C . B stay in registers, are computed once for a unit, and are scaled
and masked (by select) for each head; D is added to their diagonal.  More than eight tokens are taken eight at a time,
and then the products are computed anew for every tile.

Positions that do not exist read a row of zeros, which lies on the banks of a row that is never read with it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from cute_ssm.device import convert, math, memory, mma, philox
from cute_ssm.device.math import fast_silu, power_of_two
from cute_ssm.device.tile import ROWS
from cute_ssm.device.tokens import TokenOperands
from cute_ssm.ops.checkpointing_ssu.config import STEP, TOKENS

UNROLLED = 4  # tiles of a consumer and unit that are unrolled: more do not fit the code cache, or wide ones registers
SMALLEST_UNIT = 2.0**-90  # of a quantised row's sums: its inverse times an input stays finite
HELD_COLUMNS = 128  # of 16 quantised rows that registers hold until their scales are known
IN_FLIGHT = 4  # quads of a new state whose products overlap
# of coefficients of new states, by types of x and of states, where not two: their errors are, in root mean square, a
# quarter of that of the rounding that follows, or less
PARTS = {
    "bfloat16": {"float8_e4m3fn": 1, "float32": 3},
    "float16": {"bfloat16": 1, "int8": 1, "float8_e4m3fn": 1, "float32": 3},
}
HELD = 32  # registers that may hold the history's B for all tiles of a unit


class Consumer:
    """The consumer warps of a kernel (`checkpointing_ssu.Steps`)."""

    def __init__(self, owner):
        self.owner, self.spec, self.half, self.tile = owner, owner.spec, owner.half, owner.tile
        self.layout, self.own = owner.layout, owner.own
        self.tokens = TokenOperands(owner.input_dtype)
        self.blocks = -(-self.spec.tokens // TOKENS)
        self.once = self.blocks == 1
        self.unrolled = self.once and self.own <= UNROLLED and not self.tile.wide and self.spec.dstate <= 128
        # whether a stage of a ring is used again
        self.again = not self.half.single or self.own > self.half.depth
        self.parts = PARTS[self.spec.input_dtype].get(self.spec.state_dtype, 2)
        # rows of quantised states that are rounded stochastically: no registers are left beside them
        self.random_rows = self.tile.scaled and self.spec.philox_rounds > 0
        self.zero_x = owner.zero + 7 * self.layout.x_pitch % 128
        self.zero_column = owner.zero + 7 * self.layout.column_pitch % 128
        self.history_steps = -(-self.spec.window // STEP)
        # float16 inputs become float32 on their way to quantised and float32 sums: no room for what is shared between
        # tiles; nor is there for quantised ones beside copies of unaligned rows
        half = self.spec.input_dtype == "float16"
        crowded = (self.tile.scaled and (half or not self.spec.aligned)) or (self.tile.dtype is Float32 and half)
        self.holds = not crowded and self.history_steps * self.spec.dstate // 4 <= HELD

    # ------------------------------------------------------------------------------------------------------------ unit
    @cute.jit
    def run(self, w, walk, outputs, store, store_view, tiles, ring, units, barriers):
        first, total, stride = walk
        lane = cute.arch.lane_idx()
        copies = (store, *self.owner.tile_copies(store, store_view, tiles))
        base_pointers = self.tile.pointers(ring, lane)
        if const_expr(self.half.single):
            self.unit(w, Int32(0), Int32(0), outputs, copies, base_pointers, units, barriers, lane)
        else:
            it, rounds = Int32(0), Int32(0)
            for _ in cutlass.range(first, total, stride):
                k = self.unit(w, it, rounds, outputs, copies, base_pointers, units, barriers, lane)
                rounds += self.own if k >= 0 else 0
                it += 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def unit(self, w, it, rounds, outputs, copies, base_pointers, units, barriers, lane):
        """This consumer's tiles of a CTA's it-th unit; returns k, or -1 where there was nothing to do."""
        layout, part = self.layout, self.half.part
        out, state_scale, rand_seed = outputs
        full, empty, unit_full, unit_empty = barriers
        stage, phase = self.owner.stage(it)
        here = stage * layout.unit_bytes
        cute.arch.mbarrier_wait(unit_full + stage, phase)
        meta = cute.recast_ptr(units + (here + layout.meta), dtype=Int32)
        k, n, b, start = memory.load_words(meta, 4)
        slot, head, column, first_tile = memory.load_words(meta + 4, 4)
        if k >= 0:
            place = (k, n, slot, head, column, first_tile)
            # opaque: the compiler would keep every address of a tile in a register of its own
            pointers = [pointer + memory.pinned(Int32(0)) for pointer in base_pointers]
            stages = (full, empty, rounds, w)
            unit_at = (units, here, pointers)
            block = self.token_block(place, unit_at, lane, 0) if const_expr(self.once) else None
            writes = Boolean(part == "write")
            if const_expr(part == "all"):
                writes = k + n > self.spec.window
            if const_expr(part != "keep"):
                if writes:
                    self.write_tiles(place, unit_at, stages, block, state_scale, rand_seed, copies, lane)
            if const_expr(part != "write"):
                if not writes:
                    self.keep_tiles(place, unit_at, stages, block, lane)
            # rows of out, in place of z, leave by one copy each
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_warp()
            if const_expr(self.half.single):  # again: 12 bytes spilled of stochastic int8; in a loop, 32 of int16 would
                _, _, b, start = memory.load_words(meta, 4)
                _, head, column, _ = memory.load_words(meta + 4, 4)
            width = self.own * layout.tile_rows * 2
            if const_expr(not self.spec.aligned):
                first_row = self.owner.token(out, b, start, 0, head, column).toint() + Int64(w * width)
                rows = units + (here + layout.z + w * width)
                self.owner.unaligned_rows.store(first_row, out.stride[1] * 2, n, rows, width, lane)
            by_bulk = self.spec.tokens if const_expr(self.spec.aligned) else 0
            for base in cutlass.range_constexpr(0, by_bulk, 32):
                t = base + lane
                if t < n:
                    to = self.owner.token(out, b, start, t, head, column).toint() + Int64(w * width)
                    source = units + (here + layout.z + t * layout.x_pitch + w * width)
                    memory.bulk_store(memory.global_bytes(to), source, width)
            cute.arch.cp_async_bulk_commit_group()
            if const_expr(not self.half.single):
                cute.arch.cp_async_bulk_wait_group(0, read=True)
        if const_expr(not self.half.single):
            cute.arch.sync_warp()
            self.arrive(unit_empty + stage, lane)
        return k

    @cute.jit
    def keep_tiles(self, place, unit_at, stages, block, lane):
        """All tiles of this consumer in a unit whose state stays as it is."""
        if const_expr(self.unrolled):
            for i in cutlass.range_constexpr(self.own):
                self.keep_tile(i, place, unit_at, stages, block, lane)
        else:
            for i in cutlass.range(self.own, unroll=1):
                self.keep_tile(i, place, unit_at, stages, block, lane)

    @cute.jit
    def keep_tile(self, i, place, unit_at, stages, block, lane):
        _, empty, _, _ = stages
        s = self.wait_tile(i, stages)
        _, _, pointers = unit_at
        at = [pointer + s * self.layout.tile_bytes for pointer in pointers]
        if const_expr(self.once):
            sums = self.tile.product(at, block[1])
            self.leave(empty, s, lane)  # before the rest: the next tile may come
            self.finish(i, place, unit_at, stages, block, 0, sums, lane)
        else:
            self.token_blocks(i, place, unit_at, stages, at, lane)
            self.leave(empty, s, lane)

    @cute.jit
    def token_blocks(self, i, place, unit_at, stages, at, lane):
        """Outputs of a tile, eight tokens at a time."""
        for first in cutlass.range_constexpr(0, self.spec.tokens, TOKENS):
            if first < place[1]:
                block = self.token_block(place, unit_at, lane, first)
                sums = self.tile.product(at, block[1])
                self.finish(i, place, unit_at, stages, block, first, sums, lane)

    @cute.jit
    def write_tiles(self, place, unit_at, stages, block, state_scale, rand_seed, copies, lane):
        """All tiles of this consumer in a unit whose state is replaced."""
        k, _, slot, _, _, first_tile = place
        _, empty, _, w = stages
        _, _, pointers = unit_at
        store, ts, tg = copies
        lane = memory.pinned(lane)  # opaque: what only these steps need is not computed, or kept, for the others
        first_tile += w * self.own
        random = None
        if const_expr(self.tile.rounds > 0):
            random = rand_seed[slot if const_expr(self.spec.seed_per_slot) else 0]
            if const_expr(not self.tile.scaled):
                random = philox.round_keys(random, self.tile.rounds)
        history = self.history_columns(place, unit_at, lane)
        held = Int32(-1)  # the stage whose new state is leaving
        for i in cutlass.range(self.own, unroll=1):
            s = self.wait_tile(i, stages)
            at = [pointer + s * self.layout.tile_bytes for pointer in pointers]
            if const_expr(self.once):
                mine = memory.pinned(lane) if const_expr(self.random_rows) else lane
                self.finish(i, place, unit_at, stages, block, 0, self.tile.product(at, block[1]), mine)
            else:
                self.token_blocks(i, place, unit_at, stages, at, lane)
            if held >= 0:
                self.release(empty, held, lane)
            held = Int32(-1)
            if k > 0:  # without a history, the state stays as it is
                self.fold(i, place, unit_at, stages, at, history, state_scale, random, lane)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_warp()
                if lane == 0:  # copies from a tensor map elect a lane by themselves, copies to one do not
                    cute.copy(store, ts[(None, s)], tg[(None, first_tile + i, slot)])
                cute.arch.cp_async_bulk_commit_group()
                if const_expr(self.half.depth > 1):
                    held = s
                else:
                    self.release(empty, s, lane)
            else:
                self.leave(empty, s, lane)
        if held >= 0:
            self.release(empty, held, lane)

    def leave(self, empty, stage, lane):
        """Give a stage back that all lanes have read."""
        if self.again:
            cute.arch.sync_warp()
            self.arrive(empty + stage, lane)

    def release(self, empty, stage, lane):
        """Give a stage back once its new state has been read."""
        if self.again:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.leave(empty, stage, lane)

    @cute.jit
    def arrive(self, bar, lane):
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def wait_tile(self, i, stages):
        """The stage of this consumer's i-th tile of the unit, once it is there."""
        full, _, rounds, w = stages
        first, phase = self.owner.ring_stage(rounds + i)
        cute.arch.mbarrier_wait(full + (first + w), phase)
        return first + w

    # --------------------------------------------------------------------------------------------------- token columns
    @cute.jit
    def token_block(self, place, unit_at, lane, first: cutlass.Constexpr):
        """What eight tokens from `first` on share between heads: (C . B by step of 16 positions, C for states)."""
        k, n = place[:2]
        units, here, _ = unit_at
        layout = self.layout
        c_rows, b_rows = here + layout.c, here + layout.b
        natural = self.row_words(units, c_rows, n, first, lane)
        t = first + lane // 4
        row = units + cutlass.select_(t < n, c_rows + t * layout.column_pitch, Int32(self.zero_column))
        count = cutlass.min(k + n, k + (first + TOKENS))
        raw = []
        for base in cutlass.range_constexpr(0, layout.rows, STEP):
            sums, new = [Float32(0.0)] * 4, [Float32(0.0)] * 4
            if const_expr(base == 0):
                sums = self.raw_products(units, b_rows, count, base, natural, lane)
            elif count > base:
                sums = self.raw_products(units, b_rows, count, base, natural, lane)
            for e in cutlass.range_constexpr(4):
                j = base + 2 * (lane % 4) + (e % 2 + e // 2 * 8)
                new[e] = Float32(1.0) if j == k + t else Float32(0.0)
            raw.append((sums, new))
        return raw, self.tile.projection(natural, row, lane)

    def row_words(self, units, rows, count, first, lane):
        """Eight rows of B or C, from `first` on, as words of 16 columns each; zeros from row `count` on."""
        r = first + lane % 8
        at = cutlass.select_(r < count, rows + r * self.layout.column_pitch, Int32(self.zero_column))
        at = units + (at + lane // 8 * 16)
        words = []
        for offset in range(0, self.spec.dstate * 2, 64):
            words += mma.load_matrices(at + offset, 4, transposed=False)
        return [words[i : i + 2] for i in range(0, len(words), 2)]

    def raw_products(self, units, rows, count, base, natural, lane):
        """C . B of token ``lane // 4`` and positions 2 p, 2 p + 1, 2 p + 8, 2 p + 9 from `base` on, p = lane % 4."""
        values = []
        for first in (base, base + 8):
            words = self.row_words(units, rows, count, first, lane)
            values += self.tokens.products(natural, words, [Float32(0.0)] * 4)[:2]
        return values

    # --------------------------------------------------------------------------------------------------------- outputs
    def x_words(self, units, rows, count, base, offset, lane):
        """Where this lane reads 16 positions of x^T from `base` on, for the columns at `offset` bytes."""
        j = base + lane % 8 + lane // 16 * 8
        at = cutlass.select_(j < count, rows + j * self.layout.x_pitch, Int32(self.zero_x))
        return units + (at + lane // 8 % 2 * 16 + offset)

    def tile_offset(self, i, w):
        """(tile of the unit, its head in the unit, bytes to its columns in a row of x) of a consumer's i-th tile."""
        tile = w * self.own + i
        return tile, tile // self.half.d_split, tile * (self.layout.tile_rows * 2)

    @cute.jit
    def finish(self, i, place, unit_at, stages, block, first: cutlass.Constexpr, sums, lane):
        """Outputs of eight tokens for the rows of a tile, from S0 C^T: into the rows of z."""
        k, n = place[:2]
        units, here, _ = unit_at
        layout = self.layout
        raw, (_, _, factors) = block
        p, g = lane % 4, lane // 4
        tile, h, offset = self.tile_offset(i, stages[3])
        record = units + (here + layout.records + h * layout.record)
        last = k + n - 1
        # e^{c_{k+t}} of this lane's two columns
        columns = [cutlass.min(k + (first + 2 * p + c), last) for c in range(2)]
        scale = [power_of_two(self.load_float(record + t * 8)) * f for t, f in zip(columns, factors)]
        diagonal = k + (first + g)
        skip = self.load_float(record + layout.skip) if const_expr(self.spec.D_dtype is not None) else None
        decays = (record, self.load_float(record + cutlass.min(diagonal, last) * 8), diagonal, skip)
        scales = units + (here + layout.scales + tile * (layout.tile_rows * 4) + g * 4)
        for block_row in cutlass.range_constexpr(self.tile.blocks):
            c = sums[block_row]
            if const_expr(self.tile.scaled):
                low, high = (self.load_float(scales + (block_row * ROWS * 4 + r * 32)) for r in range(2))
                c = [c[0] * low, c[1] * low, c[2] * high, c[3] * high]
            sums[block_row] = [c[0] * scale[0], c[1] * scale[1], c[2] * scale[0], c[3] * scale[1]]
        end = k + cutlass.min(n, first + TOKENS)
        of_state, x = sums, (units, here + layout.x, offset)
        sums = self.add_history(x, end, end, decays, raw, of_state, lane)
        if const_expr(first + 1 < self.spec.tokens):
            # zero times what is not finite is NaN: the first token's sums show it in x of any later one
            if math.any_nan([value for c in sums for value in c[::2]]):
                sums = self.add_history_by_token(x, k + first, end, decays, raw, of_state, lane)
        self.store_outputs(units, here, n, first, offset, sums, lane)

    @cute.jit
    def add_history(self, x, count, end, decays, raw, sums, lane):
        """sums + x^T CB^T of the positions below `end`, where x is zero from position `count` on."""
        for step in cutlass.range_constexpr(len(raw)):
            if const_expr(step == 0):
                sums = self.add_positions(x, count, step, decays, raw, sums, lane)
            elif end > step * STEP:
                sums = self.add_positions(x, count, step, decays, raw, sums, lane)
        return sums

    def add_positions(self, x, count, step, decays, raw, sums, lane):
        """sums + x^T CB^T of 16 positions."""
        units, rows, offset = x
        at = self.x_words(units, rows, count, step * STEP, offset, lane)
        parts = self.tokens.coefficients(self.scaled_products(decays, raw[step], step, lane))
        return [self.tokens.multiply(mma.load_matrices(at + m * 32, 4), parts, c) for m, c in enumerate(sums)]

    @cute.jit
    def add_history_by_token(self, x, first, end, decays, raw, sums, lane):
        """`add_history` with each token's x, from position `first` on, kept from the tokens before it.

        A token gets the bits that it has where x of the later ones is finite.
        """
        lane = memory.pinned(lane)  # opaque: nothing of this is computed, or kept, for what is finite
        results = sums
        for j in cutlass.range(first, end, unroll=1):
            alone = self.add_history(x, j + 1, end, decays, raw, sums, lane)
            column = j - first - 2 * (lane % 4)  # of the lane's two
            results = [
                [cutlass.select_(column == e % 2, new, old) for e, (new, old) in enumerate(zip(*both))]
                for both in zip(alone, results)
            ]
        return results

    @cute.jit
    def scaled_products(self, decays, raw, step: cutlass.Constexpr, lane):
        """This lane's four of CB^T at a step: of token ``lane // 4`` of the block, D included.

        `raw` are the products, and 1 where a position is that of the token, else 0.
        """
        record, c_t, diagonal, skip = decays
        raw, new = raw
        p = lane % 4
        f = self.load_decays(record, step, p)
        values = [Float32(0.0)] * 4
        for e in cutlass.range_constexpr(4):
            j = step * STEP + 2 * p + (e % 2 + e // 2 * 8)
            value = raw[e] * (power_of_two(c_t - f[2 * e]) * f[2 * e + 1])
            value = value if j <= diagonal else Float32(0.0)
            if const_expr(skip is not None):
                value = cute.math.fma(new[e], skip, value)
            values[e] = value
        return values

    @staticmethod
    def load_decays(record, step, p):
        """(sum, dt') of positions 2 p, 2 p + 1, 2 p + 8, 2 p + 9 of a step."""
        at = cute.recast_ptr(record + (step * STEP * 8 + p * 16), dtype=Float32)
        return memory.load(at, Float32, 4, 16) + memory.load(at + 16, Float32, 4, 16)

    @cute.jit
    def store_outputs(self, units, here, n, first: cutlass.Constexpr, offset, sums, lane):
        """Gate, round, and put outputs in place of z; rows past n hold nothing."""
        layout, dtype = self.layout, self.owner.input_dtype
        rows = here + layout.z
        matrix = lane // 8 * 16 + offset
        to = units + (rows + (first + lane % 8) * layout.x_pitch + matrix)
        gates = units + (rows + cutlass.min(first + lane % 8, n - 1) * layout.x_pitch + matrix)
        words = []
        for m in cutlass.range_constexpr(0, self.tile.blocks, 2):
            count = min(2, self.tile.blocks - m)
            z = mma.load_matrices(gates + m * 32, 2 * count) if const_expr(self.spec.has_z) else None
            for part in cutlass.range_constexpr(2 * count):
                c = sums[m + part // 2][part % 2 * 2 : part % 2 * 2 + 2]
                if const_expr(self.spec.has_z):
                    c = [v * fast_silu(gate) for v, gate in zip(c, convert.unpack([z[part]], dtype))]
                words += convert.pack(c, dtype)
        cute.arch.sync_warp()  # rows of z were read by other lanes
        for m in cutlass.range_constexpr(0, self.tile.blocks, 2):
            mma.store_matrices(to + m * 32, words[2 * m : 2 * m + 4])

    @staticmethod
    def load_float(at):
        return memory.load_scalar(cute.recast_ptr(at, dtype=Float32), Float32)

    # ------------------------------------------------------------------------------------------------------- new state
    def history_columns(self, place, unit_at, lane):
        """B of the history as operands for all tiles of a unit, or the addresses to read them from for each."""
        k = place[0]
        units, here, _ = unit_at
        steps = []
        for step in range(self.history_steps):
            rows = []
            for j in self.tile.history_rows(step * STEP, lane):
                at = here + self.layout.b + j * self.layout.column_pitch
                rows.append(units + cutlass.select_(j < k, at, Int32(self.zero_column)))
            steps.append(rows)
        if not self.holds:
            return steps
        return [[self.tile.history_operand(rows, quad, lane) for quad in range(self.tile.quads)] for rows in steps]

    def columns_of(self, history, step, quad, lane):
        return history[step][quad] if self.holds else self.tile.history_operand(history[step], quad, lane)

    @cute.jit
    def fold(self, i, place, unit_at, stages, at, history, state_scale, random, lane):
        """Replace a tile by the state after the history, rounded: accumulated on the decayed old one."""
        k, _, slot, head, column, _ = place
        units, here, _ = unit_at
        layout = self.layout
        tile, h, offset = self.tile_offset(i, stages[3])
        g = lane // 4
        record = units + (here + layout.records + h * layout.record)
        decay = power_of_two(self.load_float(record + layout.base))
        weights = [self.weights(record, step, k, lane) for step in range(self.history_steps)]
        x_at = [
            self.x_words(units, here + layout.x, k, step * STEP, offset, lane) for step in range(self.history_steps)
        ]
        scales = units + (here + layout.scales + tile * (layout.tile_rows * 4) + g * 4)
        first_row = column + tile % self.half.d_split * layout.tile_rows
        if const_expr(self.random_rows):
            first_row = memory.pinned(first_row)  # opaque: addresses and counters of rows are not kept for all tiles
        identity = self.tile.identity(decay, lane)
        for m in cutlass.range_constexpr(self.tile.blocks):
            if const_expr(self.random_rows and m > 0):
                cute.arch.sync_warp()  # else ptxas begins the next rows before these are stored, and spills
            unit, inverse = None, None
            if const_expr(self.tile.scaled):
                # sums in units of the old scale, decayed: old elements are integers, or float8, and stay what they are
                unit = [self.load_float(scales + (m * ROWS * 4 + r * 32)) * decay for r in range(2)]
                unit = [math.larger(value, Float32(SMALLEST_UNIT)) for value in unit]
                inverse = [math.reciprocal(value) for value in unit]
            x = [
                self.tokens.weigh(mma.load_matrices(x_at[step] + m * 32, 4), weights[step], inverse, self.parts)
                for step in range(self.history_steps)
            ]
            row = first_row + (m * ROWS + g)
            self.fold_rows(at, m, row, x, history, identity, unit, k, (slot, head + h), state_scale, random, lane)

    def fold_rows(self, at, m, row, x, history, identity, unit, k, owner, state_scale, random, lane):
        """The new state of 16 rows.  Quantised rows are computed before the first of their elements is rounded, and
        again where registers cannot hold them."""
        quads = range(self.tile.quads)
        if not self.tile.scaled:
            bits = []
            for first in range(0, self.tile.quads, IN_FLIGHT):  # loads do not pass stores: products overlap before one
                some = quads[first : first + IN_FLIGHT]
                results = [self.new_quad(at, m, quad, x, history, identity, k, lane) for quad in some]
                for quad, result in zip(some, results):
                    bits = self.put_quad(at, m, quad, row, result, None, owner, random, bits, lane)
            return
        bits = []
        if random is not None:  # drawn first, by keys that are made here: while sums grow, registers are short
            keys = philox.round_keys(memory.pinned(random), self.tile.rounds)
            for quad in range(0, self.tile.quads, self.tile.per_draw):
                bits += self.tile.draw(keys, philox.row_counter(*owner, 0), row, quad, lane)
        largest, results = [None, None], []
        for quad in quads:
            result = self.new_quad(at, m, quad, x, history, identity, k, lane)
            for r in range(2):
                values = [value for c in result for value in c[2 * r : 2 * r + 2]]
                largest[r] = convert.max_abs(values, self.tile.arch, largest[r])
            results.append(result if self.spec.dstate <= HELD_COLUMNS else None)
        for distance in (1, 2):
            largest = [math.larger(value, math.exchanged(value, distance)) for value in largest]
        encode = []
        for r in range(2):
            scale, factor = convert.row_scale(largest[r], self.tile.dtype)
            scale = math.larger(scale * unit[r], Float32(convert.SMALLEST_SCALE))
            self.store_scale(memory.address(state_scale, owner[0], owner[1], row + 8 * r), scale, lane)
            encode.append(factor)
        for quad, result in zip(quads, results):
            result = result or self.new_quad(at, m, quad, x, history, identity, k, lane)
            bits = self.put_quad(at, m, quad, row, result, encode, owner, None, bits, lane)

    @cute.jit
    def store_scale(self, pointer, scale, lane):
        if lane % 4 == 0:
            memory.store_scalar(pointer, scale, Float32)

    def new_quad(self, at, m, quad, x, history, identity, k, lane):
        """A quad's accumulators: the old state and the weighed history.  A float32 state is added to the history last,
        as every sum rounds what it adds to."""
        words = mma.load_matrices(self.tile.quad_at(at, quad, m), 4, transposed=False)
        last = self.tile.dtype is Float32
        sums = [[Float32(0.0)] * 4] if last else self.tile.accumulators(words, identity)
        for step in range(self.history_steps):
            if step == 0:
                sums = self.accumulate(x, history, step, quad, sums, lane)
            else:
                sums = self.accumulate_if(x, history, step, quad, sums, k, lane)
        return self.tile.decayed(words, identity, sums) if last else sums

    def accumulate(self, x, history, step, quad, sums, lane):
        columns = self.columns_of(history, step, quad, lane)
        return [self.tokens.accumulate(x[step], b, c) for b, c in zip(columns, sums)]

    @cute.jit
    def accumulate_if(self, x, history, step: cutlass.Constexpr, quad: cutlass.Constexpr, sums, k, lane):
        if k > step * STEP:
            sums = self.accumulate(x, history, step, quad, sums, lane)
        return sums

    def put_quad(self, at, m, quad, row, results, encode, owner, random, bits, lane):
        """Round a quad's accumulators into the tile; returns the random bits that are left of `bits`."""
        if random is not None:
            bits = bits or self.tile.draw(random, philox.row_counter(*owner, 0), row, quad, lane)
        words = self.tile.words(results, encode, bits[0] if bits else None)
        mma.store_matrices(self.tile.quad_at(at, quad, m), words, transposed=False)
        return bits[1:]

    @cute.jit
    def weights(self, record, step: cutlass.Constexpr, k, lane):
        """e^{c_{k-1} - c_j} dt'_j of the lane's four positions of a step of the history, by `Prep.count_back`."""
        values = [Float32(0.0)] * 4
        if const_expr(step == 0):
            values = self.load_weights(record, step, lane)
        elif k > step * STEP:
            values = self.load_weights(record, step, lane)
        return values

    def load_weights(self, record, step, lane):
        """Those of positions 2 p, 2 p + 1, 2 p + 8, 2 p + 9 of a step."""
        at = cute.recast_ptr(record + (self.layout.weights + step * STEP * 4 + lane % 4 * 8), dtype=Float32)
        return memory.load(at, Float32, 2, 8) + memory.load(at + 8, Float32, 2, 8)

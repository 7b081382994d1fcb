"""`Prep`: what is computed once for a unit of `CheckpointingSSU`: dt', its running sums, and the appended history.

Half a warp works on 16 positions of one head, history first and then new tokens; two heads at once.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory
from cute_ssm.device.math import LOG2E, fast_softplus, power_of_two
from cute_ssm.ops.checkpointing_ssu.config import STEP


class Prep:
    """The prep warp of a kernel (`checkpointing_ssu.Steps`), or that part of its producer."""

    def __init__(self, owner):
        self.owner, self.spec, self.layout, self.history = owner, owner.spec, owner.layout, owner.history

    @cute.jit
    def announce(self, place, at, bar, lane):
        """Tell consumers what a unit is, after its decays."""
        b, start, n, slot, _, k, head, column, tile, live = place
        if lane == 0:
            meta = cute.recast_ptr(at + self.layout.meta, dtype=Int32)
            memory.store_words(meta, [k if live else Int32(-1), n, b, start])
            memory.store_words(meta + 4, [Int32(slot), head, column, tile])
        cute.arch.sync_warp()
        if lane == 0:
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def append_tokens(self, place, history, at, bar, phase, lane):
        """Append a unit's tokens once they are there."""
        if place[9]:
            cute.arch.mbarrier_wait(bar, phase)
            self.append(place, history, at, lane)

    @cute.jit
    def decays(self, place, history, rates, words, at, lane):
        """Records of all heads of a unit: two heads at once, half a warp each, 16 positions at a time.

        `words` are those that `fetch` has for the first 16.
        """
        n, k = place[2], place[5]
        pairs = -(-self.layout.heads // 2)
        total, fresh = [Float32(0.0)] * pairs, [Float32(0.0)] * pairs
        for base in cutlass.range_constexpr(0, self.layout.rows, STEP):
            if const_expr(base == 0):
                total, fresh = self.decay_block(place, history, words, at, lane, base, total, fresh)
            elif k + n > base:
                more = self.fetch(place, history, rates, base, lane)
                total, fresh = self.decay_block(place, history, more, at, lane, base, total, fresh)
        if const_expr(self.owner.half.part != "keep"):
            if k > 0 and k + n > self.spec.window:
                self.count_back(place, words[2], at, lane)

    @cute.jit
    def count_back(self, place, rates, at, lane):
        """Weights of the history in the state that a unit writes, and the exponent of the old state's decay.

        Exponents are sums from the last pending token on: differences of long running sums lose places where strong
        decays came first.  Running sums stay as they are, so that outputs have the bits of a step that keeps its state.
        """
        k, layout = place[5], self.layout
        cute.arch.sync_warp()  # other lanes stored dt' of the next positions
        rates = self.floats(rates, self.spec.A_dtype)
        j, side = lane % 16, lane // 16
        records, carry = [], []
        for i in cutlass.range_constexpr(len(rates)):
            h = 2 * i + side if const_expr(2 * i + 1 < layout.heads) else Int32(2 * i)
            records.append(cute.recast_ptr(at + (layout.records + h * layout.record), dtype=Float32))
            carry.append(Float32(0.0))
        for block in cutlass.range_constexpr(-(-self.spec.window // STEP)):
            base = (-(-self.spec.window // STEP) - 1 - block) * STEP
            if k > base:
                for i in cutlass.range_constexpr(len(rates)):
                    later = base + j + 1
                    step = memory.load_scalar(records[i] + (2 * cutlass.min(later, k - 1) + 1), Float32)
                    sums = carry[i] + math.remaining_sum(rates[i] * step if later < k else Float32(0.0))
                    carry[i] = cute.arch.shuffle_sync(sums, lane & 16)
                    own = memory.load_scalar(records[i] + (2 * cutlass.min(base + j, k - 1) + 1), Float32)
                    weight = power_of_two(sums * LOG2E) * own if later <= k else Float32(0.0)
                    if side == 0 or const_expr(2 * i + 1 < layout.heads):
                        memory.store_scalar(records[i] + (layout.weights // 4 + base + j), weight, Float32)
        for i in cutlass.range_constexpr(len(rates)):
            step = memory.load_scalar(records[i] + 1, Float32)
            if j == 0 and (side == 0 or const_expr(2 * i + 1 < layout.heads)):
                memory.store_scalar(records[i] + layout.base // 4, (carry[i] + rates[i] * step) * LOG2E, Float32)

    @cute.jit
    def positions(self, place, base: cutlass.Constexpr, lane):
        """(position of a lane, its half of the warp, whether it is old, or new, its token) of 16 from `base` on."""
        n, k = place[2], place[5]
        j = base + lane % 16
        return j, lane // 16, j < k, j >= k and j < k + n, cutlass.max(cutlass.min(j - k, n - 1), 0)

    @cute.jit
    def fetch(self, place, history, rates, base: cutlass.Constexpr, lane):
        """What decays at 16 positions are computed from, for each pair of heads, as words that nothing waits for."""
        b, start, _, slot, cursor, _, head, _, _, _ = place
        dt_cache, spec = history[2], self.spec
        dt, A, dt_bias, D = rates
        j, side, is_old, _, t = self.positions(place, base, lane)
        first = head + (side if const_expr(self.layout.heads > 1) else 0)
        old = self.history.old(cursor, j, self.history.capacity(dt_cache))
        cached = self.history.dt(dt_cache, slot, old, first)
        seen = [Int32(0)] * -(-self.layout.heads // 2)
        if is_old:  # nothing is read that another CTA may write
            seen = self.load_pairs(cached, dt_cache.stride[self.history.dt_heads], "float32", side)
        given = self.load_pairs(self.owner.token(dt, b, start, t, first, 0), dt.stride[2], spec.dt_dtype, side)
        rates = self.load_pairs(memory.address(A, first, 0, 0), A.stride[0], spec.A_dtype, side)
        biases, skips = None, None
        if const_expr(dt_bias is not None):
            biases = self.load_pairs(memory.address(dt_bias, first, 0), dt_bias.stride[0], spec.dt_bias_dtype, side)
        if const_expr(D is not None and base == 0):
            skips = self.load_pairs(memory.address(D, first, 0), D.stride[0], spec.D_dtype, side)
        return seen, given, rates, biases, skips

    def load_pairs(self, first, stride, kind, side):
        """Elements for all pairs of heads, from the address for the first: heads are `stride` elements apart."""
        heads, pointers = self.layout.heads, [first]
        for _ in range(1, -(-heads // 2)):
            pointers.append(pointers[-1] + 2 * stride)
        if heads > 1 and heads % 2:
            pointers[-1] = pointers[-1] - side * stride  # the last head has no other beside it
        return [memory.load_words(pointer, 1, convert.DTYPES[kind].width)[0] for pointer in pointers]

    @staticmethod
    def floats(words, kind):
        return [convert.widen(word, convert.DTYPES[kind]) for word in words]

    @cute.jit
    def decay_block(self, place, history, words, at, lane, base: cutlass.Constexpr, total, fresh):
        """The records of 16 positions, given the sums before them: over all positions, and over new tokens alone."""
        _, _, n, slot, cursor, k, head, column, _, _ = place
        _, _, dt_cache, sum_cache = history
        spec, layout = self.spec, self.layout
        j, side, is_old, is_new, t = self.positions(place, base, lane)
        write = k + n > spec.window
        new = self.history.new(cursor, k, t, write, self.history.capacity(dt_cache))
        kept = is_new and t < self.history.kept(spec) and column == 0  # the first part of a head speaks for all
        heads = [2 * i + side if 2 * i + 1 < layout.heads else Int32(2 * i) for i in range(len(total))]
        seen, given, rates, biases, skips = words
        seen, given = self.floats(seen, "float32"), self.floats(given, spec.dt_dtype)
        rates = self.floats(rates, spec.A_dtype)
        if const_expr(biases is not None):
            given = [v + bias for v, bias in zip(given, self.floats(biases, spec.dt_bias_dtype))]
        taken, sums = [], []
        for i in cutlass.range_constexpr(len(heads)):
            step = fast_softplus(given[i]) if const_expr(spec.dt_softplus) else given[i]
            step = step if is_new else Float32(0.0)
            step = seen[i] if is_old else step
            taken.append(step)
            sums.append(total[i] + math.running_sum(rates[i] * step))
            total[i] = cute.arch.shuffle_sync(sums[i], lane | 15)
        stored = list(sums)
        if const_expr(not self.history.ring and self.owner.half.part != "keep"):
            if write:  # sums of a buffer that a step begins start from zero
                for i in cutlass.range_constexpr(len(heads)):
                    step = taken[i] if is_new else Float32(0.0)
                    stored[i] = fresh[i] + math.running_sum(rates[i] * step)
                    fresh[i] = cute.arch.shuffle_sync(stored[i], lane | 15)
        for i in cutlass.range_constexpr(len(heads)):
            if side == 0 or const_expr(2 * i + 1 < layout.heads):
                record = cute.recast_ptr(at + (layout.records + heads[i] * layout.record + j * 8), dtype=Float32)
                memory.store(record, [sums[i] * LOG2E, taken[i]], Float32, 8)
                if const_expr(skips is not None):
                    if j == 0:
                        skip = self.floats([skips[i]], spec.D_dtype)[0]
                        memory.store_scalar(record + layout.skip // 4, skip, Float32)
                if kept:
                    memory.store_scalar(self.history.dt(dt_cache, slot, new, head + heads[i]), taken[i], Float32)
                    if const_expr(not self.history.ring):
                        memory.store_scalar(self.history.dt(sum_cache, slot, new, head + heads[i]), stored[i], Float32)
        return total, fresh

    @cute.jit
    def append(self, place, history, at, lane):
        """Copy new rows of x, and of B once per group, to the history: half a warp each."""
        _, _, n, slot, cursor, k, head, column, _, _ = place
        x_cache, B_cache, dt_cache, _ = history
        spec, layout = self.spec, self.layout
        rows = self.history.capacity(dt_cache)
        write = k + n > spec.window
        leader = head % self.owner.per_group == 0 and column == 0
        for base in cutlass.range_constexpr(0, self.history.kept(spec), WARP // 2):
            t = base + lane % 16
            new = self.history.new(cursor, k, t, write, rows)
            if t < n and t < self.history.kept(spec):
                if lane < 16:
                    source = at + (layout.x + (k + t) * layout.x_pitch)
                    if const_expr(self.history.ring):
                        piece = self.owner.head_width * 2
                        for h in cutlass.range_constexpr(layout.heads):
                            to = self.history.x(x_cache, slot, new, head + h, column).toint()
                            memory.bulk_store(memory.global_bytes(to), source + h * piece, piece)
                    else:
                        to = self.history.x(x_cache, slot, new, head, column).toint()
                        memory.bulk_store(memory.global_bytes(to), source, layout.width)
                elif leader:
                    source = at + (layout.b + (k + t) * layout.column_pitch)
                    to = self.history.B(B_cache, slot, new, head // self.owner.per_group).toint()
                    memory.bulk_store(memory.global_bytes(to), source, spec.dstate * 2)
        cute.arch.cp_async_bulk_commit_group()

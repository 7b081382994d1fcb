"""`TokenProducts`: up to eight tokens of `SelectiveStep` at once, outputs by tensor core.

With one decay per head and token, c_t the running sum of A dt' and S0 the state before the first token:

    out_t = e^{c_t} S0 C_t + sum_{j <= t} dt'_j e^{c_t - c_j} (C_t . B_j) x_j + D x_t
    S_T   = e^{c_T} S0 + sum_j dt'_j e^{c_T - c_j} x_j B_j^T

The products of S0, C, B and x are of numbers that tf32 holds exactly (states and inputs of 16 bits); the coefficients
of x are split into two of them, and the state advances in float32.  Exponents are differences of running sums, so their
error is |c| 2^-24: with an |A dt'| of hundreds the token loop is more exact.

Fragments of m16n8k8, for lane 4 g + t: the lane keeps columns of *its own* (those of lane t of each four) of the rows
g and g + 8 of a tile of S0, and of the tokens g of B and C; a k-step takes the next two of them, in any order that
all agree on.  Accumulators hold rows g, g + 8 and tokens 2t, 2t + 1, which are also the tokens whose x the lane
keeps: x is the other product's A with its tokens ordered 0, 2, 4, 6, 1, 3, 5, 7, and C.B, whose rows are tokens g, is
its B as it is.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import math, memory
from cute_ssm.device.mma import mma_tf32, split
from cute_ssm.ops.selective_state_update.config import PRODUCT_TOKENS as TOKENS


class TokenProducts:
    """A part of `SelectiveStep`, whose helpers and view of the state it uses; `owner` is that kernel."""

    def __init__(self, owner):
        self.owner, self.view, self.spec = owner, owner.view, owner.spec

    @cute.jit
    def columns(self, tensor, b, start, count, group, lane):
        """This lane's columns of the row of B or C of token ``lane / 4``, zeros past the last token."""
        token = lane // 4
        values = self.owner.load_columns(
            self.owner.token(tensor, b, start, cutlass.min(token, count - 1), group, 0), lane
        )
        present = token < count
        return [value if present else Float32(0.0) for value in values]

    @cute.jit
    def prefix(self, dt, A, dt_bias, b, start, count, h, lane):
        """(dt', running sum of A dt') of token ``lane % 8``; past the last token dt' is zero and the sum stays."""
        token = lane % TOKENS
        step, a, _ = self.owner.load_head(dt, A, dt_bias, b, start, h, cutlass.min(token, count - 1))
        step = step if token < count else Float32(0.0)
        total = a * step
        for distance in cutlass.range_constexpr(3):
            below = cute.arch.shuffle_sync_up(total, 1 << distance, mask_and_clamp=(32 - TOKENS) << 8)
            total = total + below if token >= 1 << distance else total
        return step, total

    @cute.jit
    def stage(self, shared, values, lane):
        """Put this lane's columns of B of token ``lane / 4`` where all lanes of the same columns find them."""
        row = cute.recast_ptr(shared, dtype=Float32) + lane // 4 * self.spec.dstate
        for i in cutlass.range_constexpr(self.view.accesses):
            part = values[i * self.view.vector : (i + 1) * self.view.vector]
            memory.store(row + self.view.column(lane, i), part, Float32, 16)
        cute.arch.sync_warp()

    @cute.jit
    def prepare(self, inputs, place, count, shared, lane):
        """What all rows of a head share.

        (C; coefficients of x as two parts; decays of the lane's two tokens; factors of their x in the last state; decay
        of the state)."""
        _, dt, A, B, C, _, _, dt_bias, _, per_group = inputs
        b, start, _, h, *_ = place
        group, _ = divmod(h, per_group)
        Bv, Cv = (self.columns(tensor, b, start, count, group, lane) for tensor in (B, C))
        self.stage(shared, Bv, lane)
        step, total = self.prefix(dt, A, dt_bias, b, start, count, h, lane)
        zero = Float32(0.0)
        products = [zero] * 4
        for k in cutlass.range_constexpr(0, self.view.columns, 2):
            products = mma_tf32([Cv[k], zero, Cv[k + 1], zero], [Bv[k], Bv[k + 1]], products)
        token, last = lane // 4, math.from_lane(total, Int32(TOKENS - 1))
        here = math.from_lane(total, token)
        coefficients, decays, factors = [], [], []
        for e in cutlass.range_constexpr(2):
            j = lane % 4 * 2 + e
            step_j, total_j = math.from_lane(step, j), math.from_lane(total, j)
            value = step_j * math.decay(here - total_j) * products[e]
            coefficients.append(value if j <= token else zero)
            decays.append(math.decay(total_j))
            factors.append(step_j * math.decay(last - total_j))
        return Cv, split(coefficients), decays, factors, math.decay(last)

    @cute.jit
    def block(self, inputs, pool, place, count, prepared, target, at, shared, i, lane):
        """Outputs of a block of rows for all tokens, and its last state into shared memory."""
        x, _, _, _, _, D, z, _, out, _ = inputs
        b, start, _, h, row, slot, *_ = place
        Cv, (high, low), decays, factors, decay = prepared
        b, h = memory.pinned(Int32(b)), memory.pinned(Int32(h))
        first = row + i * self.view.block
        cell = at + i * self.view.bytes
        held = [self.view.load(cell, lane, s, None) for s in range(self.view.steps)]
        weights = []
        for tile in cutlass.range_constexpr(self.view.steps // 2):
            upper, lower = held[2 * tile], held[2 * tile + 1]
            sums = [Float32(0.0)] * 4
            for k in cutlass.range_constexpr(0, self.view.columns, 2):
                sums = mma_tf32([upper[k], lower[k], upper[k + 1], lower[k + 1]], [Cv[k], Cv[k + 1]], sums)
            sums = [value * decays[n % 2] for n, value in enumerate(sums)]
            mine = first + tile * 16 + lane // 4
            xv = self.load_inputs(x, b, start, count, h, mine, lane)
            of_state = sums
            sums = self.add_inputs(xv, (high, low), of_state)
            # zero times what is not finite is NaN: the first token's sums show it in x of any later one
            if math.any_nan(sums[::2]):
                sums = self.add_inputs_by_token(xv, (high, low), of_state, count, lane)
            self.emit(out, z, D, b, start, count, h, mine, sums, xv, lane)
            weights += [[xv[0] * factors[0], xv[1] * factors[1]], [xv[2] * factors[0], xv[3] * factors[1]]]
        if const_expr(self.owner.final):
            self.advance(pool, held, weights, decay, count, target, slot, h, first, cell, shared, lane)

    def add_inputs(self, xv, coefficients, sums):
        """sums + x times coefficients."""
        for part in coefficients:
            sums = mma_tf32([xv[0], xv[2], xv[1], xv[3]], part, sums)
        return sums

    @cute.jit
    def add_inputs_by_token(self, xv, coefficients, sums, count, lane):
        """`add_inputs` with each token's x kept from the tokens before it.

        A token gets the bits that it has where x of the later ones is finite.
        """
        lane = memory.pinned(lane)  # opaque: nothing of this is computed, or kept, for what is finite
        results = sums
        for t in cutlass.range(count, unroll=1):
            own = [lane % 4 * 2, lane % 4 * 2 + 1]  # the lane's two tokens
            known = [cutlass.select_(own[i % 2] <= t, value, Float32(0.0)) for i, value in enumerate(xv)]
            alone = self.add_inputs(known, coefficients, sums)
            results = [cutlass.select_(own[n % 2] == t, alone[n], results[n]) for n in range(4)]
        return results

    @cute.jit
    def load_inputs(self, x, b, start, count, h, row, lane):
        """x of (row, row + 8) for the lane's two tokens: row-major, zeros past the last token."""
        values = []
        for r in cutlass.range_constexpr(2):
            for e in cutlass.range_constexpr(2):
                t = lane % 4 * 2 + e
                pointer = self.owner.token(x, b, start, cutlass.min(t, count - 1), h, row + 8 * r)
                value = memory.load_scalar(pointer, self.owner.input_dtype)
                values.append(value if t < count else Float32(0.0))
        return values

    @cute.jit
    def emit(self, out, z, D, b, start, count, h, row, sums, xv, lane):
        """Store the outputs of (row, row + 8) for the lane's two tokens."""
        for e in cutlass.range_constexpr(2):
            t = lane % 4 * 2 + e
            if t < count:
                for r in cutlass.range_constexpr(2):
                    skip = self.skip(D, h, row + 8 * r, xv[2 * r + e])
                    self.owner.emit(out, z, b, start, t, h, row + 8 * r, sums[2 * r + e], skip)

    def skip(self, D, h, row, value):
        """(D, x) of an output, or None."""
        return None if D is None else (memory.load_scalar(memory.address(D, h, row), self.owner.D_dtype), value)

    @cute.jit
    def advance(self, pool, held, weights, decay, count, target, slot, h, first, cell, shared, lane):
        """The last state: decayed, plus x B^T of every token, rounded into shared memory."""
        n = self.view.columns
        state = cute.make_rmem_tensor((self.view.steps * n,), Float32)
        self.begin(state, held, decay)
        rows = cute.recast_ptr(shared, dtype=Float32)
        for pair in cutlass.range((count + 1) // 2, unroll=1):
            for e in cutlass.range_constexpr(2):
                source = lane // 4 * 4 + pair  # the lane of this row that keeps tokens 2 pair and 2 pair + 1
                gains = [math.from_lane(weights[s][e], source) for s in range(self.view.steps)]
                Bv = []
                for i in cutlass.range_constexpr(self.view.accesses):
                    pointer = rows + (pair * 2 + e) * self.spec.dstate + self.view.column(lane, i)
                    Bv += memory.load(pointer, Float32, self.view.vector, 16)
                self.accumulate(state, gains, Bv)
        random = (*self.owner.random(pool, slot, target, h, count - 1), first)
        for s in cutlass.range_constexpr(self.view.steps):
            self.view.store(cell, lane, s, [state[s * n + k] for k in range(n)], None, random)

    def begin(self, state, held, decay):
        """state <- decay held."""
        for s, row in enumerate(held):
            for k, value in enumerate(row):
                state[s * self.view.columns + k] = value * decay

    def accumulate(self, state, gains, columns):
        """state <- state + gains columns^T."""
        for s, gain in enumerate(gains):
            for k, column in enumerate(columns):
                at = s * self.view.columns + k
                state[at] = cute.math.fma(gain, column, state[at])

"""`TokenProducts`: the update of a block by up to eight tokens at once, outputs by tensor core, for `SelectiveStep`.

With one decay per head and token, c_t the running sum of A dt' and S0 the state before the first token:

    out_t = e^{c_t} S0 C_t + sum_{j <= t} dt'_j e^{c_t - c_j} (C_t . B_j) x_j + D x_t
    S_T   = e^{c_T} S0 + sum_j dt'_j e^{c_T - c_j} x_j B_j^T

The products of S0, C, B and x are of numbers that tf32 holds exactly (states and inputs of 16 bits); the coefficients
of x are split into two of them, and the state advances in float32.  Exponents are differences of running sums, so their
error is |c| 2^-24: with an |A dt'| of hundreds the token loop is more exact.

Fragments of m16n8k8, for lane 4 g + t: the lane holds columns of *its own* (those of lane t of each four) of the rows
g and g + 8 of a tile of S0, and of the tokens g of B and C; a k-step takes the next two of them.  The order along k is
arbitrary as long as all operands share it.  Accumulators hold rows g, g + 8 and tokens 2t, 2t + 1, which are also the
tokens whose x the lane holds: x is the other product's A with its tokens ordered 0, 2, 4, 6, 1, 3, 5, 7, and C.B, whose
rows are tokens g, is its B as it is.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import math, memory
from cute_ssm.device.mma import Parts, mma_tf32, split
from cute_ssm.device.state import Block, StateView
from cute_ssm.ops.selective_state_update.config import PRODUCT_TOKENS as TOKENS
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.state_stores import StateStores
from cute_ssm.ops.selective_state_update.token_io import TokenIO
from cute_ssm.ops.selective_state_update.units import Destination, Scalars, Tensors, Unit, pin


class RunningDecay(NamedTuple):
    """Scalars of token ``lane % 8``.

    Attributes
    ----------
    step : Float32
        dt'; zero past the last token.
    exponent : Float32
        Running sum of A dt', which stays the same past the last token.
    """

    step: Float32
    exponent: Float32


class HeadProducts(NamedTuple):
    """What all rows of a head share.

    Attributes
    ----------
    C : list of Float32
        The lane's columns of C of token ``lane / 4``.
    coefficients : Parts
        Coefficients of x in the outputs.
    decays, gains : list of Float32
        Decays of the state before the lane's two tokens; factors of their x in the last state.
    state_decay : Float32
        Decay of the state over all tokens.
    """

    C: list[Float32]
    coefficients: Parts
    decays: list[Float32]
    gains: list[Float32]
    state_decay: Float32


class TokenProducts:
    """Tokens of a sequence as the columns of matrix products."""

    def __init__(self, spec: SelectiveStateUpdateSpec, view: StateView, io: TokenIO, stores: StateStores) -> None:
        self.spec, self.view, self.io, self.stores = spec, view, io, stores

    # ------------------------------------------------------------------------------------------------ once for a unit
    @cute.jit
    def prepare(
        self, tensors: Tensors, scalars: Scalars, unit: Unit, shared: cute.Pointer, lane: Int32
    ) -> HeadProducts:
        """Compute what all rows of the unit's head share, and put B into `shared`."""
        group, _ = divmod(unit.head, scalars.heads_per_group)
        B, C = (self.load_columns(tensor, unit, group, lane) for tensor in (tensors.B, tensors.C))
        self.stage(shared, B, lane)
        running = self.running_decay(tensors, unit, lane)
        zero = Float32(0.0)
        products = [zero] * 4
        for k in cutlass.range_constexpr(0, self.view.columns, 2):
            products = mma_tf32([C[k], zero, C[k + 1], zero], [B[k], B[k + 1]], products)
        token, last = lane // 4, math.from_lane(running.exponent, Int32(TOKENS - 1))
        here = math.from_lane(running.exponent, token)
        coefficients, decays, gains = [], [], []
        for e in cutlass.range_constexpr(2):
            j = lane % 4 * 2 + e
            step_j, exponent_j = math.from_lane(running.step, j), math.from_lane(running.exponent, j)
            value = step_j * math.decay(here - exponent_j) * products[e]
            coefficients.append(value if j <= token else zero)
            decays.append(math.decay(exponent_j))
            gains.append(step_j * math.decay(last - exponent_j))
        return HeadProducts(C, split(coefficients), decays, gains, math.decay(last))

    @cute.jit
    def load_columns(self, tensor: cute.Tensor, unit: Unit, group: Int32, lane: Int32) -> list[Float32]:
        """Load this lane's columns of the row of B or C of token ``lane / 4``, zeros past the last token."""
        token = lane // 4
        pointer = self.io.pointer(tensor, unit, cutlass.min(token, unit.num_tokens - 1), group, 0)
        values = self.io.load_columns(pointer, lane)
        present = token < unit.num_tokens
        return [value if present else Float32(0.0) for value in values]

    @cute.jit
    def running_decay(self, tensors: Tensors, unit: Unit, lane: Int32) -> RunningDecay:
        """Sum the exponents of the tokens up to ``lane % 8``."""
        token = lane % TOKENS
        head = self.io.load_head(tensors, unit, cutlass.min(token, unit.num_tokens - 1))
        rate: Float32 = head.rate
        step = head.step if token < unit.num_tokens else Float32(0.0)
        total = rate * step
        for distance in cutlass.range_constexpr(3):
            below = cute.arch.shuffle_sync_up(total, 1 << distance, mask_and_clamp=(32 - TOKENS) << 8)
            total = total + below if token >= 1 << distance else total
        return RunningDecay(step, total)

    @cute.jit
    def stage(self, shared: cute.Pointer, values: list[Float32], lane: Int32) -> None:
        """Store this lane's columns of B of token ``lane / 4`` for all lanes that hold the same columns."""
        row = cute.recast_ptr(shared, dtype=Float32) + lane // 4 * self.spec.dstate
        for i in cutlass.range_constexpr(self.view.accesses):
            part = values[i * self.view.vector : (i + 1) * self.view.vector]
            memory.store(row + self.view.column(lane, i), part, Float32, 16)
        cute.arch.sync_warp()

    # ----------------------------------------------------------------------------------------------- once for a block
    @cute.jit
    def update_block(
        self,
        tensors: Tensors,
        unit: Unit,
        prepared: HeadProducts,
        destination: Destination,
        at: cute.Pointer,
        shared: cute.Pointer,
        i: Int32,
        lane: Int32,
    ) -> None:
        """Compute the outputs of block `i` of the unit at `at` for all tokens, and its last state, in place."""
        unit = pin(unit)
        block = self.view.block_of(unit.first_row, at, i, lane)
        held = [self.view.load(block.at, lane, s, None) for s in range(self.view.steps)]
        C, weights = prepared.C, []
        for tile in cutlass.range_constexpr(self.view.steps // 2):
            upper, lower = held[2 * tile], held[2 * tile + 1]
            sums = [Float32(0.0)] * 4
            for k in cutlass.range_constexpr(0, self.view.columns, 2):
                sums = mma_tf32([upper[k], lower[k], upper[k + 1], lower[k + 1]], [C[k], C[k + 1]], sums)
            sums = [value * prepared.decays[n % 2] for n, value in enumerate(sums)]
            row = block.first_row + tile * 16 + lane // 4
            x = self.load_inputs(tensors, unit, row, lane)
            of_state = sums
            sums = self.add_inputs(x, prepared.coefficients, of_state)
            # zero times what is not finite is NaN: the first token's sums show it in x of any later one
            if math.any_nan(sums[::2]):
                sums = self.add_inputs_by_token(x, prepared.coefficients, of_state, unit.num_tokens, lane)
            self.store_outputs(tensors, unit, row, sums, x, lane)
            gains = prepared.gains
            weights += [[x[0] * gains[0], x[1] * gains[1]], [x[2] * gains[0], x[3] * gains[1]]]
        if const_expr(self.spec.writes_last_state):
            self.advance(tensors, unit, destination, block, held, weights, prepared.state_decay, shared, lane)

    def add_inputs(self, x: list[Float32], coefficients: Parts, sums: list[Float32]) -> list[Float32]:
        """Return sums + x times coefficients."""
        for part in coefficients:
            sums = mma_tf32([x[0], x[2], x[1], x[3]], part, sums)
        return sums

    @cute.jit
    def add_inputs_by_token(
        self, x: list[Float32], coefficients: Parts, sums: list[Float32], count: Int32, lane: Int32
    ) -> list[Float32]:
        """`add_inputs`, with x of later tokens left out of each token's sum.

        A token gets the bits that it has where x of the later ones is finite.
        """
        lane = memory.pinned(lane)  # the compiler does not hoist what depends on it out of the branch
        results = sums
        for t in cutlass.range(count, unroll=1):
            lane_tokens = [lane % 4 * 2, lane % 4 * 2 + 1]
            earlier = [cutlass.select_(lane_tokens[i % 2] <= t, value, Float32(0.0)) for i, value in enumerate(x)]
            alone = self.add_inputs(earlier, coefficients, sums)
            results = [cutlass.select_(lane_tokens[n % 2] == t, alone[n], results[n]) for n in range(4)]
        return results

    @cute.jit
    def load_inputs(self, tensors: Tensors, unit: Unit, row: Int32, lane: Int32) -> list[Float32]:
        """Load x of (row, row + 8) for the lane's two tokens: row-major, zeros past the last token."""
        values = []
        for r in cutlass.range_constexpr(2):
            for e in cutlass.range_constexpr(2):
                t = lane % 4 * 2 + e
                token = cutlass.min(t, unit.num_tokens - 1)
                pointer = self.io.pointer(tensors.x, unit, token, unit.head, row + 8 * r)
                value = memory.load_scalar(pointer, self.io.input_dtype)
                values.append(value if t < unit.num_tokens else Float32(0.0))
        return values

    @cute.jit
    def store_outputs(
        self, tensors: Tensors, unit: Unit, row: Int32, sums: list[Float32], x: list[Float32], lane: Int32
    ) -> None:
        """Store the outputs of (row, row + 8) for the lane's two tokens."""
        for e in cutlass.range_constexpr(2):
            t = lane % 4 * 2 + e
            if t < unit.num_tokens:
                for r in cutlass.range_constexpr(2):
                    skip = self.io.load_skip(tensors, unit, row + 8 * r, x[2 * r + e])
                    self.io.store_output(tensors, unit, t, row + 8 * r, sums[2 * r + e], skip)

    # ------------------------------------------------------------------------------------------------- the last state
    @cute.jit
    def advance(
        self,
        tensors: Tensors,
        unit: Unit,
        destination: Destination,
        block: Block,
        held: list[list[Float32]],
        weights: list[list[Float32]],
        decay: Float32,
        shared: cute.Pointer,
        lane: Int32,
    ) -> None:
        """Round the last state into shared memory: `held`, decayed, plus x B^T of every token."""
        n, count = self.view.columns, unit.num_tokens
        state = cute.make_rmem_tensor((self.view.steps * n,), Float32)
        self.begin(state, held, decay)
        rows = cute.recast_ptr(shared, dtype=Float32)
        for pair in cutlass.range((count + 1) // 2, unroll=1):
            for e in cutlass.range_constexpr(2):
                source = lane // 4 * 4 + pair  # the lane of this row that holds tokens 2 pair and 2 pair + 1
                gains = [math.from_lane(weights[s][e], source) for s in range(self.view.steps)]
                B: list[Float32] = []
                for i in cutlass.range_constexpr(self.view.accesses):
                    pointer = rows + (pair * 2 + e) * self.spec.dstate + self.view.column(lane, i)
                    B += memory.load(pointer, Float32, self.view.vector, 16)
                self.accumulate(state, gains, B)
        random = self.stores.random(tensors, unit, destination.slot, count - 1)
        for s in cutlass.range_constexpr(self.view.steps):
            self.view.store(block, lane, s, [state[s * n + k] for k in range(n)], None, random)

    def begin(self, state: cute.Tensor, held: list[list[Float32]], decay: Float32) -> None:
        """state <- decay held."""
        for s, row in enumerate(held):
            for k, value in enumerate(row):
                state[s * self.view.columns + k] = value * decay

    def accumulate(self, state: cute.Tensor, gains: list[Float32], columns: list[Float32]) -> None:
        """state <- state + gains columns^T."""
        for s, gain in enumerate(gains):
            for k, column in enumerate(columns):
                at = s * self.view.columns + k
                state[at] = cute.math.fma(gain, column, state[at])

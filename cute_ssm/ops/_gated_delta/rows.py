"""`GatedDeltaRows`: how kernels of the gated delta rule move states, keys, values and outputs.

All bring keys and values to shared memory by the whole CTA, and states to registers by the warp that owns the rows.
The layouts are those of `kernels.gated_delta_rule`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, memory, mma
from cute_ssm.device.fakes import fake
from cute_ssm.ops._gated_delta.coefficients import BLOCK, TokenChunk, row_of
from cute_ssm.ops._gated_delta.config import KEY_PAD, VALUE_PAD, GatedDeltaRuleConfig, chunk_tokens

KEY_BYTES = 8  # of an access to a row of keys, where they are aligned
VALUE_BYTES = 16


class GatedDeltaRows:
    """Base of the kernels; `self.chunk` holds the tokens that have outputs."""

    def __init__(self, spec, config: GatedDeltaRuleConfig, arch: Arch):
        config.check(spec, arch)
        self.spec, self.config = spec, config
        self.state_dtype = convert.DTYPES[spec.state_dtype]
        self.input_dtype = convert.DTYPES[spec.input_dtype]
        self.output_dtype = convert.DTYPES[spec.output_dtype]
        self.gate_dtype = convert.DTYPES[spec.gate_dtype]
        self.dt_bias_dtype = convert.DTYPES[spec.dt_bias_dtype]
        self.chunk = TokenChunk(chunk_tokens(spec), spec.K, spec.l2norm)
        self.blocks = spec.K // BLOCK
        self.key_pitch = spec.K + KEY_PAD
        self.value_pitch = config.rows + VALUE_PAD
        self.tiles = config.tiles()
        self.threads = WARP * config.warps
        self.key_bytes = min(KEY_BYTES, spec.input_bytes)  # of an access to q or k
        self.value_bytes = spec.input_bytes

    def input_fakes(self, keys, values):
        """q, k and v as the compiler sees them."""
        row = fake(self.input_dtype, keys, (1,), self.key_bytes // 2)
        other = fake(self.input_dtype, keys, (1,), self.key_bytes // 2)
        return row, other, fake(self.input_dtype, values, (1,), self.value_bytes // 2)

    # ---------------------------------------------------------------------------------------------------------- states
    def corner(self, tensor, place, row, lane):
        """Pointers to this lane's columns of the first block, in its two rows of a tile."""
        r, c = row + lane // 4, lane % 4 * 4
        return [memory.address(tensor, *place, r + half, c) for half in (0, 8)]

    def load_block(self, corner, j):
        """Words of both rows of block j."""
        n_bytes = 4 * self.state_dtype.width // 8
        bits = convert.word_bits(self.state_dtype, n_bytes)
        return [memory.load_words(p + BLOCK * j, n_bytes * 8 // bits, bits) for p in corner]

    def store_block(self, corner, j, rows):
        """Both rows' floats of block j, rounded to nearest even."""
        n_bytes = 4 * self.state_dtype.width // 8
        for pointer, values in zip(corner, rows):
            memory.store(pointer + BLOCK * j, values, self.state_dtype, n_bytes, self.spec.saturate)

    def load_tile(self, corner):
        return [self.load_block(corner, j) for j in range(self.blocks)]

    def widen(self, words):
        """Four elements of a state as words of float32."""
        return convert.pack(convert.unpack(words, self.state_dtype), Float32)

    # ------------------------------------------------------------------------------------------------- keys and values
    def stage_keys(self, source, rows, live, target, thread, used=None, access=None):
        """Rows of keys or queries as float32, zeros from row `live` on; `source(row, column)` is where one lies.

        Rows from `used` on, if given, stay as they are.  `access`: bytes of a load, if they are no inputs.
        """
        per_row = self.spec.K // 4
        count = rows * per_row
        for step in range(-(-count // self.threads)):
            piece = thread + step * self.threads
            row, column = piece // per_row, piece % per_row * 4
            at = target + (row * self.key_pitch + column)
            some = piece < count if used is None else row < used
            self.stage_key(source(row, column), at, some, row < live, access or self.key_bytes)

    @cute.jit
    def stage_key(self, source, target, some, live, access: cutlass.Constexpr):
        """Four elements."""
        if some:
            values = [Float32(0.0)] * 4
            if live:
                values = memory.load(source, self.input_dtype, 4, access)
            memory.store(target, values, Float32, 16)

    @cute.jit
    def clear_row(self, target, thread):
        """A row of zeros, as long as a key."""
        for step in cutlass.range_constexpr(-(-self.spec.K // (4 * self.threads))):
            column = (thread + step * self.threads) * 4
            if column < self.spec.K:
                memory.store(target + column, [Float32(0.0)] * 4, Float32, 16)

    def stage_values(self, source, rows, live, target, thread, used=None, access=None):
        """This CTA's columns of values as they are; like `stage_keys`."""
        per_row = self.config.rows // 8
        count = rows * per_row
        for step in range(-(-count // self.threads)):
            piece = thread + step * self.threads
            row, column = piece // per_row, piece % per_row * 8
            at = target + (row * self.value_pitch + column) * 2
            some = piece < count if used is None else row < used
            self.stage_value(source(row, column), at, some, row < live, access or self.value_bytes)

    @cute.jit
    def stage_value(self, source, target, some, live, access: cutlass.Constexpr):
        """Eight elements."""
        if some:
            words = [Int32(0)] * 4
            if live:
                words = memory.load_packed(source, 4, access)
            memory.store_words(target, words)

    def value_rows(self, values, column, lane, group, available):
        """Where this lane's row of the transposed matrices lies: 8 tokens by 16 columns of values."""
        row = row_of(lane & 7) & (available - 1)
        return values + ((8 * group + row) * self.value_pitch + column + (lane >> 3 & 1) * 8) * 2

    def load_values(self, values, column, chunk, lane):
        """Values of this lane's rows and the tokens of a chunk, in the order of products; one list of 4 per group."""
        result = []
        for group in range(chunk.key_groups):
            words = mma.load_matrices(self.value_rows(values, column, lane, group, min(chunk.tokens, 8)), 2)
            result.append(convert.unpack(words, self.input_dtype))
        return result

    # --------------------------------------------------------------------------------------------------------- outputs
    @cute.jit
    def emit(self, out, O, U, place, values, column, tokens, lane):
        """Outputs of a tile: to shared memory in place of values, or straight to their place."""
        i, h, row = place
        if const_expr(self.spec.vector_output):
            cute.arch.sync_warp()
            for n in cutlass.range_constexpr(self.chunk.key_groups):
                pairs = O[n]
                if const_expr(self.chunk.shared_group):  # rows 0 to 3 of the group take what no one reads
                    pairs = [U[0][0], O[0][0], U[0][1], O[0][1]]
                words = convert.pack(pairs, self.output_dtype)
                mma.store_matrices(self.value_rows(values, column, lane, n, 8), words)
        else:
            # or the compiler computes all addresses early, and keeps them
            i, row, lane = (memory.pinned(Int32(value)) for value in (i, row, lane))
            t, r = lane & 3, row + (lane >> 2)
            for n in cutlass.range_constexpr(self.chunk.key_groups):
                for e in cutlass.range_constexpr(len(O[n])):
                    token, half = t ^ 2, e
                    if const_expr(not self.chunk.shared_group):
                        token, half = 8 * n + (t if const_expr(e % 2 == 0) else 4 + (t ^ 2)), e // 2
                    if token < tokens:
                        memory.store_scalar(memory.address(out, i, token, h, r + 8 * half), O[n][e], self.output_dtype)

    @cute.jit
    def copy_outputs(self, out, place, values, column, tokens, lane):
        """This warp's columns of all tokens' outputs, from shared memory."""
        i, h, row = place
        cute.arch.sync_warp()
        per_token = 2 * self.tiles
        first = 4 if const_expr(self.chunk.shared_group) else 0
        for step in cutlass.range_constexpr(-(-self.chunk.tokens * per_token // WARP)):
            piece = lane + step * WARP
            token, at = piece // per_token, piece % per_token * 8
            if token < tokens:
                words = memory.load_words(values + ((first + token) * self.value_pitch + column + at) * 2, 4)
                memory.store_words(memory.address(out, i, token, h, row + at), words)

    @cute.jit
    def clear_outputs(self, out, i, h, first, tokens):
        """Zeros, for a request that is padding."""
        thread = cute.arch.thread_idx()[0]
        for token in cutlass.range(tokens, unroll=1):
            for r in cutlass.range(first + thread, first + self.config.rows, self.threads, unroll=1):
                memory.store_scalar(memory.address(out, i, token, h, r), Float32(0.0), self.output_dtype)

"""`OutputRows`: outputs of new tokens, from registers to global memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, memory, mma
from cute_ssm.ops._gated_delta.chunk import TokenChunk
from cute_ssm.ops._gated_delta.tokens import TokenRows
from cute_ssm.ops._gated_delta.units import Unit


class OutputRows:
    """Outputs of a `chunk` of tokens.

    Rows that are aligned (`vectors`) go to shared memory in place of the values, tile by tile, and from there to global
    memory in vectors; others go to global memory element by element.
    """

    def __init__(
        self, dtype: type[Numeric], vectors: bool, chunk: TokenChunk, tokens: TokenRows, tiles_per_warp: int
    ) -> None:
        self.dtype, self.vectors, self.chunk, self.tokens = dtype, vectors, chunk, tokens
        self.tiles_per_warp = tiles_per_warp

    @cute.jit
    def store_tile(
        self,
        output: cute.Tensor,
        O: list[list[Float32]],
        U: list[list[Float32]],
        unit: Unit,
        row: Int32,
        values: cute.Pointer,
        column: Int32,
        count: Int32,
        lane: Int32,
    ) -> None:
        """Store the outputs of a tile, O of `TokenChunk.solve`, from row `row` of the state on.

        `column` is that of the tile in rows of values in shared memory.
        """
        if const_expr(self.vectors):
            cute.arch.sync_warp()
            for n in cutlass.range_constexpr(self.chunk.key_groups):
                pairs = O[n]
                if const_expr(self.chunk.shared_group):  # rows 0 to 3 of the group hold unused values
                    pairs = [U[0][0], O[0][0], U[0][1], O[0][1]]
                words = convert.pack(pairs, self.dtype)
                mma.store_matrices(self.tokens.value_row(values, column, lane, n, 8), words)
        else:
            # pinned: otherwise LLVM computes all addresses early and keeps them in registers
            i, row, lane = (memory.pinned(Int32(value)) for value in (unit.request, row, lane))
            t, r = lane & 3, row + (lane >> 2)
            for n in cutlass.range_constexpr(self.chunk.key_groups):
                for e in cutlass.range_constexpr(len(O[n])):
                    token, half = t ^ 2, e
                    if const_expr(not self.chunk.shared_group):
                        token, half = 8 * n + (t if const_expr(e % 2 == 0) else 4 + (t ^ 2)), e // 2
                    if token < count:
                        address = memory.address(output, i, token, unit.head, r + 8 * half)
                        memory.store_scalar(address, O[n][e], self.dtype)

    @cute.jit
    def copy(
        self,
        output: cute.Tensor,
        unit: Unit,
        row: Int32,
        values: cute.Pointer,
        column: Int32,
        count: Int32,
        lane: Int32,
    ) -> None:
        """Copy this warp's columns of all tokens' outputs from shared memory to global memory."""
        cute.arch.sync_warp()
        per_token = 2 * self.tiles_per_warp
        first = 4 if const_expr(self.chunk.shared_group) else 0
        for step in cutlass.range_constexpr(-(-self.chunk.tokens * per_token // WARP)):
            piece = lane + step * WARP
            token, offset = piece // per_token, piece % per_token * 8
            if token < count:
                source = values + ((first + token) * self.tokens.layout.value_pitch + column + offset) * 2
                words = memory.load_words(source, 4)
                memory.store_words(memory.address(output, unit.request, token, unit.head, row + offset), words)


@cute.jit
def clear_outputs(
    output: cute.Tensor,
    dtype: cutlass.Constexpr,
    request: Int32,
    head: Int32,
    first_row: Int32,
    rows: cutlass.Constexpr,
    count: Int32,
    threads: cutlass.Constexpr,
) -> None:
    """Store zeros in `rows` rows of the outputs of `count` tokens, for a request that is padding, by a whole CTA."""
    thread = cute.arch.thread_idx()[0]
    for token in cutlass.range(count, unroll=1):
        for row in cutlass.range(first_row + thread, first_row + rows, threads, unroll=1):
            memory.store_scalar(memory.address(output, request, token, head, row), Float32(0.0), dtype)

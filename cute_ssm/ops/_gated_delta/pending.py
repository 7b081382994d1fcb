"""`PendingTokens`: accepted tokens in rings, which are folded into tiles of the state, eight at a time.

One warp prepares the tables of a chunk from the rings; then every warp folds chunk by chunk into its tiles,
which are in registers as float32.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric

from cute_ssm.device import math, memory
from cute_ssm.ops._gated_delta.chunk import TokenChunk
from cute_ssm.ops._gated_delta.layout import PENDING_CHUNK
from cute_ssm.ops._gated_delta.shared import SharedLayout, SharedMemory
from cute_ssm.ops._gated_delta.states import Tile
from cute_ssm.ops._gated_delta.tokens import TokenRows
from cute_ssm.ops._gated_delta.units import Unit

RING_BYTES = 16  # of accesses to rings, whose rows are always aligned


class Rings(NamedTuple):
    """The history of all slots."""

    k_cache: cute.Tensor
    v_cache: cute.Tensor
    g_cache: cute.Tensor
    beta_cache: cute.Tensor


class Pending(NamedTuple):
    """The pending tokens of a slot: `count` rows from `start` on, in rings of `length` rows."""

    start: Int32
    count: Int32
    length: Int32


@cute.jit
def ring_row(row: Int32, length: Int32) -> Int32:
    """Return a row, less than twice the length of a ring, modulo that length."""
    return row - length if row >= length else row


def chunk_count(count: Int32) -> Int32:
    """Return the number of chunks of so many pending tokens."""
    return (count + (PENDING_CHUNK - 1)) // PENDING_CHUNK


class PendingTokens:
    """Pending tokens of the states and rings of one layer."""

    def __init__(self, dtype: type[Numeric], l2norm: bool, layout: SharedLayout, threads: int) -> None:
        self.layout = layout
        self.chunk = TokenChunk(PENDING_CHUNK, layout.sizes.K, l2norm, queries=False)
        self.rows = TokenRows(dtype, layout, threads, RING_BYTES)

    def stage(
        self, rings: Rings, shared: SharedMemory, unit: Unit, pending: Pending, used: Int32, thread: Int32
    ) -> None:
        """Copy keys and values to shared memory, and zeros after them up to row `used`, by the whole CTA."""
        window, (start, count, length) = self.layout.sizes.pending_tokens, pending

        def key(t: Int32, c: Int32) -> cute.Pointer:
            row = ring_row(ring_row(start + t, length), length)
            return memory.address(rings.k_cache, unit.slot, unit.key_head, row, c)

        def value(t: Int32, c: Int32) -> cute.Pointer:
            row = ring_row(ring_row(start + t, length), length)
            return memory.address(rings.v_cache, unit.slot, unit.head, row, unit.first_row + c)

        self.rows.stage_keys(key, window, count, shared.keys, thread, used)
        self.rows.stage_values(value, window, count, shared.values, thread, used)

    @cute.jit
    def prepare(
        self, rings: Rings, shared: SharedMemory, unit: Unit, pending: Pending, index: Int32, lane: Int32
    ) -> None:
        """Fill the tables of chunk `index`, by one warp."""
        alpha, beta = self._gates(rings, unit, pending, index, lane)
        self.chunk.prepare(alpha, beta, Float32(1.0), self.layout.pending_chunk(shared, index), lane)

    @cute.jit
    def _gates(self, rings: Rings, unit: Unit, pending: Pending, index: Int32, lane: Int32) -> tuple[Float32, Float32]:
        """Return decay and step of the lane's token of a chunk; 1 and 0 past the last token."""
        alpha, beta = Float32(1.0), Float32(0.0)
        token = index * PENDING_CHUNK + lane
        if lane < PENDING_CHUNK and token < pending.count:
            row = ring_row(pending.start + token, pending.length)
            g = memory.load_scalar(memory.address(rings.g_cache, unit.slot, unit.head, row), Float32)
            alpha = math.exponential(g)
            beta = memory.load_scalar(memory.address(rings.beta_cache, unit.slot, unit.head, row), Float32)
        return alpha, beta

    def fold(self, tile: Tile, shared: SharedMemory, index: Int32, column: Int32, lane: Int32) -> Tile:
        """Return the tile after chunk `index`; rows past the last token change nothing, because their step is 0.

        `column` is that of the tile in rows of values in shared memory.
        """
        chunk = self.layout.pending_chunk(shared, index)
        products = self.chunk.products(tile, Float32, chunk.keys, lane)
        V = self.rows.load_values(chunk.values, column, self.chunk, lane)
        U = self.chunk.updates(products, self.chunk.load_coefficients(chunk.tables, lane), V)
        update = self.chunk.load_update(U, chunk, PENDING_CHUNK - 1, lane)
        return self.chunk.advanced(tile, update)

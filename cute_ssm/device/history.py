"""`HistoryView`: addresses of the inputs of pending tokens in either kind of cache."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from cute_ssm.device import memory
from cute_ssm.device.types import Maybe


class History(NamedTuple):
    """The caches of x, B, dt' and, with two buffers, of the running sums of A dt'."""

    x: cute.Tensor
    B: cute.Tensor
    dt: cute.Tensor
    sums: Maybe[cute.Tensor]


class HistoryRow(NamedTuple):
    """Where a cache holds a token: buffer (0 in a ring) and row."""

    buffer: Int32
    row: Int32


class HistoryView:
    """Addresses of x, B and dt' of tokens that are pending in a slot, by position.

    ``double`` and ``double_x``: the cursor is one of two buffers, and position j is its row j; a step that writes the
    state appends to the other buffer, from row 0 on.  (Of x, ``double`` has one buffer.)  ``ring``: the cursor is the
    row of position 0; rows of x belong to one head.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.ring = kind == "ring"
        self.dt_heads = 1 if self.ring else 2  # the mode of dt' that counts heads

    def rows(self, dt: cute.Tensor) -> Int32:
        """Return the number of rows of each cache, from the shape of dt'."""
        return dt.shape[2] if self.ring else dt.shape[3]

    def num_cursors(self, dt: cute.Tensor) -> Int32:
        """Return the number of values that a cursor can have."""
        return self.rows(dt) if self.ring else 2

    def appended(self, num_tokens: int, window: int) -> int:
        """Return how many of up to `num_tokens` new tokens of a sequence the caches take."""
        return num_tokens if self.ring else min(num_tokens, window)

    def pending_row(self, cursor: Int32, position: Int32, rows: Int32) -> HistoryRow:
        """Return where the pending token at `position` is."""
        if self.ring:
            return HistoryRow(Int32(0), self._wrapped(cursor + position, rows))
        return HistoryRow(cursor, position)

    def new_row(self, cursor: Int32, pending: Int32, token: Int32, writes: Boolean, rows: Int32) -> HistoryRow:
        """Return where a new token goes behind `pending` ones, in a step that `writes` the state or does not."""
        if self.ring:
            return HistoryRow(Int32(0), self._wrapped(cursor + pending + token, rows))
        buffer = cutlass.select_(writes, cursor ^ 1, cursor)
        return HistoryRow(buffer, cutlass.select_(writes, token, pending + token))

    @staticmethod
    def _wrapped(row: Int32, rows: Int32) -> Int32:
        return cutlass.select_(row >= rows, row - rows, row)

    def x(self, tensor: cute.Tensor, slot: Int64, at: HistoryRow, head: Int32, column: Int32) -> cute.Pointer:
        """Return the address of x: of all heads from `head` on, or in a ring of that head alone."""
        if self.ring:
            return memory.address(tensor, slot, head, at.row, column)
        row = (slot, at.row) if self.kind == "double" else (slot, at.buffer, at.row)
        return memory.address(tensor, *row, head, column)

    def B(
        self, tensor: cute.Tensor, slot: Int64, at: HistoryRow, group: Int32, column: Int32 | int = 0
    ) -> cute.Pointer:
        """Return the address of a row of B, from `column` on."""
        if self.ring:
            return memory.address(tensor, slot, group, at.row, column)
        return memory.address(tensor, slot, at.buffer, at.row, group, column)

    def dt(self, tensor: cute.Tensor, slot: Int64, at: HistoryRow, head: Int32) -> cute.Pointer:
        """Return the address of dt', or of the running sum."""
        if self.ring:
            return memory.address(tensor, slot, head, at.row)
        return memory.address(tensor, slot, at.buffer, head, at.row)

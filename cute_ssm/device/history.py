"""`HistoryView`: where the inputs of accepted tokens lie, whatever the contract of their caches."""

import cutlass
from cutlass import Int32

from cute_ssm.device import memory


class HistoryView:
    """Rows of x, B and dt' of the tokens that are not yet in a slot's state, by position.

    ``double`` and ``double_x``: the cursor is one of two buffers, and position j is its row j; a step that writes the
    state appends to the other buffer, from row 0 on.  (Of x, ``double`` has one buffer.)  ``ring``: the cursor is the
    row of position 0; rows of x belong to one head.
    """

    def __init__(self, kind):
        self.kind = kind
        self.ring = kind == "ring"
        self.dt_heads = 1 if self.ring else 2  # the mode of dt' that counts heads

    def shapes(self, spec, slots, rows):
        """Shapes of (x, B, dt'), with the number of leading dimensions whose strides are free."""
        heads, groups, dim, dstate = spec.heads, spec.groups, spec.dim, spec.dstate
        if self.ring:
            return ((slots, heads, rows, dim), 3), ((slots, groups, rows, dstate), 3), ((slots, heads, rows), 2)
        x = ((slots, rows, heads, dim), 2) if self.kind == "double" else ((slots, 2, rows, heads, dim), 3)
        return x, ((slots, 2, rows, groups, dstate), 3), ((slots, 2, heads, rows), 3)

    def capacity(self, dt):
        """Rows of the caches, from that of dt'."""
        return dt.shape[2] if self.ring else dt.shape[3]

    def cursors(self, dt):
        """How many values a cursor can have."""
        return self.capacity(dt) if self.ring else 2

    def kept(self, spec):
        """How many new tokens the caches can take."""
        return spec.tokens if self.ring else min(spec.tokens, spec.window)

    def old(self, cursor, position, rows):
        """(buffer, row) of an accepted token."""
        if self.ring:
            return Int32(0), self._wrapped(cursor + position, rows)
        return cursor, position

    def new(self, cursor, accepted, token, write, rows):
        """(buffer, row) of a new token after `accepted` ones; `write`: the step writes the state."""
        if self.ring:
            return Int32(0), self._wrapped(cursor + accepted + token, rows)
        buffer = cutlass.select_(write, cursor ^ 1, cursor)
        return buffer, cutlass.select_(write, token, accepted + token)

    @staticmethod
    def _wrapped(row, rows):
        return cutlass.select_(row >= rows, row - rows, row)

    def x(self, tensor, slot, place, head, column):
        """Address of x: of all heads from `head` on, or in a ring of that head alone."""
        buffer, row = place
        if self.ring:
            return memory.address(tensor, slot, head, row, column)
        where = (slot, row) if self.kind == "double" else (slot, buffer, row)
        return memory.address(tensor, *where, head, column)

    def B(self, tensor, slot, place, group):
        """Address of a row of B."""
        buffer, row = place
        return (
            memory.address(tensor, slot, group, row, 0)
            if self.ring
            else memory.address(tensor, slot, buffer, row, group, 0)
        )

    def dt(self, tensor, slot, place, head):
        """Address of dt', or of the running sum."""
        buffer, row = place
        return memory.address(tensor, slot, head, row) if self.ring else memory.address(tensor, slot, buffer, head, row)

"""`CursorRows`: slot, new tokens and cursors of a row of a batch, checked before anything is read by them."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from cute_ssm.device.bounds import in_range
from cute_ssm.device.types import Maybe
from cute_ssm.ops._cursors.config import MOST_TOKENS
from cute_ssm.ops._cursors.spec import CursorSpec


class CursorTensors(NamedTuple):
    """The tensors that describe the rows of a batch; ``cursor`` is ``cache_buf_idx`` or ``ring_start``."""

    prev_num_accepted_tokens: cute.Tensor
    cursor: cute.Tensor
    state_batch_indices: Maybe[cute.Tensor]
    cu_seqlens: Maybe[cute.Tensor]


class CursorBounds(NamedTuple):
    """What rows are checked against.

    Attributes
    ----------
    pad_slot_id : Int64
    num_tokens : Int32
        New tokens of every row, without ``cu_seqlens``.
    window : Int32
        Largest number of pending tokens.
    num_cursors : Int32
        Number of values of a cursor: 2, or the rows of the ring.
    """

    pad_slot_id: Int64
    num_tokens: Int32
    window: Int32
    num_cursors: Int32


class CursorRow(NamedTuple):
    """A row of a batch.  Fields other than `active` are meaningful only if that is true."""

    slot: Int64
    num_tokens: Int32
    pending: Int32
    cursor: Int32
    active: Boolean


class CursorRows:
    """Loads the rows of a batch; see `cute_ssm.reference.cursors`."""

    def __init__(self, spec: CursorSpec) -> None:
        self.spec = spec

    @cute.jit
    def load(self, tensors: CursorTensors, b: Int32, bounds: CursorBounds) -> CursorRow:
        """Load row b.

        A row is inactive if it is padding, has no new tokens or more than a step can have, or has a slot, offset or
        cursor out of range.  The caller must not write anything of its slot.
        """
        slot, num_tokens, most = Int64(b), bounds.num_tokens, Int32(MOST_TOKENS)
        if const_expr(tensors.state_batch_indices is not None):
            slot = Int64(tensors.state_batch_indices[b])
        if const_expr(tensors.cu_seqlens is not None):
            first, last = Int64(tensors.cu_seqlens[b]), Int64(tensors.cu_seqlens[b + 1])
            # differences of numbers in [0, 2^63) do not overflow
            length = last - first if first >= 0 and last > first else Int64(0)
            num_tokens = Int32(length) if length <= MOST_TOKENS else Int32(0)
        if const_expr(self.spec.ring):
            most = bounds.num_cursors - bounds.window  # rows of a ring for new tokens
        active = slot != bounds.pad_slot_id and in_range(slot, tensors.prev_num_accepted_tokens.shape[0])
        active = active and num_tokens > 0 and num_tokens <= most
        pending, cursor = Int32(0), Int32(0)
        if active:
            pending, cursor = tensors.prev_num_accepted_tokens[slot], tensors.cursor[slot]
        inside = pending >= 0 and pending <= bounds.window and in_range(cursor, bounds.num_cursors)
        return CursorRow(slot, num_tokens, pending, cursor, Boolean(active and inside))

    @staticmethod
    def writes(row: CursorRow, window: Int32) -> Boolean:
        """Return whether the step of an active row writes the state: pending + num_tokens > window.

        The sum may not fit 32 bits, so the difference is compared.
        """
        return row.num_tokens > window - row.pending

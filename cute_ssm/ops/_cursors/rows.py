"""`CursorRows`: what kernels over the cursors of a batch know of a row of it."""

import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from cute_ssm.device.bounds import in_range
from cute_ssm.device.fakes import fake
from cute_ssm.ops._cursors.config import MOST_TOKENS


class CursorRows:
    """Slot, tokens and cursors of a row, and whether the row may be trusted; see `cute_ssm.reference.serving`."""

    def __init__(self, spec):
        self.spec = spec

    def fakes(self, batch, slots):
        """(PNAT, cursor, state_batch_indices, cu_seqlens)."""
        src = None if self.spec.src_dtype is None else fake(self.spec.src_dtype, (batch,))
        cu = None if self.spec.cu_dtype is None else fake(self.spec.cu_dtype, (cute.sym_int32(),))
        return fake(Int32, (slots,)), fake(Int32, (slots,)), src, cu

    @cute.jit
    def load(self, cursors, b, sizes):
        """(slot, tokens, PNAT, cursor, whether the row is live) of row b.

        A row is not live if it is padding, has no tokens or more than a step can have, or has a slot, offset or cursor
        out of range; then nothing of its slot must be written.  `sizes` is (pad slot, tokens of a row, window, values
        of the cursor).
        """
        pnat, cursor, src, cu = cursors
        pad_slot, tokens, window, places = sizes
        slot, count, most = Int64(b), tokens, Int32(MOST_TOKENS)
        if const_expr(src is not None):
            slot = Int64(src[b])
        if const_expr(cu is not None):
            first, last = Int64(cu[b]), Int64(cu[b + 1])
            # differences of numbers in [0, 2^63) do not overflow
            length = last - first if first >= 0 and last > first else Int64(0)
            count = Int32(length) if length <= MOST_TOKENS else Int32(0)
        if const_expr(self.spec.ring):
            most = places - window  # rows of a ring for new tokens
        live = slot != pad_slot and in_range(slot, pnat.shape[0]) and count > 0 and count <= most
        kept, place = Int32(0), Int32(0)
        if live:
            kept, place = pnat[slot], cursor[slot]
        inside = kept >= 0 and kept <= window and in_range(place, places)
        return slot, count, kept, place, Boolean(live and inside)

    @staticmethod
    def writes(kept, count, window):
        """Whether a live row's step writes the state: kept + count > window, which may not fit 32 bits."""
        return count > window - kept

"""`CursorRows`: what kernels over the cursors of a batch know of a row of it."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from cute_ssm.kernels.fakes import fake

MOST_TOKENS = 1 << 20  # lengths are cut here: sums with them stay 32-bit integers


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

        A row is not live if it is padding, has no tokens, or has a slot or cursor out of range; then nothing of its
        slot has been read, or must be written.  `sizes` is (pad slot, tokens of a row, window, values of the cursor).
        """
        pnat, cursor, src, cu = cursors
        pad_slot, tokens, window, places = sizes
        slot, count = Int64(b), tokens
        if const_expr(src is not None):
            slot = Int64(src[b])
        if const_expr(cu is not None):
            count = Int32(cutlass.min(Int64(cu[b + 1]) - Int64(cu[b]), Int64(MOST_TOKENS)))
        live = slot != pad_slot and slot >= 0 and slot < pnat.shape[0] and count > 0
        kept, place = Int32(0), Int32(0)
        if live:
            kept, place = pnat[slot], cursor[slot]
        inside = kept >= 0 and kept <= window and place >= 0 and place < places
        return slot, count, kept, place, Boolean(live and inside)

"""`Extents`: the tokens of each sequence of `SelectiveScan`, and the slot of its initial state.

Every index that a tensor holds is compared with both bounds in its own width before it is used in an address.  A
sequence with an invalid offset, slot, column of blocks or chunk is skipped, like one whose slot is ``null_block_id``.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from cute_ssm.device.bounds import in_range
from cute_ssm.device.scan import TokenRange
from cute_ssm.ops.selective_scan.operands import Sequence, Tensors
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec


class Extents:
    """Loads what the index tensors say about a sequence."""

    def __init__(self, spec: SelectiveScanSpec) -> None:
        self.spec = spec

    @cute.jit
    def load(self, tensors: Tensors, b: Int32, null_block_id: Int64) -> Sequence:
        """Return the tokens and the initial slot of sequence b."""
        starts, cache, length = tensors.query_start_loc, tensors.cache_indices, tensors.u.shape[2]
        begin, end = Int32(0), Int32(length)
        # 64 bits: the product of a slot with its stride passes 2^31 elements
        slot, active, has_initial = Int64(b), Boolean(True), Boolean(False)
        if const_expr(starts is not None):
            first, last = Int64(starts[b]), Int64(starts[b + 1])
            active = first >= 0 and last >= first and last <= length
            begin = Int32(first) if active else Int32(0)
            end = Int32(last) if active else Int32(0)
        if const_expr(self.spec.blocks):
            for column in (
                tensors.block_idx_first_scheduled_token[b],
                tensors.block_idx_last_scheduled_token[b],
                tensors.initial_state_idx[b],
            ):
                active = active and in_range(column, cache.shape[1])
            slot = null_block_id
            if active:
                slot = Int64(cache[b, tensors.initial_state_idx[b]])
        elif const_expr(cache is not None):
            slot = Int64(cache[b])
        if const_expr(cache is not None):
            active = active and slot != null_block_id
        if const_expr(cache is not None and tensors.ssm_states is not None):
            active = active and in_range(slot, tensors.ssm_states.shape[0])
        if const_expr(self.spec.chunks):
            if active:
                active = self.chunks_fit(tensors, b, end - begin)
        if const_expr(tensors.has_initial_state is not None):
            has_initial = tensors.has_initial_state[b] != 0
        return Sequence(TokenRange(begin, end), slot, Boolean(active), has_initial)

    @cute.jit
    def chunks(self, tensors: Tensors, b: Int32) -> tuple[Int64, Int64]:
        """Return the numbers of a sequence's first and last chunk; the last is first - 1 if it has none."""
        first = Int64(0)
        if b > 0:
            first = Int64(tensors.last_chunk_indices[b - 1]) + 1
        return first, Int64(tensors.last_chunk_indices[b])

    @cute.jit
    def chunks_fit(self, tensors: Tensors, b: Int32, num_tokens: Int32) -> Boolean:
        """Return whether a sequence's chunks exist, have at least one token each, and all of its tokens together."""
        ends = tensors.cu_chunk_seqlen
        first, last = self.chunks(tensors, b)
        fit = first >= 0 and last >= first - 1 and in_range(last + 1, ends.shape[0])
        if fit:
            fit = Int64(ends[last + 1]) - Int64(ends[first]) == num_tokens
            for i in cutlass.range(Int32(last + 1 - first), unroll=1):
                fit = fit and ends[first + i + 1] > ends[first + i]
        return Boolean(fit)

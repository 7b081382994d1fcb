"""`Extents`: which tokens and slots a sequence of `SelectiveScan` has, and where it saves states.

What the tensors of indices hold is compared with both bounds before anything is addressed by it, in as many bits as it
has.  A sequence whose offsets, slot, columns of blocks or chunks contradict the contract is skipped, like one whose
slot is null; a state whose own destination is out of range is not saved.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr

from cute_ssm.device import memory
from cute_ssm.device.bounds import in_range


class Extents:
    """A part of `SelectiveScan`; `owner` is that kernel.

    `metadata`, of all methods, are the tensors of indices in the order of the kernel's arguments.
    """

    def __init__(self, owner):
        self.owner, self.spec = owner, owner.spec

    @cute.jit
    def extent(self, metadata, u, states, b, null_slot):
        """(first token, end, slot of the initial state, whether there is anything to do, whether to load the state)."""
        query_start, cache, has_initial, first_block, last_block, initial_block, _, _ = metadata
        begin, end = Int32(0), Int32(u.shape[2])
        # 64 bits: the product of a slot with its stride passes 2^31 elements
        slot, real, initial = Int64(b), Boolean(True), Boolean(False)
        if const_expr(query_start is not None):
            first, last = Int64(query_start[b]), Int64(query_start[b + 1])
            real = first >= 0 and last >= first and last <= u.shape[2]
            begin = Int32(first) if real else Int32(0)
            end = Int32(last) if real else Int32(0)
        if const_expr(self.spec.blocks):
            for column in (first_block[b], last_block[b], initial_block[b]):
                real = real and in_range(column, cache.shape[1])
            slot = null_slot
            if real:
                slot = Int64(cache[b, initial_block[b]])
        elif const_expr(cache is not None):
            slot = Int64(cache[b])
        if const_expr(cache is not None):
            real = real and slot != null_slot
        if const_expr(cache is not None and states is not None):
            real = real and in_range(slot, states.shape[0])
        if const_expr(self.spec.chunks):
            if real:
                real = self.chunks_fit(metadata, b, end - begin)
        if const_expr(has_initial is not None):
            initial = has_initial[b] != 0
        return begin, end, slot, Boolean(real), initial

    @cute.jit
    def chunks(self, metadata, b):
        """(number of a sequence's first chunk, of its last one); of the last one before it, without any."""
        last_chunk = metadata[7]
        first = Int64(0)
        if b > 0:
            first = Int64(last_chunk[b - 1]) + 1
        return first, Int64(last_chunk[b])

    @cute.jit
    def chunks_fit(self, metadata, b, tokens):
        """Whether a sequence's chunks exist, have a token or more each, and all of its tokens together."""
        ends = metadata[6]
        first, last = self.chunks(metadata, b)
        fit = first >= 0 and last >= first - 1 and in_range(last + 1, ends.shape[0])
        if fit:
            fit = Int64(ends[last + 1]) - Int64(ends[first]) == tokens
            for i in cutlass.range(Int32(last + 1 - first), unroll=1):
                fit = fit and ends[first + i + 1] > ends[first + i]
        return Boolean(fit)

    @cute.jit
    def segments(self, args, h, metadata, states, b, channel, extent, part, null_slot, block_size):
        """Scan a part of a sequence and save the states at the end of each of its blocks or chunks.

        `extent` and `part` are (first token, end).  A block may have any positive number of tokens of 32 bits.
        """
        _, cache, _, first_block, last_block, _, ends, _ = metadata
        begin, end = extent
        low, high = part
        thread, valid = args[5:]
        number, past = Int32(0), (end - begin - 1) // block_size + 1  # of the segment, and of the one after the last
        tokens = cutlass.min(block_size, end - begin)  # of the first segment
        if const_expr(self.spec.chunks):
            first, last = self.chunks(metadata, b)
            number, past = Int32(first), Int32(last + 1)
            if number < past:
                tokens = Int32(Int64(ends[number + 1]) - Int64(ends[number]))
        lead = -begin - 1  # with the end of a segment: tokens of its blocks before its last token
        if past - number > 1 and tokens < block_size:
            lead += block_size - tokens  # the first chunk completes a block
        stop = begin
        while number < past and low < high:
            if const_expr(self.spec.chunks):
                stop += Int32(Int64(ends[number + 1]) - Int64(ends[number]))
            else:
                stop += cutlass.min(block_size, end - stop)
            number += 1
            if stop > low:  # else it ends in an earlier part
                cut = cutlass.min(stop, high)
                h = self.owner.segment(args, h, low, cut)
                low = cut
                if stop == cut:
                    at = memory.pinned(Int32(b))  # or addresses are kept through the scan: sm_90a spills at dstate 256
                    # modulo 2^32, which the sum is less than
                    column = Int64(first_block[at]) + Int64(Uint32(lead + stop) // Uint32(block_size))
                    if number == past:
                        column = Int64(last_block[at])
                    slot = null_slot
                    if in_range(column, cache.shape[1]):
                        slot = Int64(cache[at, column])
                    if slot != null_slot and in_range(slot, states.shape[0]) and valid:
                        row = memory.address(states, slot, channel, 0)
                        self.owner.store_quads(row, h, thread % self.owner.lanes)

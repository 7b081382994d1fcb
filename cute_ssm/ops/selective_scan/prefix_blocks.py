"""`PrefixBlocks`: scan a sequence and save its states after every block, or chunk, for prefix caching.

A state whose destination is ``null_block_id`` or out of range is not saved.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from cute_ssm.device import memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.scan import TokenRange
from cute_ssm.ops.selective_scan.extents import Extents
from cute_ssm.ops.selective_scan.operands import Channel, Sequence, Tensors, Unit
from cute_ssm.ops.selective_scan.segment import SegmentScan
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.ops.selective_scan.states import ChannelStates


class PrefixBlocks:
    """The segments of a sequence that end where its states are saved."""

    def __init__(self, spec: SelectiveScanSpec, extents: Extents, states: ChannelStates, segment: SegmentScan) -> None:
        self.spec, self.extents, self.states, self.segment = spec, extents, states, segment

    @cute.jit
    def scan(
        self,
        tensors: Tensors,
        unit: Unit,
        sequence: Sequence,
        part: TokenRange,
        channel: Channel,
        h: list[Float32],
        null_block_id: Int64,
        block_size: Int32,
    ) -> None:
        """Scan the tokens `part` of a sequence from the states h, and save the states after each block or chunk.

        A block may have any positive number of tokens that fits 32 bits.
        """
        cache, ends = tensors.cache_indices, tensors.cu_chunk_seqlen
        begin, end = sequence.tokens.begin, sequence.tokens.end
        low, high = part.begin, part.end
        number, past = Int32(0), (end - begin - 1) // block_size + 1  # of the segment, and of the one after the last
        num_tokens = cutlass.min(block_size, end - begin)  # of the first segment
        if const_expr(self.spec.chunks):
            first, last = self.extents.chunks(tensors, unit.sequence)
            number, past = Int32(first), Int32(last + 1)
            if number < past:
                num_tokens = Int32(Int64(ends[number + 1]) - Int64(ends[number]))
        lead = -begin - 1  # plus the end of a segment: the offset of its last token in the blocks
        if past - number > 1 and num_tokens < block_size:
            lead += block_size - num_tokens  # the first chunk completes a block
        stop = begin
        while number < past and low < high:
            if const_expr(self.spec.chunks):
                stop += Int32(Int64(ends[number + 1]) - Int64(ends[number]))
            else:
                stop += cutlass.min(block_size, end - stop)
            number += 1
            if stop > low:  # otherwise the segment ends in an earlier part
                cut = cutlass.min(stop, high)
                h = self.segment.scan(channel, h, TokenRange(low, cut))
                low = cut
                if stop == cut:
                    # pinned: addresses that are kept in registers through the scan spill, on sm_90a at dstate 256
                    b = memory.pinned(Int32(unit.sequence))
                    # modulo 2^32, which the sum is less than
                    column = Int64(tensors.block_idx_first_scheduled_token[b]) + Int64(
                        Uint32(lead + stop) // Uint32(block_size)
                    )
                    if number == past:
                        column = Int64(tensors.block_idx_last_scheduled_token[b])
                    slot = null_block_id
                    if in_range(column, cache.shape[1]):
                        slot = Int64(cache[b, column])
                    if slot != null_block_id and in_range(slot, tensors.ssm_states.shape[0]) and channel.active:
                        row = memory.address(tensors.ssm_states, slot, unit.channel, 0)
                        self.states.store(row, h, channel.thread % self.states.lanes)

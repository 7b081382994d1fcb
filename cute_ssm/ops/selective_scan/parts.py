"""`Parts`: split the tokens of long sequences into parts that are scanned at once, by two launches.

The recurrence is linear in h: a part of a sequence multiplies the states that it starts from by 2^(A' sum delta'), and
adds to them.  The *carry pass* scans every part except a sequence's last from zero (the first part from the initial
states), and stores the states at its end and the sum of delta' to row part + 1 of ``carried``.  The main pass folds the
rows of all parts before its own to find the states that it starts from, and scans its part like a sequence.  It reads
tokens of its own part only, and initial states from row 0 of ``carried``, so that no part reads what another has
overwritten, in a row of tokens or in the pool of states.  Parts are cut at multiples of 8 tokens from the beginning of
the sequence, and no CTA waits for another.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import math, memory
from cute_ssm.device.scan import TokenRange
from cute_ssm.ops.selective_scan.config import BLOCK, QUAD, SelectiveScanConfig, carried_columns
from cute_ssm.ops.selective_scan.operands import Channel, Sequence, Tensors, Unit
from cute_ssm.ops.selective_scan.segment import SegmentScan
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec
from cute_ssm.ops.selective_scan.states import ChannelStates


class Parts:
    """The parts of a sequence, and what they carry from one to the next."""

    def __init__(
        self, spec: SelectiveScanSpec, config: SelectiveScanConfig, states: ChannelStates, segment: SegmentScan
    ) -> None:
        self.splits, self.states, self.segment = config.splits, states, segment
        self.sum_column = carried_columns(spec) - QUAD  # of the sum of delta' in a row of `carried`
        self.fold_unroll = 4 if states.quads <= 4 else 1  # rows of `carried` whose loads are in flight together

    @cute.jit
    def tokens(self, tokens: TokenRange, part: Int32) -> TokenRange:
        """Return the tokens of a part; none if the sequence is too short for it."""
        size = ((tokens.end - tokens.begin + (self.splits - 1)) // self.splits + (BLOCK - 1)) & -BLOCK
        begin = cutlass.min(tokens.begin + part * size, tokens.end)
        return TokenRange(begin, cutlass.min(begin + size, tokens.end))

    @cute.jit
    def carry(self, tensors: Tensors, unit: Unit, sequence: Sequence, tokens: TokenRange, channel: Channel) -> None:
        """Scan a part in the carry pass and store what it carries; the first part also stores the initial states."""
        b, carried = unit.sequence, tensors.carried
        lane = channel.thread % self.states.lanes
        h = self.states.zeros()
        if const_expr(tensors.ssm_states is not None):
            if unit.part == 0 and sequence.has_initial and channel.active:
                h = self.states.load(memory.address(tensors.ssm_states, sequence.slot, unit.channel, 0), lane)
                self.states.store(memory.address(carried, b, 0, unit.channel, 0), h, lane, True)
        if tokens.end < sequence.tokens.end:
            *added, elapsed = self.segment.scan(channel, [*h, Float32(0.0)], tokens)
            if channel.active:
                row = memory.address(carried, b, unit.part + 1, unit.channel, 0)
                self.states.store(row, added, lane, True)
                if lane == 0:
                    memory.store_scalar(row + self.sum_column, elapsed, Float32)

    @cute.jit
    def fold(self, carried: cute.Tensor, unit: Unit, channel: Channel, has_initial: cutlass.Boolean) -> list[Float32]:
        """Return the states that a part starts from."""
        b, lane = unit.sequence, channel.thread % self.states.lanes
        h = self.states.zeros()
        if unit.part > 0 or has_initial:
            row = cutlass.min(unit.part, 1)
            h = self.states.load(memory.address(carried, b, row, unit.channel, 0), lane, True)
        for i in cutlass.range(2, unit.part + 1, unroll=self.fold_unroll):
            row = memory.address(carried, b, i, unit.channel, 0)
            added = self.states.load(row, lane, True)
            elapsed = memory.load_scalar(row + self.sum_column, Float32)
            for n in cutlass.range_constexpr(self.states.count):
                h[n] = cute.math.fma(math.power_of_two(elapsed * channel.rates[n]), h[n], added[n])
        return h

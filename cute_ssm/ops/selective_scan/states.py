"""`ChannelStates`: the states of a channel that a lane holds, or its decay rates, in registers and in memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from cute_ssm.device import memory
from cute_ssm.ops.selective_scan.config import QUAD, SelectiveScanConfig, padded_states
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec


class ChannelStates:
    """Of the `lanes` lanes of a channel, lane j holds the quads (4 neighbouring states) j, j + lanes, ..."""

    def __init__(self, spec: SelectiveScanSpec, config: SelectiveScanConfig) -> None:
        self.spec = spec
        self.lanes = config.lanes
        self.quads = padded_states(spec) // (QUAD * config.lanes)  # of a lane
        self.count = QUAD * self.quads  # states of a lane

    def zeros(self) -> list[Float32]:
        """Return states of zero."""
        return [Float32(0.0)] * self.count

    @cute.jit
    def load(self, row: cute.Pointer, lane: Int32, padded: cutlass.Constexpr = False) -> list[Float32]:
        """Load this lane's states of a channel; zeros beyond dstate.  `padded`: the row has whole, aligned quads."""
        dtype = row.dtype
        values = []
        for i in cutlass.range_constexpr(self.quads):
            state = (lane + i * self.lanes) * QUAD
            quad = [Float32(0.0)] * QUAD
            if const_expr(self.spec.aligned_states or padded):
                if state < self.spec.dstate:
                    quad = memory.load(row + state, dtype, QUAD, QUAD * dtype.width // 8)
            else:
                for j in cutlass.range_constexpr(QUAD):
                    value = Float32(0.0)
                    if state + j < self.spec.dstate:
                        value = memory.load_scalar(row + (state + j), dtype)
                    quad[j] = value
            values += quad
        return values

    @cute.jit
    def store(self, row: cute.Pointer, values: list[Float32], lane: Int32, padded: cutlass.Constexpr = False) -> None:
        """Round and store this lane's states of a channel; see `load`."""
        dtype = row.dtype
        for i in cutlass.range_constexpr(self.quads):
            state = (lane + i * self.lanes) * QUAD
            if const_expr(self.spec.aligned_states or padded):
                if state < self.spec.dstate:
                    quad = values[i * QUAD : (i + 1) * QUAD]
                    memory.store(row + state, quad, dtype, QUAD * dtype.width // 8, self.spec.saturate)
            else:
                for j in cutlass.range_constexpr(QUAD):
                    if state + j < self.spec.dstate:
                        memory.store_scalar(row + (state + j), values[i * QUAD + j], dtype, self.spec.saturate)

"""`StagedColumns`: B and C of up to eight tokens in shared memory, as float32, for `TokenLoop`."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import memory
from cute_ssm.device.state import StateView
from cute_ssm.ops.selective_state_update.config import STAGED_TOKENS as TOKENS
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.token_io import TokenIO
from cute_ssm.ops.selective_state_update.units import Tensors, Unit


class StagedColumns:
    """A warp reads each element of B and C once for all blocks of a unit, coalesced, and widens it once.

    A row lies in shared memory as ``[access][quad][lane of a segment][4]`` instead of ``[access][lane][quad][4]``: the
    accesses of eight lanes that each read four of their columns then fall into different banks.
    """

    def __init__(self, spec: SelectiveStateUpdateSpec, view: StateView, io: TokenIO) -> None:
        self.spec, self.view, self.io = spec, view, io
        self.possible = view.vector % 4 == 0  # a lane's columns are whole quads; else the loop reads global memory
        self.quads = view.vector // 4
        self.pitch = view.accesses * view.lanes * view.vector  # floats of a row, idle lanes included

    @cute.jit
    def stage(
        self, tensors: Tensors, unit: Unit, first: Int32, group: Int32, shared: cute.Pointer, lane: Int32
    ) -> None:
        """Stage tokens ``first`` to ``first + 7`` (as many as there are) of B and C."""
        dtype, size = self.io.input_dtype, self.io.input_dtype.width // 8
        vector = self.io.input_vector(dtype) if const_expr(self.io.input_vector(dtype) >= 4) else 1
        pieces = self.view.dstate // vector
        tokens = cutlass.min(unit.num_tokens - first, TOKENS)
        cute.arch.sync_warp()  # all lanes have read what is staged now
        for piece in cutlass.range(lane, 2 * pieces, WARP, unroll=1):  # of B, then of C
            of_C = piece >= pieces
            column = (piece - pieces if of_C else piece) * vector
            B, C = (self.io.pointer(t, unit, first, group, column).toint() for t in (tensors.B, tensors.C))
            token_axis = 1 if self.spec.tokens == "batched" else 0
            B_step, C_step = (t.stride[token_axis] * size for t in (tensors.B, tensors.C))
            address, step = C if of_C else B, C_step if of_C else B_step
            row = cute.recast_ptr(shared, dtype=Float32) + (TOKENS * self.pitch if of_C else 0)
            for _ in cutlass.range(tokens, unroll=1):
                source = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=vector * size)
                values = memory.load(source, dtype, vector, vector * size)
                if const_expr(vector == 1):
                    memory.store(row + self.offset(column), values, Float32, 4)
                else:
                    for q in cutlass.range_constexpr(vector // 4):
                        memory.store(row + self.offset(column + 4 * q), values[4 * q : 4 * q + 4], Float32, 16)
                address += step
                row += self.pitch
        cute.arch.sync_warp()

    def offset(self, column: Int32) -> Int32:
        """Offset of a column in a staged row."""
        column = Uint32(column)
        lanes, vector = self.view.lanes, self.view.vector
        span = lanes * vector
        access, rest = column // span, column % span
        lane, e = rest // vector, rest % vector
        return Int32(access * span + (e // 4 * lanes + lane) * 4 + e % 4)

    @cute.jit
    def load(self, shared: cute.Pointer, which: int, token: Int32, lane: Int32) -> list[Float32]:
        """Load this lane's columns of a staged row of B (0) or C (1); zeros past the end of the row."""
        row = cute.recast_ptr(shared, dtype=Float32) + (which * TOKENS + token) * self.pitch
        row = row + lane % self.view.lanes * 4
        values = []
        for i in cutlass.range_constexpr(self.view.accesses):
            loaded = [Float32(0.0)] * self.view.vector
            if const_expr(not self.view.ragged):
                loaded = self.load_access(row, i)
            elif self.view.column(lane, i) < self.view.dstate:
                loaded = self.load_access(row, i)
            values += loaded
        return values

    def load_access(self, row: cute.Pointer, access: int) -> list[Float32]:
        """Load the quads of one access."""
        span, values = self.view.lanes * self.view.vector, []
        for q in range(self.quads):
            values += memory.load(row + access * span + q * self.view.lanes * 4, Float32, 4, 16)
        return values

"""`StagedColumns`: B and C of a few tokens in shared memory, as float32, for `SelectiveStep`'s loop over tokens."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import memory
from cute_ssm.ops.selective_state_update.config import STAGED_TOKENS as TOKENS


class StagedColumns:
    """A part of `SelectiveStep`, whose helpers and view of the state it uses; `owner` is that kernel.

    A warp reads each element of B and C once for all blocks of a unit, coalesced, and widens it once.  A row lies in
    shared memory as ``[access][quad][lane of a segment][4]`` instead of ``[access][lane][quad][4]``: eight lanes that
    each read four of their columns then meet every bank once.
    """

    def __init__(self, owner):
        self.owner, self.view = owner, owner.view
        self.quads = self.view.vector // 4
        self.pitch = self.view.accesses * self.view.lanes * self.view.vector  # floats of a row, idle lanes included

    @staticmethod
    def possible(view):
        """Whether a lane's columns come in whole quads; the loop reads global memory where they do not."""
        return view.vector % 4 == 0

    @cute.jit
    def stage(self, tensors, b, start, count, first, group, shared, lane):
        """Stage tokens ``first`` to ``first + 7`` (as many as there are) of B and C."""
        dtype, size = self.owner.input_dtype, self.owner.input_dtype.width // 8
        vector = self.owner.input_vector(dtype) if const_expr(self.owner.input_vector(dtype) >= 4) else 1
        pieces = self.view.dstate // vector
        tokens = cutlass.min(count - first, TOKENS)
        cute.arch.sync_warp()  # everyone has read what is staged now
        for piece in cutlass.range(lane, 2 * pieces, WARP, unroll=1):  # of B, then of C
            of_C = piece >= pieces
            column = (piece - pieces if of_C else piece) * vector
            sources = [self.owner.token(t, b, start, first, group, column).toint() for t in tensors]
            steps = [t.stride[1 if self.owner.spec.tokens == "batched" else 0] * size for t in tensors]
            address, step = sources[1] if of_C else sources[0], steps[1] if of_C else steps[0]
            row = cute.recast_ptr(shared, dtype=Float32) + (TOKENS * self.pitch if of_C else 0)
            for _ in cutlass.range(tokens, unroll=1):
                source = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=vector * size)
                values = memory.load(source, dtype, vector, vector * size)
                if const_expr(vector == 1):
                    memory.store(row + self.place(column), values, Float32, 4)
                else:
                    for q in cutlass.range_constexpr(vector // 4):
                        memory.store(row + self.place(column + 4 * q), values[4 * q : 4 * q + 4], Float32, 16)
                address += step
                row += self.pitch
        cute.arch.sync_warp()

    def place(self, column):
        """Where a column lies in a staged row."""
        column = Uint32(column)
        lanes, vector = self.view.lanes, self.view.vector
        span = lanes * vector
        access, rest = column // span, column % span
        lane, e = rest // vector, rest % vector
        return Int32(access * span + (e // 4 * lanes + lane) * 4 + e % 4)

    @cute.jit
    def load(self, shared, which, token, lane):
        """This lane's columns of a staged row; zeros past the end of the row."""
        row = cute.recast_ptr(shared, dtype=Float32) + (which * TOKENS + token) * self.pitch
        row = row + lane % self.view.lanes * 4
        values = []
        for i in cutlass.range_constexpr(self.view.accesses):
            got = [Float32(0.0)] * self.view.vector
            if const_expr(not self.view.ragged):
                got = self.quads_at(row, i)
            elif self.view.column(lane, i) < self.view.dstate:
                got = self.quads_at(row, i)
            values += got
        return values

    def quads_at(self, row, access):
        """The quads of one access."""
        span, values = self.view.lanes * self.view.vector, []
        for q in range(self.quads):
            values += memory.load(row + access * span + q * self.view.lanes * 4, Float32, 4, 16)
        return values

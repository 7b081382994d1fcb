"""`StateView`: how a warp sees a tile of a head's state, whatever its type, scale and rounding."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert, math, memory, philox


class StateView:
    """A *block* of rows in shared memory, worked on by one warp in *steps*.

    `lanes` lanes share a row and hold `accesses` vectors of `vector` columns of it; the warp touches ``32 / lanes``
    rows at once.  At step s, lane j of a segment works on row ``s ^ (j % steps)`` of those that belong to its
    segment, so that `math.sum_exchanged` leaves the sum of its first row, ``row_of(lane)``, in it without
    selects.  That is the row whose scale, and other scalars, the lane holds; `math.exchanged` brings them to where
    they are needed.  An `ordered` view takes rows in order instead, the same for all lanes of a segment, as fragments
    of matrix products need them.
    """

    def __init__(self, dtype, dstate, block, lanes, vector, philox_rounds, arch, saturate=False, ordered=False):
        self.dtype, self.dstate, self.block, self.lanes, self.vector = dtype, dstate, block, lanes, vector
        self.arch, self.rounds, self.saturate, self.ordered = arch, philox_rounds, saturate, ordered
        self.scaled = dtype in (cutlass.Int16, cutlass.Int8, cutlass.Float8E4M3FN)
        self.stride = WARP // lanes
        self.steps = block // self.stride
        self.accesses = -(-dstate // (vector * lanes))
        self.columns = self.accesses * vector  # of one lane
        self.ragged = dstate % (vector * lanes) != 0
        self.access_bytes = vector * dtype.width // 8
        self.pitch = dstate * dtype.width // 8
        self.bytes = block * self.pitch

    # -------------------------------------------------------------------------------------------------------- geometry
    def row_of(self, lane, step=0):
        """Row of the block that a lane works on at a step."""
        if self.ordered:
            return step * self.stride + lane // self.lanes
        return (lane % self.lanes % self.steps ^ step) * self.stride + lane // self.lanes

    def owns_row(self, lane):
        """Whether the lane speaks for ``row_of(lane)``: one lane per row, the first where several hold its sum."""
        return Boolean(True) if self.steps == self.lanes else lane % self.lanes < self.steps

    def column(self, lane, access):
        """First column of a lane's access to a row."""
        return (lane % self.lanes + access * self.lanes) * self.vector

    def cell(self, lane, step):
        """Bytes from the start of the block to a lane's first access at a step."""
        first = self.row_of(lane) * self.pitch + lane % self.lanes * self.access_bytes
        distance = self.stride * self.pitch
        if self.ordered:
            return first + step * distance
        if distance & (distance - 1) == 0:  # the bits of the step stand alone: no multiplication, no carry
            return first ^ step * distance
        return first + (self.row_of(lane, step) - self.row_of(lane)) * self.pitch

    def pointer(self, at, lane, step, access):
        """Where a lane's access lies in the block at `at`."""
        return cute.recast_ptr(at + self.cell(lane, step), dtype=self.dtype) + access * self.lanes * self.vector

    # --------------------------------------------------------------------------------------------------------- columns
    @cute.jit
    def load_columns(self, pointer, lane, access_bytes):
        """A lane's columns of a row in global memory (B, C, A), as float32; zeros past the end of the row."""
        values = []
        for i in cutlass.range_constexpr(self.accesses):
            column = self.column(lane, i)
            got = [Float32(0.0)] * self.vector
            if const_expr(not self.ragged):
                got = memory.load(pointer + column, pointer.dtype, self.vector, access_bytes)
            elif column < self.dstate:
                got = memory.load(pointer + column, pointer.dtype, self.vector, access_bytes)
            values += got
        return values

    # ----------------------------------------------------------------------------------------------------------- state
    @cute.jit
    def load(self, at, lane, step, scale):
        """A lane's columns of its row at a step, as float32; `scale`, if there are any, is that of its own row."""
        values = []
        for i in cutlass.range_constexpr(self.accesses):
            got = [Float32(0.0)] * self.vector
            if const_expr(not self.ragged):
                got = memory.load(self.pointer(at, lane, step, i), self.dtype, self.vector, self.access_bytes)
            elif self.column(lane, i) < self.dstate:
                got = memory.load(self.pointer(at, lane, step, i), self.dtype, self.vector, self.access_bytes)
            values += got
        if const_expr(self.scaled):
            factor = math.exchanged(scale, step)
            values = [value * factor for value in values]
        return values

    def encode(self, rows):
        """(scale, encoding factor) of the lane's own row, from the columns that it holds at each step."""
        largest = math.max_exchanged([convert.max_abs(values, self.arch) for values in rows], self.lanes)
        return convert.row_scale(largest, self.dtype)

    @cute.jit
    def store(self, at, lane, step, values, factor, random):
        """Round a lane's columns of its row at a step into the block.

        `factor` is the encoding factor of the lane's own row, if there are scales; `random` is (keys, place, first
        row of the block in the head) for stochastic rounding.
        """
        encode = math.exchanged(factor, step) if const_expr(self.scaled) else None
        for i in cutlass.range_constexpr(self.accesses):
            part = values[i * self.vector : (i + 1) * self.vector]
            if const_expr(not self.ragged):
                self._store_access(self.pointer(at, lane, step, i), lane, step, i, part, encode, random)
            elif self.column(lane, i) < self.dstate:
                self._store_access(self.pointer(at, lane, step, i), lane, step, i, part, encode, random)

    def _store_access(self, pointer, lane, step, access, values, encode, random):
        words = None
        if self.rounds:
            keys, place, first = random
            row, column = first + self.row_of(lane, step), self.column(lane, access)
            words = philox.words(keys, place, row, column, self.vector, self.dstate)
        if self.scaled:
            packed = convert.pack_quantised(values, encode, self.dtype, words)
        elif self.rounds:
            packed = convert.pack_stochastic(values, words, self.dtype, self.arch, self.saturate)
        else:
            memory.store(pointer, values, self.dtype, self.access_bytes, self.saturate)
            return
        memory.store_packed(pointer, packed, self.dtype, self.access_bytes)

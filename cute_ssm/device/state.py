"""`StateView`: how a warp reads and writes a tile of a head's state, for every type, scale and rounding."""

from typing import NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Numeric, const_expr

from cute_ssm.arch import WARP, Arch
from cute_ssm.device import convert, math, memory, philox


class Block(NamedTuple):
    """A block of rows of one head's state.

    Attributes
    ----------
    first_row : Int32
        First row of the block in the head.
    row : Int32
        Row in the head whose scalars (scale, input, output) the lane holds.
    at : cute.Pointer
        The block in shared memory.
    """

    first_row: Int32
    row: Int32
    at: cute.Pointer


class StateView:
    """A *block* of rows in shared memory, which one warp works on in *steps*.

    `lanes` lanes share a row and hold `accesses` vectors of `vector` columns of it; the warp works on ``32 / lanes``
    rows at once.  At step s, lane j of a segment works on row ``s ^ (j % steps)`` of those that belong to its segment.
    `math.sum_exchanged` then leaves the sum of row ``row_of(lane)`` in the lane without selects.  The lane holds the
    scale and the other scalars of that row; `math.exchanged` brings them to the lanes that need them.  An `ordered`
    view takes rows in order instead, the same for all lanes of a segment, as fragments of matrix products need them.
    """

    def __init__(
        self,
        dtype: type[Numeric],
        dstate: int,
        block: int,
        lanes: int,
        vector: int,
        arch: Arch,
        saturate: bool = False,
        ordered: bool = False,
    ) -> None:
        self.dtype, self.dstate, self.block, self.lanes, self.vector = dtype, dstate, block, lanes, vector
        self.arch, self.saturate, self.ordered = arch, saturate, ordered
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
    def block_of(self, first_row: Int32, at: cute.Pointer, index: Int32, lane: Int32) -> Block:
        """Block `index` of the rows from `first_row` on, which lie at `at` in shared memory."""
        first = first_row + index * self.block
        return Block(first, first + self.row_of(lane), at + index * self.bytes)

    def row_of(self, lane: Int32, step: int = 0) -> Int32:
        """Row of the block that a lane works on at a step."""
        if self.ordered:
            return step * self.stride + lane // self.lanes
        return (lane % self.lanes % self.steps ^ step) * self.stride + lane // self.lanes

    def owns_row(self, lane: Int32) -> Boolean:
        """Whether the lane writes the results of ``row_of(lane)``: where several lanes hold a sum, the first does."""
        return Boolean(True) if self.steps == self.lanes else lane % self.lanes < self.steps

    def column(self, lane: Int32, access: int) -> Int32:
        """First column of a lane's access to a row."""
        return (lane % self.lanes + access * self.lanes) * self.vector

    def offset(self, lane: Int32, step: int) -> Int32:
        """Bytes from the start of the block to a lane's first access at a step."""
        first = self.row_of(lane) * self.pitch + lane % self.lanes * self.access_bytes
        distance = self.stride * self.pitch
        if self.ordered:
            return first + step * distance
        if distance & (distance - 1) == 0:  # the bits of the step stand alone: no multiplication, no carry
            return first ^ step * distance
        return first + (self.row_of(lane, step) - self.row_of(lane)) * self.pitch

    def pointer(self, at: cute.Pointer, lane: Int32, step: int, access: int) -> cute.Pointer:
        """Pointer to a lane's access in the block at `at`."""
        return cute.recast_ptr(at + self.offset(lane, step), dtype=self.dtype) + access * self.lanes * self.vector

    # --------------------------------------------------------------------------------------------------------- columns
    @cute.jit
    def load_columns(self, pointer: cute.Pointer, lane: Int32, access_bytes: int) -> list[Float32]:
        """A lane's columns of a row in global memory (B, C, A), as float32; zeros past the end of the row."""
        values = []
        for i in cutlass.range_constexpr(self.accesses):
            column = self.column(lane, i)
            loaded = [Float32(0.0)] * self.vector
            if const_expr(not self.ragged):
                loaded = memory.load(pointer + column, pointer.dtype, self.vector, access_bytes)
            elif column < self.dstate:
                loaded = memory.load(pointer + column, pointer.dtype, self.vector, access_bytes)
            values += loaded
        return values

    # ----------------------------------------------------------------------------------------------------------- state
    @cute.jit
    def load(self, at: cute.Pointer, lane: Int32, step: int, scale: Optional[Float32]) -> list[Float32]:
        """A lane's columns of its row at a step, as float32.

        `scale` is that of the row ``row_of(lane)``; None if the type has no scales.
        """
        values = []
        for i in cutlass.range_constexpr(self.accesses):
            loaded = [Float32(0.0)] * self.vector
            if const_expr(not self.ragged):
                loaded = memory.load(self.pointer(at, lane, step, i), self.dtype, self.vector, self.access_bytes)
            elif self.column(lane, i) < self.dstate:
                loaded = memory.load(self.pointer(at, lane, step, i), self.dtype, self.vector, self.access_bytes)
            values += loaded
        if const_expr(self.scaled):
            factor = math.exchanged(scale, step)
            values = [value * factor for value in values]
        return values

    def encode(self, rows: list[list[Float32]]) -> convert.RowScale:
        """Return the scale and the encoding factor of row ``row_of(lane)``.

        `rows` holds, for each step, the lane's columns at that step.
        """
        largest = math.max_exchanged([convert.max_abs(values, self.arch) for values in rows], self.lanes)
        return convert.row_scale(largest, self.dtype)

    @cute.jit
    def store(
        self,
        block: Block,
        lane: Int32,
        step: int,
        values: list[Float32],
        factor: Optional[Float32],
        random: Optional[philox.RowRandom],
    ) -> None:
        """Round a lane's columns of its row at a step into the block.

        `factor` is the encoding factor of row ``row_of(lane)``, if the type has scales; `random` is for stochastic
        rounding.
        """
        encode = math.exchanged(factor, step) if const_expr(self.scaled) else None
        for i in cutlass.range_constexpr(self.accesses):
            part = values[i * self.vector : (i + 1) * self.vector]
            if const_expr(not self.ragged):
                self._store_access(block, lane, step, i, part, encode, random)
            elif self.column(lane, i) < self.dstate:
                self._store_access(block, lane, step, i, part, encode, random)

    def _store_access(
        self,
        block: Block,
        lane: Int32,
        step: int,
        access: int,
        values: list[Float32],
        encode: Optional[Float32],
        random: Optional[philox.RowRandom],
    ) -> None:
        pointer = self.pointer(block.at, lane, step, access)
        words = None
        if random is not None:
            row, column = block.first_row + self.row_of(lane, step), self.column(lane, access)
            words = philox.words(random.keys, random.counter, row, column, self.vector, self.dstate)
        if self.scaled:
            packed = convert.pack_quantised(values, encode, self.dtype, words)
        elif words is not None:
            packed = convert.pack_stochastic(values, words, self.dtype, self.arch, self.saturate)
        else:
            memory.store(pointer, values, self.dtype, self.access_bytes, self.saturate)
            return
        memory.store_packed(pointer, packed, self.dtype, self.access_bytes)

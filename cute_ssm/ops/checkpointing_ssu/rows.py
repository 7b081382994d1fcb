"""`UnitRows`: addresses of a unit's data in shared memory, as consumers use them."""

from typing import NamedTuple, Union

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from cute_ssm.device import memory, mma
from cute_ssm.ops.checkpointing_ssu.config import LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec


class TilePosition(NamedTuple):
    """A tile of a unit: its number, its head in the unit, and the bytes before its columns in a row of x."""

    tile: Int32
    head: Int32
    offset: Int32


def load_float(pointer: cute.Pointer) -> Float32:
    """Load a float32 from shared memory."""
    return memory.load_scalar(cute.recast_ptr(pointer, dtype=Float32), Float32)


class UnitRows:
    """Addresses of rows of x, B and C, and of tiles.

    Rows that do not exist are read from a row of zeros.  It lies on the banks of a row that is never read with it.
    """

    def __init__(self, spec: CheckpointingSSUSpec, launch: LaunchConfig, layout: UnitLayout):
        self.layout, self.d_split, self.tiles_per_consumer = layout, launch.d_split, launch.tiles_per_consumer
        self.column_bytes = spec.dstate * 2
        zeros = launch.zero_offset(spec)
        self.zero_x = zeros + 7 * layout.x_pitch % 128
        self.zero_column = zeros + 7 * layout.column_pitch % 128

    def tile(self, i: Union[Int32, int], consumer: Int32) -> TilePosition:
        """Return the position of a consumer's i-th tile."""
        tile = consumer * self.tiles_per_consumer + i
        return TilePosition(tile, tile // self.d_split, tile * (self.layout.tile_rows * 2))

    def x(self, units: cute.Pointer, rows: Int32, end: Int32, base: int, offset: Int32, lane: Int32) -> cute.Pointer:
        """Return where this lane reads 16 positions of x^T from `base` on, for the columns at `offset` bytes.

        x is zero from position `end` on.
        """
        j = base + lane % 8 + lane // 16 * 8
        at = cutlass.select_(j < end, rows + j * self.layout.x_pitch, Int32(self.zero_x))
        return units + (at + lane // 8 % 2 * 16 + offset)

    def column_words(self, units: cute.Pointer, rows: Int32, end: Int32, first: int, lane: Int32) -> list[list[Int32]]:
        """Load eight rows of B or C from row `first` on, as words of 16 columns each; rows from `end` on are zero."""
        r = first + lane % 8
        at = cutlass.select_(r < end, rows + r * self.layout.column_pitch, Int32(self.zero_column))
        pointer = units + (at + lane // 8 * 16)
        words: list[Int32] = []
        for offset in range(0, self.column_bytes, 64):
            words += mma.load_matrices(pointer + offset, 4, transposed=False)
        return [words[i : i + 2] for i in range(0, len(words), 2)]

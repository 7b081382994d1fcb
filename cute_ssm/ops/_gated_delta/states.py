"""`StateTiles`: tiles of a head's state in the registers of a warp.

A *tile* is 16 rows of a state [V, K].  A *block* is 16 columns of it: lane ``4 g + t`` holds columns 4 t .. 4 t + 3 of
rows g and g + 8.
"""

from collections.abc import Sequence
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Numeric

from cute_ssm.device import convert, memory
from cute_ssm.ops._gated_delta.layout import BLOCK

Block = list[list[Numeric]]  # words of a lane's columns in its two rows
Tile = list[Block]


def widened(tile: Tile, dtype: type[Numeric]) -> Tile:
    """Return the words of a tile of `dtype` as words of float32."""
    return [[convert.pack(convert.unpack(words, dtype), Float32) for words in block] for block in tile]


class StateTiles:
    """Loads and stores of tiles of states of one type."""

    def __init__(self, dtype: type[Numeric], K: int, saturate: bool = False) -> None:
        self.dtype, self.saturate = dtype, saturate
        self.blocks = K // BLOCK
        self.access_bytes = 4 * dtype.width // 8

    def corner(self, tensor: cute.Tensor, coordinate: Sequence[Any], row: Int32, lane: Int32) -> list[cute.Pointer]:
        """Return pointers to this lane's columns of the first block, one for each of its two rows.

        `coordinate` selects the state of a head: all axes of the tensor but the last two.
        """
        r, c = row + lane // 4, lane % 4 * 4
        return [memory.address(tensor, *coordinate, r + half, c) for half in (0, 8)]

    def load_block(self, corner: list[cute.Pointer], j: int) -> Block:
        """Return the words of block j."""
        bits = convert.word_bits(self.dtype, self.access_bytes)
        return [memory.load_words(row + BLOCK * j, self.access_bytes * 8 // bits, bits) for row in corner]

    def load(self, corner: list[cute.Pointer]) -> Tile:
        """Return the words of a tile."""
        return [self.load_block(corner, j) for j in range(self.blocks)]

    def store_block(self, corner: list[cute.Pointer], j: int, rows: Sequence[list[Float32]]) -> None:
        """Round both rows' floats of block j to nearest even and store them."""
        for pointer, values in zip(corner, rows):
            memory.store(pointer + BLOCK * j, values, self.dtype, self.access_bytes, self.saturate)

    def store(self, corner: list[cute.Pointer], tile: Tile) -> None:
        """Round a tile of float32 to nearest even and store it."""
        for j in range(self.blocks):
            self.store_block(corner, j, [convert.unpack(words, Float32) for words in tile[j]])

    def copy(self, corner: list[cute.Pointer], tile: Tile) -> None:
        """Store the words of a tile of this type unchanged."""
        for j in range(self.blocks):
            for pointer, words in zip(corner, tile[j]):
                memory.store_words(pointer + BLOCK * j, words)

"""`ChunkedTokens`: all tokens of a request at once, by products on tensor cores.

A warp loads its first tile of the state into registers before anything else.  Then all warps copy keys, queries and
values to shared memory, the first warp computes the coefficients, which depend on no row of the state, and every warp
proceeds on its own.  Once a tile is multiplied, the next one takes its registers, unless states are to be written.

`TokenChunks` does so for one chunk of tokens after the other, while a warp's only tile stays in registers as float32.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Numeric, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert
from cute_ssm.device.bounds import in_range
from cute_ssm.device.memory import pinned
from cute_ssm.ops._gated_delta.chunk import Groups, TokenChunk
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig
from cute_ssm.ops._gated_delta.layout import TILE, chunk_tokens
from cute_ssm.ops._gated_delta.outputs import OutputRows
from cute_ssm.ops._gated_delta.shared import ChunkMemory, SharedLayout, SharedMemory
from cute_ssm.ops._gated_delta.states import StateTiles, Tile, widened
from cute_ssm.ops._gated_delta.tokens import TokenRows
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_mtp.gates import TokenGates
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.ops.gated_delta_rule_mtp.tensors import Tensors

PART = 8  # blocks of a state that are written at a time


class Place(NamedTuple):
    """Where a warp works.

    Attributes
    ----------
    thread, warp, lane : Int32
    row : Int32
        First row of the state.
    column : Int32
        First column in rows of values in shared memory.
    """

    thread: Int32
    warp: Int32
    lane: Int32
    row: Int32
    column: Int32


class Span(NamedTuple):
    """The first token of a chunk in its request, and the request's number of tokens."""

    first: Int32
    total: Int32


class ChunkedTokens:
    """The path of `GatedDeltaRule` without ``config.sequential``, for one chunk of tokens."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig) -> None:
        self.spec, self.config = spec, config
        self.layout = SharedLayout(spec.sizes, config.rows)
        self.chunk = TokenChunk(chunk_tokens(spec.sizes.tokens), spec.K, spec.l2norm)
        self.states = StateTiles(convert.DTYPES[spec.state_dtype], spec.K, spec.saturate)
        self.tile_dtype: type[Numeric] = Float32 if spec.sizes.one_tile else self.states.dtype
        self.part = PART
        self.tiles_per_warp, self.threads = config.tiles(), WARP * config.warps
        self.tokens = TokenRows(convert.DTYPES[spec.input_dtype], self.layout, self.threads, spec.input_bytes)
        self.outputs = OutputRows(
            convert.DTYPES[spec.output_dtype], spec.vector_output, self.chunk, self.tokens, self.tiles_per_warp
        )
        self.gates = TokenGates(spec)

    def allocate(self) -> SharedMemory:
        """Allocate the shared memory of a CTA."""
        return self.layout.allocate()

    @cute.jit
    def run(self, tensors: Tensors, unit: Unit, shared: SharedMemory, scale: Float32) -> None:
        """Process all rows of a unit."""
        state, coordinate = tensors.initial_state, (unit.slot, unit.head)
        count = tensors.q.shape[1]
        place = self.place(unit)
        lane, first_row, column = place.lane, place.row, place.column
        tile = self.states.load(self.states.corner(state, coordinate, first_row, lane))
        memory = self.layout.new_chunk(shared)
        self.prepare(tensors, unit, memory, scale, place)
        coefficients = self.chunk.load_coefficients(memory.tables, lane)
        for m in cutlass.range_constexpr(self.tiles_per_warp):
            row = first_row + m * TILE
            ahead: list[cute.Pointer] = []
            load_ahead = None
            if const_expr(m + 1 < self.tiles_per_warp):
                ahead = self.states.corner(state, coordinate, row + TILE, lane)
                load_ahead = None if const_expr(self.spec.writes) else functools.partial(self.states.load_block, ahead)
            products = self.chunk.products(tile, self.states.dtype, memory.keys, lane)
            V = self.tokens.load_values(memory.values, column + m * TILE, self.chunk, lane)
            solution = self.chunk.solve(products, coefficients, V, lane, tile, load_ahead)
            U, following = solution.U, solution.following
            self.outputs.store_tile(
                tensors.output, solution.outputs, U, unit, row, memory.values, column + m * TILE, count, lane
            )
            if const_expr(self.spec.writes):
                self.write_states(tensors, unit, tile, U, memory, row, lane, Span(Int32(0), count))
                if const_expr(m + 1 < self.tiles_per_warp):
                    following = self.states.load(ahead)
            tile = following
        if const_expr(self.spec.vector_output):
            self.outputs.copy(tensors.output, unit, first_row, memory.values, column, count, lane)

    def place(self, unit: Unit) -> Place:
        """Return where this warp works."""
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if self.config.warps > 1 else Int32(0)
        column = warp * (self.tiles_per_warp * TILE)
        return Place(thread, warp, lane, unit.first_row + column, column)

    @cute.jit
    def prepare(self, tensors: Tensors, unit: Unit, memory: ChunkMemory, scale: Float32, place: Place) -> None:
        """Copy the tokens of a chunk to shared memory and fill its tables, by the whole CTA."""
        self.tokens.stage(tensors.q, tensors.k, tensors.v, unit, self.chunk, memory, place.thread)
        if const_expr(self.spec.writes):
            self.tokens.clear_key(memory.keys + self.chunk.zeros, place.thread)
        cute.arch.sync_threads()
        if place.warp == 0:
            alpha, beta = self.gates.load(tensors, unit, tensors.q.shape[1], place.lane)
            self.chunk.prepare(alpha, beta, scale, memory, place.lane)
        cute.arch.sync_threads()

    def write_states(
        self,
        tensors: Tensors,
        unit: Unit,
        tile: Tile,
        U: Groups,
        memory: ChunkMemory,
        row: Int32,
        lane: Int32,
        span: Span,
    ) -> None:
        """Write all states of a tile that the call asks for, `part` blocks at a time to limit registers."""
        for first in range(0, self.states.blocks, self.part):
            blocks = range(first, min(first + self.part, self.states.blocks))
            self.write_blocks(tensors, unit, tile, U, memory, blocks, row, lane, span)

    @cute.jit
    def write_blocks(
        self,
        tensors: Tensors,
        unit: Unit,
        tile: Tile,
        U: Groups,
        memory: ChunkMemory,
        blocks: range,
        row: Int32,
        lane: Int32,
        span: Span,
    ) -> None:
        """Write some blocks of all states that the call asks for."""
        state, buffer = tensors.initial_state, tensors.intermediate_states_buffer
        i, h, count = unit.request, unit.head, tensors.q.shape[1]
        if const_expr(buffer is not None):
            for t in cutlass.range(count, unroll=1):
                corner = self.states.corner(buffer, (i, t, h), row, lane)
                self.write_state(corner, tile, U, memory, blocks, t, lane)
        if const_expr(tensors.ssm_state_indices is not None):
            indices = tensors.ssm_state_indices
            for t in cutlass.range(count, unroll=1):
                slot = Int64(indices[i, t])
                if in_range(slot, state.shape[0]):
                    corner = self.states.corner(state, (slot, h), row, lane)
                    self.write_state(corner, tile, U, memory, blocks, t, lane)
        if const_expr(self.spec.write_final):
            slot = unit.slot
            if const_expr(tensors.output_state_indices is not None):
                destinations = tensors.output_state_indices
                slot = Int64(destinations[i])
            accepted = span.total
            if const_expr(tensors.accepted_steps is not None):
                accepted_steps = tensors.accepted_steps
                accepted = Int32(accepted_steps[i])
            written = in_range(slot, state.shape[0])
            if const_expr(self.spec.sizes.one_tile):  # then in the chunk of the last accepted token alone
                accepted -= span.first
                written = written and accepted <= count and (accepted > 0 or span.first == 0)
            if written:
                corner = self.states.corner(state, (slot, h), row, lane)
                self.write_state(corner, tile, U, memory, blocks, accepted - 1, lane)

    @cute.jit
    def write_state(
        self,
        corner: list[cute.Pointer],
        tile: Tile,
        U: Groups,
        memory: ChunkMemory,
        blocks: range,
        t: Int32,
        lane: Int32,
    ) -> None:
        """Write blocks of the state after token t, or of the state before the tokens if t is -1."""
        update = self.chunk.load_update(U, memory, t, lane)
        for j in blocks:
            if const_expr(j % 4 == 0):  # otherwise LLVM moves all keys out of the loop over tokens, into registers
                cute.arch.sync_warp()
            old = [convert.unpack(words, self.tile_dtype) for words in tile[j]]
            self.states.store_block(corner, j, self.chunk.update(old, j, update))


class TokenChunks:
    """The path of `GatedDeltaRule` for more tokens than a chunk holds."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig) -> None:
        self.spec, self.step = spec, ChunkedTokens(spec, config)

    def allocate(self) -> SharedMemory:
        """Allocate the shared memory of a CTA."""
        return self.step.allocate()

    @cute.jit
    def run(self, tensors: Tensors, unit: Unit, shared: SharedMemory, scale: Float32) -> None:
        """Process all rows of a unit."""
        states, size, total = self.step.states, self.step.chunk.tokens, tensors.q.shape[1]
        place = self.step.place(unit)
        tile = states.load(states.corner(tensors.initial_state, (unit.slot, unit.head), place.row, place.lane))
        tile = widened(tile, states.dtype)
        memory = self.step.layout.new_chunk(shared)
        for first in cutlass.range(0, total, size, unroll=1):
            part = tensors.of_chunk(first, cutlass.min(total - first, size))
            # pinned: otherwise LLVM computes all addresses before the loop and keeps them in registers
            request, head, key_head, in_group, row = [pinned(Int32(index)) for index in unit[:-1]]
            indices = Unit(request, head, key_head, in_group, row, unit.slot)
            thread, lane, tile_row, column = [pinned(Int32(index)) for index in (place.thread, *place[2:])]
            here = Place(thread, place.warp, lane, tile_row, column)
            tile = self.advance(part, indices, tile, memory, scale, here, Span(first, total))
            cute.arch.sync_threads()  # the next chunk takes the memory of this one

    @cute.jit
    def advance(
        self, part: Tensors, unit: Unit, tile: Tile, memory: ChunkMemory, scale: Float32, place: Place, span: Span
    ) -> Tile:
        """Process the tokens of `part` and return the tile after all of them, or if they are the last, any tile."""
        step, chunk, count = self.step, self.step.chunk, part.q.shape[1]
        lane, row, column = place.lane, place.row, place.column
        step.prepare(part, unit, memory, scale, place)
        lane = pinned(Int32(lane))
        products = chunk.products(tile, Float32, memory.keys, lane)
        V = step.tokens.load_values(memory.values, column, chunk, lane)
        coefficients = chunk.load_coefficients(memory.tables, pinned(Int32(lane)))
        solution = chunk.solve(products, coefficients, V, lane, tile, None)
        U = solution.U
        step.outputs.store_tile(part.output, solution.outputs, U, unit, row, memory.values, column, count, lane)
        if const_expr(self.spec.vector_output):
            step.outputs.copy(part.output, unit, row, memory.values, column, count, lane)
        if const_expr(self.spec.writes):
            step.write_states(part, unit, tile, U, memory, pinned(Int32(row)), pinned(Int32(lane)), span)
        if span.first + count < span.total:  # then the chunk is full
            tile = self.after_chunk(tile, U, memory, pinned(Int32(lane)))
        return tile

    def after_chunk(self, tile: Tile, U: Groups, memory: ChunkMemory, lane: Int32) -> Tile:
        """Return the tile after all tokens of a full chunk."""
        chunk = self.step.chunk
        return chunk.advanced(tile, chunk.load_update(U, memory, chunk.tokens - 1, lane), PART)

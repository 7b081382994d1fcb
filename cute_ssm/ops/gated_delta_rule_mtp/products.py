"""`ChunkedTokens`: all tokens of a request at once, by products on tensor cores.

A warp loads its first tile of the state into registers before anything else.  Then all warps copy keys, queries and
values to shared memory, the first warp computes the coefficients, which depend on no row of the state, and every warp
proceeds on its own.  Once a tile is multiplied, the next one takes its registers, unless states are to be written.
"""

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from cute_ssm.arch import WARP
from cute_ssm.device import convert
from cute_ssm.device.bounds import in_range
from cute_ssm.ops._gated_delta.chunk import Groups, TokenChunk
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig
from cute_ssm.ops._gated_delta.layout import TILE, chunk_tokens
from cute_ssm.ops._gated_delta.outputs import OutputRows
from cute_ssm.ops._gated_delta.shared import ChunkMemory, SharedLayout, SharedMemory
from cute_ssm.ops._gated_delta.states import StateTiles, Tile
from cute_ssm.ops._gated_delta.tokens import TokenRows
from cute_ssm.ops._gated_delta.units import Unit
from cute_ssm.ops.gated_delta_rule_mtp.gates import TokenGates
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec
from cute_ssm.ops.gated_delta_rule_mtp.tensors import Tensors

PART = 8  # blocks of a state that are written at a time


class ChunkedTokens:
    """The path of `GatedDeltaRule` without ``config.sequential``."""

    def __init__(self, spec: GatedDeltaRuleSpec, config: GatedDeltaRuleConfig) -> None:
        self.spec, self.config = spec, config
        self.layout = SharedLayout(spec.sizes, config.rows)
        self.chunk = TokenChunk(chunk_tokens(spec.tokens), spec.K, spec.l2norm)
        self.states = StateTiles(convert.DTYPES[spec.state_dtype], spec.K, spec.saturate)
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
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(thread // WARP) if const_expr(self.config.warps > 1) else Int32(0)
        first_row = unit.first_row + warp * (self.tiles_per_warp * TILE)
        tile = self.states.load(self.states.corner(state, coordinate, first_row, lane))
        memory = self.layout.new_chunk(shared)
        self.tokens.stage(tensors.q, tensors.k, tensors.v, unit, self.chunk, memory, thread)
        if const_expr(self.spec.writes):
            self.tokens.clear_key(memory.keys + self.chunk.zeros, thread)
        cute.arch.sync_threads()
        if warp == 0:
            alpha, beta = self.gates.load(tensors, unit, count, lane)
            self.chunk.prepare(alpha, beta, scale, memory, lane)
        cute.arch.sync_threads()
        coefficients = self.chunk.load_coefficients(memory.tables, lane)
        column = warp * (self.tiles_per_warp * TILE)
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
                self.write_states(tensors, unit, tile, U, memory, row, lane)
                if const_expr(m + 1 < self.tiles_per_warp):
                    following = self.states.load(ahead)
            tile = following
        if const_expr(self.spec.vector_output):
            self.outputs.copy(tensors.output, unit, first_row, memory.values, column, count, lane)

    def write_states(
        self, tensors: Tensors, unit: Unit, tile: Tile, U: Groups, memory: ChunkMemory, row: Int32, lane: Int32
    ) -> None:
        """Write all states of a tile that the call asks for, `PART` blocks at a time to limit registers."""
        for first in range(0, self.states.blocks, PART):
            blocks = range(first, min(first + PART, self.states.blocks))
            self.write_blocks(tensors, unit, tile, U, memory, blocks, row, lane)

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
            accepted = count
            if const_expr(tensors.accepted_steps is not None):
                accepted_steps = tensors.accepted_steps
                accepted = Int32(accepted_steps[i])
            if in_range(slot, state.shape[0]):
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
            old = [convert.unpack(words, self.states.dtype) for words in tile[j]]
            self.states.store_block(corner, j, self.chunk.update(old, j, update))

"""Units of work of `CheckpointingSSU`: how a launch is divided into them, and what warps pass to each other."""

from typing import NamedTuple, Union

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr

from cute_ssm.device import memory
from cute_ssm.device.bounds import in_range
from cute_ssm.device.history import HistoryView
from cute_ssm.device.types import Maybe
from cute_ssm.ops.checkpointing_ssu.config import READ_UNITS, WRITE_UNITS, LaunchConfig, UnitLayout
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec

INACTIVE = -1  # `UnitHeader.pending` of a unit without work


# ------------------------------------------------------------------------------------------------------ global memory
class SequenceTensors(NamedTuple):
    """Tensors that give each sequence its slot, its cursors and its tokens."""

    cursor: cute.Tensor
    prev_num_accepted_tokens: cute.Tensor
    state_batch_indices: Maybe[cute.Tensor]
    cu_seqlens: Maybe[cute.Tensor]
    work_items: Maybe[cute.Tensor]
    num_writes: Maybe[cute.Tensor]


class InputTensors(NamedTuple):
    """Inputs of the new tokens, and the parameters of the layer."""

    x: cute.Tensor
    dt: cute.Tensor
    A: cute.Tensor
    B: cute.Tensor
    C: cute.Tensor
    D: Maybe[cute.Tensor]
    z: Maybe[cute.Tensor]
    dt_bias: Maybe[cute.Tensor]


class OutputTensors(NamedTuple):
    """Tensors that consumers write beside the state, and the seed that states are rounded with."""

    out: cute.Tensor
    state_scale: Maybe[cute.Tensor]
    rand_seed: Maybe[cute.Tensor]


class Work(NamedTuple):
    """What `Scheduler` makes units from."""

    state: cute.Tensor
    dt_history: cute.Tensor
    sequences: SequenceTensors
    batch: Int32
    total_tokens: Int32
    pad_slot: Int64


class WorkItem(NamedTuple):
    """A row of ``work_items``."""

    sequence: Int32
    slot: Int32
    pending: Int32
    cursor: Int32


# -------------------------------------------------------------------------------------------------------------- units
class UnitRange(NamedTuple):
    """The units of a CTA."""

    first: Int32
    end: Int32
    stride: Int32


class Unit(NamedTuple):
    """Some tiles of the state of one sequence and group of heads."""

    sequence: Int32
    first_token: Int32  # row of x, with cu_seqlens
    num_tokens: Int32
    slot: Int64
    cursor: Int32
    pending: Int32
    head: Int32  # of the first tile
    column: Int32  # of x, first of the first tile in its head
    tile: Int32  # of the slot
    active: Boolean


class UnitHeader(NamedTuple):
    """What consumers read of a unit: eight words in shared memory."""

    pending: Int32  # or `INACTIVE`
    num_tokens: Int32
    sequence: Int32
    first_token: Int32
    slot: Int32
    head: Int32
    column: Int32
    tile: Int32

    @staticmethod
    def load(pointer: cute.Pointer) -> "UnitHeader":
        """Load a header, in two vectors of four words."""
        return UnitHeader(*memory.load_words(pointer, 4), *memory.load_words(pointer + 4, 4))


class Scheduler:
    """Divides the work of a launch into units, and units among CTAs."""

    def __init__(self, spec: CheckpointingSSUSpec, launch: LaunchConfig, layout: UnitLayout, history_view: HistoryView):
        self.spec, self.launch, self.layout, self.history_view = spec, launch, layout, history_view
        self.units_per_sequence = spec.heads * launch.d_split // launch.tiles

    @cute.jit
    def units_of_cta(self, num_writes: Maybe[cute.Tensor], batch: Int32) -> UnitRange:
        """Return the units of this CTA.  Work items whose steps write come first, `num_writes` of them."""
        first, last = Int32(0), batch
        if const_expr(self.launch.works_on == WRITE_UNITS):
            last = cutlass.min(cutlass.max(num_writes[0], 0), batch)
        elif const_expr(self.launch.works_on == READ_UNITS):
            first = cutlass.min(cutlass.max(num_writes[0], 0), batch)
        per_sequence = self.units_per_sequence
        return UnitRange(first * per_sequence + cute.arch.block_idx()[0], last * per_sequence, cute.arch.grid_dim()[0])

    @cute.jit
    def unit(self, index: Int32, work: Work) -> Unit:
        """Return a unit.  Invalid slots, cursors and lengths make it inactive, before they are used as addresses."""
        spec, launch = self.spec, self.launch
        sequences = work.sequences
        item = Int32(Uint32(index) // self.units_per_sequence)
        tile = Uint32(index - item * self.units_per_sequence) * launch.tiles
        head, column = Int32(tile // launch.d_split), Int32(tile % launch.d_split) * self.layout.tile_rows
        sequence, slot = item, Int64(item)
        pending, cursor = Int32(0), Int32(0)
        if const_expr(spec.work_items):
            found = WorkItem(*memory.load_words(memory.address(sequences.work_items, item, 0), 4))
            sequence, pending, cursor = found.sequence, found.pending, found.cursor
            slot = Int64(found.slot)
        elif const_expr(sequences.state_batch_indices is not None):
            slot = Int64(sequences.state_batch_indices[item])
        active = slot != work.pad_slot and in_range(slot, work.state.shape[0])
        if const_expr(spec.work_items):
            active = active and in_range(sequence, work.batch)
            sequence = sequence if active else Int32(0)
        slot = slot if active else Int64(0)
        if const_expr(not spec.work_items):
            pending, cursor = sequences.prev_num_accepted_tokens[slot], sequences.cursor[slot]
        start, num_tokens = Int32(0), Int32(spec.tokens)
        if const_expr(sequences.cu_seqlens is not None):
            first, last = Int64(sequences.cu_seqlens[sequence]), Int64(sequences.cu_seqlens[sequence + 1])
            active = (
                active and first >= 0 and last <= work.total_tokens and last > first and last - first <= spec.tokens
            )
            start, num_tokens = Int32(first), Int32(last - first)
        bound = self.history_view.num_cursors(work.dt_history)
        active = active and in_range(pending, spec.window + 1) and in_range(cursor, bound)
        if const_expr(launch.works_on == WRITE_UNITS):
            active = active and pending + num_tokens > spec.window
        elif const_expr(launch.works_on == READ_UNITS):
            active = active and pending + num_tokens <= spec.window
        return Unit(sequence, start, num_tokens, slot, cursor, pending, head, column, Int32(tile), active)


class TokenRows:
    """Addresses of new tokens in x, dt, B, C, z and out."""

    def __init__(self, packed: bool):
        self.packed = packed

    def address(
        self,
        tensor: cute.Tensor,
        unit: Union[Unit, UnitHeader],
        token: Union[Int32, int],
        *coordinate: Union[Int32, int],
    ) -> cute.Pointer:
        """Return the address of an element of a token of the unit's sequence."""
        if not self.packed:
            return memory.address(tensor, unit.sequence, token, *coordinate)
        return memory.address(tensor, 0, unit.first_token + token, *coordinate)


# ---------------------------------------------------------------------------------------------------------- pipelines
class Barriers(NamedTuple):
    """Arrays of mbarriers: one per stage of tiles, and one per buffer of a unit."""

    full: cute.Pointer
    empty: cute.Pointer
    unit_full: cute.Pointer
    unit_empty: cute.Pointer


class StagePhase(NamedTuple):
    """A stage of a pipeline, and the phase of its barriers."""

    stage: Int32
    phase: Int32


class Pipelines:
    """Stages and phases of the pipelines in shared memory: one of units, and one of tiles for each consumer."""

    def __init__(self, launch: LaunchConfig):
        self.unit_stages, self.consumers, self.depth = launch.unit_stages, launch.consumers, launch.depth

    def unit_stage(self, count: Int32) -> StagePhase:
        """Return the buffer and phase of a CTA's unit number `count`."""
        if self.unit_stages == 1:
            return StagePhase(Int32(0), count & 1)
        return StagePhase(count & 1, count >> 1 & 1)

    def tile_stage(self, count: Union[Int32, int]) -> StagePhase:
        """Return the first consumer's stage, and the phase, of each consumer's tile number `count`."""
        stage = (count & (self.depth - 1)) * self.consumers
        return StagePhase(stage, count >> (self.depth.bit_length() - 1) & 1)


class TilePipeline(NamedTuple):
    """A consumer's pipeline of tiles while it works on a unit."""

    full: cute.Pointer
    empty: cute.Pointer
    first_tile: Int32  # tiles of this consumer before the unit
    consumer: Int32


class UnitBuffers(NamedTuple):
    """Where a consumer finds a unit in shared memory."""

    units: cute.Pointer  # of all buffers
    offset: Int32  # of this unit's buffer
    tile_pointers: list[cute.Pointer]  # this lane's, by `StateTile.pointers`

"""`StateStores`: how `SelectiveStep` rounds new states and writes them, with their scales, to their slots."""

from typing import Any, NamedTuple, Optional

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from cute_ssm.device import memory, philox
from cute_ssm.device.bounds import in_range
from cute_ssm.device.state import Block, StateView
from cute_ssm.device.types import Maybe
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec
from cute_ssm.ops.selective_state_update.units import Scalars, Tensors, Unit


class ScaleTarget(NamedTuple):
    """A scale: the tensor, and the coordinate of the lane's row in it.  Both are None if states have no scales."""

    scales: Maybe[cute.Tensor]
    coordinate: tuple[Any, ...]


class BlockTarget(NamedTuple):
    """Where a block goes: the slot or row of the buffer, its address there, and its scales."""

    slot: Int64
    address: cute.Pointer
    scale: ScaleTarget


class StateStores:
    """Rounds blocks of new states into shared memory, and copies those of single tokens to global memory."""

    def __init__(self, spec: SelectiveStateUpdateSpec, view: StateView) -> None:
        self.spec, self.view = spec, view

    def load_scale(self, tensors: Tensors, unit: Unit, row: Int32) -> Optional[Float32]:
        """Load the scale of this lane's row of the state that is read, if states have scales."""
        if not self.view.scaled:
            return None
        return memory.load_scalar(memory.address(tensors.state_scale, unit.slot, unit.head, row), Float32)

    def random(self, tensors: Tensors, unit: Unit, slot: Int64, token: Int32) -> Optional[philox.RowRandom]:
        """Return what the random bits of the state after a token are drawn from; None: round to nearest.

        `slot` is the slot, or the row of the buffer, that is written.
        """
        if tensors.rand_seed is None:
            return None
        seed = tensors.rand_seed[unit.slot if self.spec.seed_per_slot else 0]
        keys = philox.round_keys(seed, self.spec.philox_rounds)
        return philox.RowRandom(keys, philox.row_counter(slot, unit.head, token))

    @cute.jit
    def store_rows(
        self,
        scale_target: ScaleTarget,
        active: Boolean,
        rows: list[list[Float32]],
        block: Block,
        random: Optional[philox.RowRandom],
        lane: Int32,
    ) -> None:
        """Quantise a block into shared memory, and write its scales to global memory if `active`."""
        row_scale = self.view.encode(rows)
        for s in cutlass.range_constexpr(self.view.steps):
            self.view.store(block, lane, s, rows[s], row_scale.encode, random)
        if active and self.view.owns_row(lane):
            memory.store_scalar(memory.address(scale_target.scales, *scale_target.coordinate), row_scale.scale, Float32)

    @cute.jit
    def store_token_state(
        self,
        tensors: Tensors,
        scalars: Scalars,
        unit: Unit,
        rows: list[list[Float32]],
        block: Block,
        token: Int32,
        lane: Int32,
    ) -> None:
        """Write a block's state after a token to the destination of that token."""
        if const_expr(self.spec.intermediates):
            buffer = tensors.intermediate_states_buffer
            indices = tensors.intermediate_state_indices
            row, inside = unit.slot, Boolean(True)
            if const_expr(self.spec.intermediate_dtype is not None):
                row = Int64(indices[unit.sequence])
                inside = in_range(row, buffer.shape[0])
            address = memory.address(buffer, row, token, unit.head, block.first_row, 0)
            scale = ScaleTarget(tensors.intermediate_state_scales, (row, token, unit.head, block.row))
            if inside:
                self.copy_block(tensors, unit, rows, block, BlockTarget(row, address, scale), token, lane)
        if const_expr(self.spec.update_state and self.spec.dst_columns):
            destinations = tensors.dst_state_batch_indices
            slot = Int64(destinations[unit.sequence, token])
            address = memory.address(tensors.state, slot, unit.head, block.first_row, 0)
            scale = ScaleTarget(tensors.state_scale, (slot, unit.head, block.row))
            if slot != scalars.pad_slot_id and in_range(slot, tensors.state.shape[0]):
                self.copy_block(tensors, unit, rows, block, BlockTarget(slot, address, scale), token, lane)

    @cute.jit
    def copy_block(
        self,
        tensors: Tensors,
        unit: Unit,
        rows: list[list[Float32]],
        block: Block,
        target: BlockTarget,
        token: Int32,
        lane: Int32,
    ) -> None:
        """Round a block into its own shared memory and start a bulk copy of it to `target`."""
        self.wait_for_copies(lane)
        random = self.random(tensors, unit, target.slot, token)
        if const_expr(self.view.scaled):
            self.store_rows(target.scale, Boolean(True), rows, block, random, lane)
        else:
            for s in cutlass.range_constexpr(self.view.steps):
                self.view.store(block, lane, s, rows[s], None, random)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            memory.bulk_store(memory.global_bytes(target.address.toint()), block.at, self.view.bytes)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def wait_for_copies(self, lane: Int32) -> None:
        """Wait until no bulk copy reads this warp's shared memory."""
        if lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
        cute.arch.sync_warp()

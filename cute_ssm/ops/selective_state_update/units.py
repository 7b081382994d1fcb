"""What the parts of `SelectiveStep` pass to each other: tensors, units of work, stages."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from cute_ssm.device import memory
from cute_ssm.device.types import Maybe


class Tensors(NamedTuple):
    """The tensors of a call, by the names of the operator's arguments."""

    state: cute.Tensor
    x: cute.Tensor
    dt: cute.Tensor
    A: cute.Tensor
    B: cute.Tensor
    C: cute.Tensor
    D: Maybe[cute.Tensor]
    z: Maybe[cute.Tensor]
    dt_bias: Maybe[cute.Tensor]
    out: cute.Tensor
    state_scale: Maybe[cute.Tensor]
    state_batch_indices: Maybe[cute.Tensor]
    dst_state_batch_indices: Maybe[cute.Tensor]
    num_accepted_tokens: Maybe[cute.Tensor]
    cu_seqlens: Maybe[cute.Tensor]
    intermediate_states_buffer: Maybe[cute.Tensor]
    intermediate_state_indices: Maybe[cute.Tensor]
    intermediate_state_scales: Maybe[cute.Tensor]
    rand_seed: Maybe[cute.Tensor]


class Scalars(NamedTuple):
    """The numbers of a call.

    Attributes
    ----------
    pad_slot_id : Int64
        Slot of sequences that are padding.
    max_tokens : Int32
        Bound of the tokens of a sequence of ``cu_seqlens``.
    units : Int32
        Units of the call.
    nheads, heads_per_group : FastDivmodDivisorV2
        Divisors.
    """

    pad_slot_id: Int64
    max_tokens: Int32
    units: Int32
    nheads: cute.FastDivmodDivisorV2
    heads_per_group: cute.FastDivmodDivisorV2


class Unit(NamedTuple):
    """Rows of one head's state, and the tokens that update them.

    Attributes
    ----------
    sequence, head : Int32
    first_token, num_tokens : Int32
        First row of the sequence in packed tensors, else 0; its number of tokens.
    first_row : Int32
        First row of the unit in the head.
    slot : Int64
        Slot that the state is read from.
    address : Int64
        Address of the unit in that slot.
    active : Boolean
        False for padding and for sequences whose slot, offsets or ``num_accepted_tokens`` are out of range: nothing
        of their state is read or written.
    """

    sequence: Int32
    first_token: Int32
    num_tokens: Int32
    head: Int32
    first_row: Int32
    slot: Int64
    address: Int64
    active: Boolean


class Destination(NamedTuple):
    """The slot that a unit's last state is written to, and whether it is written at all."""

    slot: Int64
    active: Boolean


class Stage(NamedTuple):
    """A unit's place in shared memory, and the barrier that counts its bytes."""

    at: cute.Pointer
    full: cute.Pointer


def batch_of(tensors: Tensors) -> Int32:
    """Return the number of sequences of a call."""
    return tensors.x.shape[0] if tensors.cu_seqlens is None else tensors.cu_seqlens.shape[0] - 1


def pin(unit: Unit) -> Unit:
    """Return the unit with its sequence and head computed here, once for all uses in a loop."""
    sequence = memory.pinned(Int32(unit.sequence))
    return unit._replace(sequence=sequence, head=memory.pinned(Int32(unit.head)))

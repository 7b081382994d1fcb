"""What the parts of `SelectiveScan` pass to each other: tensors, units of work, sequences, and a lane's channel."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from cute_ssm.device.scan import TokenRange
from cute_ssm.device.types import Maybe


class Tensors(NamedTuple):
    """The tensors of a call by their public names; packed ones have a first axis of 1.

    ``ungated`` receives the outputs before the gate.  ``carried`` (sequences, splits, dim, columns) is the scratch
    memory of `Parts`.
    """

    u: cute.Tensor
    ssm_states: Maybe[cute.Tensor]
    delta: cute.Tensor
    A: cute.Tensor
    B: cute.Tensor
    C: cute.Tensor
    D: Maybe[cute.Tensor]
    z: Maybe[cute.Tensor]
    delta_bias: Maybe[cute.Tensor]
    query_start_loc: Maybe[cute.Tensor]
    cache_indices: Maybe[cute.Tensor]
    has_initial_state: Maybe[cute.Tensor]
    block_idx_first_scheduled_token: Maybe[cute.Tensor]
    block_idx_last_scheduled_token: Maybe[cute.Tensor]
    initial_state_idx: Maybe[cute.Tensor]
    cu_chunk_seqlen: Maybe[cute.Tensor]
    last_chunk_indices: Maybe[cute.Tensor]
    out: cute.Tensor
    ungated: Maybe[cute.Tensor]
    carried: Maybe[cute.Tensor]


class Unit(NamedTuple):
    """A part of a sequence, and the channel of this lane in a tile of channels of one group.

    Lanes beyond the last channel of the group are not `active`: they read another channel, and write nothing.
    """

    sequence: Int32
    part: Int32
    group: Int32
    channel: Int32
    active: Boolean


class Sequence(NamedTuple):
    """Tokens of a sequence, and the slot of its initial state; `active` if there is anything to do."""

    tokens: TokenRange
    slot: Int64
    active: Boolean
    has_initial: Boolean


class Rows(NamedTuple):
    """Rows of one channel's tokens; token t is element t."""

    u: cute.Pointer
    delta: cute.Pointer
    z: Optional[cute.Pointer]
    out: cute.Pointer
    ungated: Optional[cute.Pointer]


class ColumnBlock(NamedTuple):
    """A block of tokens of one row of B or C that a thread brings: the row, and the first token in a tile."""

    row: cute.Pointer
    token: Int32
    active: Boolean


class Channel(NamedTuple):
    """What a lane scans: rows and weights of its channel, the B and C that it brings, and shared memory for these."""

    rows: Rows
    columns: list[ColumnBlock]
    D: Optional[Float32]
    delta_bias: Optional[Float32]
    rates: list[Float32]
    shared: cute.Pointer
    thread: Int32
    active: Boolean

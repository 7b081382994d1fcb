"""The arguments of `commit`: their table, and the checks of this operator."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops._cursors.arguments import check_rows, cursors_of, spec_fields
from cute_ssm.ops._table import INDICES, INT32, Arg, Table
from cute_ssm.ops.commit.spec import CommitSpec
from cute_ssm.reference.cursors import Cursors


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors."""

    prev_num_accepted_tokens: Annotated[Tensor, Arg("slots", INT32, written=True)]
    cursor: Annotated[Tensor, Arg("slots", INT32, written=True), "place"]
    num_accepted_tokens: Annotated[Tensor, Arg("batch", INDICES)]
    state_batch_indices: Annotated[Tensor | None, Arg("batch", INDICES)]
    cu_seqlens: Annotated[Tensor | None, Arg("batch+1", INDICES)]
    rand_seed: Annotated[Tensor | None, Arg("layers slots", ("int64",), contiguous=1, written=True)]
    unallocated: Annotated[Tensor | None, Arg("slots", ("bool",))]
    ring: bool
    pad_slot_id: int
    tokens: int
    window: int
    num_cursors: Annotated[int, "places"]


TABLE = Table(Arguments)


def check(call: Arguments) -> CommitSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    check_rows(TABLE, call, "num_accepted_tokens")
    return CommitSpec(
        **spec_fields(call),
        accepted_dtype=arguments.name_of(call.num_accepted_tokens.dtype),
        seeds=call.rand_seed is not None,
        unallocated=call.unallocated is not None,
    )


def rows_of(call: Arguments) -> Cursors:
    """Return the rows of a call on the CPU."""
    return cursors_of(call, call.num_accepted_tokens.shape[0])


def check_contents(call: Arguments) -> None:
    """Raise on numbers that no step can have accepted, and on slots that no row, or two rows, may advance."""
    cursors, accepted = rows_of(call), call.num_accepted_tokens
    if call.unallocated is not None:
        advanced = cursors.active & (accepted >= 0)
        name = "state_batch_indices"
        arguments.check_allocated(name, cursors.slots, call.unallocated, advanced, call.pad_slot_id)
    most = cursors.num_tokens.clamp(max=cursors.window)
    bad = (cursors.active & (accepted > most)).nonzero()[:, 0].tolist()
    if bad:
        expected = f"at most {int(most[bad[0]])} of the row's tokens"
        raise ValueError(describe("num_accepted_tokens", expected, f"{int(accepted[bad[0]])} at position {bad[0]}"))
    slots = cursors.slots[cursors.active].sort().values
    repeated = slots[1:][slots[1:] == slots[:-1]]
    if len(repeated):
        got = f"{int(repeated[0])} more than once"
        raise ValueError(describe("state_batch_indices", "a slot of its own for each row", got))

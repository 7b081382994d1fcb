"""The arguments of `build_work_items`: their table, and the checks of this operator."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from torch import Tensor

from cute_ssm.ops._cursors.arguments import check_rows, cursors_of, spec_fields
from cute_ssm.ops._table import INDICES, INT32, Arg, Table
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec
from cute_ssm.reference.cursors import Cursors

ITEM_BYTES = 16  # of a work item, which one access stores


class Arguments(NamedTuple):
    """The arguments of a call in the order of the schema, which starts with the kernel's tensors."""

    prev_num_accepted_tokens: Annotated[Tensor, Arg("slots", INT32)]
    cursor: Annotated[Tensor, Arg("slots", INT32), "place"]
    state_batch_indices: Annotated[Tensor | None, Arg("batch", INDICES)]
    cu_seqlens: Annotated[Tensor | None, Arg("batch+1", INDICES)]
    work_items: Annotated[Tensor, Arg("batch 4", INT32, contiguous=2, align=ITEM_BYTES, written=True)]
    num_writes: Annotated[Tensor, Arg("1", INT32, written=True)]
    ring: bool
    pad_slot_id: int
    tokens: int
    window: int
    num_cursors: Annotated[int, "places"]


TABLE = Table(Arguments)


def check(call: Arguments) -> WorkItemsSpec:
    """Raise unless the call is as the operator documents it; return its spec."""
    check_rows(TABLE, call, "work_items")
    return WorkItemsSpec(**spec_fields(call))


def rows_of(call: Arguments) -> Cursors:
    """Return the rows of a call on the CPU."""
    return cursors_of(call, call.work_items.shape[0])


def check_contents(call: Arguments) -> None:
    """Raise on slots, offsets and cursors out of range."""
    rows_of(call)

"""What `build_work_items` computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.reference.cursors import Cursors


def work_items(cursors: Cursors, pad_slot_id: int) -> tuple[Tensor, int]:
    """Return the rows of a batch as work items, and how many of them write.

    An item is (position in the batch, slot, pending tokens, cursor).  Rows that write come first; both groups are in
    the order of the batch.  Inactive rows, with the slot `pad_slot_id` and zeros, are among those that do not write.

    Parameters
    ----------
    cursors : Cursors
    pad_slot_id : int

    Returns
    -------
    items : Tensor, (batch, 4), int32
    num_writes : int
    """
    c = cursors
    safe = torch.where(c.active, c.slots, 0)
    columns = [c.slots, *(t[safe].long() if len(t) else t.new_zeros(len(safe)).long() for t in (c.pending, c.cursor))]
    inactive = (pad_slot_id, 0, 0)
    columns = [torch.where(c.active, column, value) for column, value in zip(columns, inactive)]
    items = torch.stack([torch.arange(len(c.slots)), *columns], 1).to(torch.int32)
    writes = c.writes()
    return torch.cat([items[writes], items[~writes]]), int(writes.sum())

"""`build_work_items`, as mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.reference.cursors import Cursors


def work_items(cursors: Cursors, pad_slot_id: int) -> tuple[Tensor, int]:
    """Return the rows of a batch as work items, and how many of them write.

    An item is (position in the batch, slot, PNAT, buffer or start).  Rows that write come first, and both kinds are in
    the order of the batch.  Rows that are not live have the slot `pad_slot_id` and zeros, among those that do not.

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
    safe = torch.where(c.live, c.slots, 0)
    columns = [c.slots, *(t[safe].long() if len(t) else t.new_zeros(len(safe)).long() for t in (c.pnat, c.place))]
    empty = (pad_slot_id, 0, 0)
    columns = [torch.where(c.live, column, value) for column, value in zip(columns, empty)]
    items = torch.stack([torch.arange(len(c.slots)), *columns], 1).to(torch.int32)
    writes = c.writes()
    return torch.cat([items[writes], items[~writes]]), int(writes.sum())

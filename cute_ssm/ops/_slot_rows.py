"""`SlotRows`: the rows of a batch whose states go from one slot to another, read from tensors on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.reference.history import Move


class SlotRows(NamedTuple):
    """What both functions that materialize states read.

    Attributes
    ----------
    state, out : Tensor, (slots, ...)
        Pools that are read and written.
    src, dst, counts : Tensor, (batch,)
        Their slots, and the numbers of pending tokens to fold, or None for all.
    pnat, cursor : Tensor, (slots,)
        Pending tokens of each slot, `most` at most, and the place of the oldest one, a number below `places`.
    cursor_name : str
    """

    state: Tensor
    out: Tensor
    src: Tensor
    dst: Tensor
    counts: Tensor | None
    pnat: Tensor
    most: int
    cursor: Tensor
    cursor_name: str
    places: int

    def read(self, live: Tensor, pad_slot_id: int) -> list[Move]:
        """Return what rows that are live ask for; raise if what they hold does not fit."""
        src, dst = self.src.long(), self.dst.long()
        arguments.check_slots("state_batch_indices", src, live, self.state.shape[0], pad_slot_id)
        arguments.check_slots("dst_state_batch_indices", dst, live, self.out.shape[0], pad_slot_id)
        for name, values, limit in (
            ("prev_num_accepted_tokens", self.pnat, self.most),
            (self.cursor_name, self.cursor, self.places - 1),
        ):
            bad = [slot for slot in src[live].tolist() if not 0 <= int(values[slot]) <= limit]
            if bad:
                got = f"{int(values[bad[0]])} in slot {bad[0]}"
                raise ValueError(describe(name, f"values from 0 to {limit}", got))
        pending = self.pnat[torch.where(live, src, 0)].long() if len(self.state) else src
        counts = pending if self.counts is None else self.counts.long()
        wrong = (live & ((counts < 0) | (counts > pending))).nonzero()[:, 0].tolist()
        if wrong:
            expected = f"0 to {int(pending[wrong[0]])}, the pending tokens of the slot"
            raise ValueError(describe("num_tokens", expected, f"{int(counts[wrong[0]])} at position {wrong[0]}"))
        source, target = src[live], dst[live]
        ordered = target.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(describe("dst_state_batch_indices", "distinct slots", f"{int(twice[0])} more than once"))
        if self.out.data_ptr() == self.state.data_ptr():
            position = torch.arange(len(source))
            foreign = (target[:, None] == source) & (position[:, None] != position)
            if bool(foreign.any()):
                slot = int(target[foreign.any(1)][0])
                expected = "slots that no other row reads"
                raise ValueError(describe("dst_state_batch_indices", expected, slot, "their order is not defined"))
        found = torch.stack([source, target, self.cursor[source].long(), counts[live]], 1).tolist()
        return [Move(*row) for row in found]

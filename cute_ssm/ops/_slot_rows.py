"""`SlotRows`: check the source and destination slots of a batch of states, in tensors on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.reference.history import Move


class SlotRows(NamedTuple):
    """The tensors that `materialize` and `materialize_gated_delta` check row by row.

    Attributes
    ----------
    state, out : Tensor, (slots, ...)
        Pools that are read and written.
    src, dst, num_tokens : Tensor, (batch,)
        Slots that are read and written, and the numbers of pending tokens to fold; None: all.
    pending, cursor : Tensor, (slots,)
        Number of pending tokens of each slot, at most `most_pending`, and its cursor, less than `num_cursors`.
    cursor_name : str
        Argument that `cursor` is, for messages.
    """

    state: Tensor
    out: Tensor
    src: Tensor
    dst: Tensor
    num_tokens: Tensor | None
    pending: Tensor
    most_pending: int
    cursor: Tensor
    cursor_name: str
    num_cursors: int

    def read(self, active: Tensor, pad_slot_id: int) -> list[Move]:
        """Return the moves of the active rows; raise if an index or a number is out of range."""
        src, dst = self.src.long(), self.dst.long()
        arguments.check_slots("state_batch_indices", src, active, self.state.shape[0], pad_slot_id)
        arguments.check_slots("dst_state_batch_indices", dst, active, self.out.shape[0], pad_slot_id)
        for name, values, limit in (
            ("prev_num_accepted_tokens", self.pending, self.most_pending),
            (self.cursor_name, self.cursor, self.num_cursors - 1),
        ):
            bad = [slot for slot in src[active].tolist() if not 0 <= int(values[slot]) <= limit]
            if bad:
                got = f"{int(values[bad[0]])} in slot {bad[0]}"
                raise ValueError(describe(name, f"values from 0 to {limit}", got))
        pending = self.pending[torch.where(active, src, 0)].long() if len(self.state) else src
        counts = pending if self.num_tokens is None else self.num_tokens.long()
        wrong = (active & ((counts < 0) | (counts > pending))).nonzero()[:, 0].tolist()
        if wrong:
            expected = f"0 to {int(pending[wrong[0]])}, the pending tokens of the slot"
            raise ValueError(describe("num_tokens", expected, f"{int(counts[wrong[0]])} at position {wrong[0]}"))
        source, target = src[active], dst[active]
        ordered = target.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(describe("dst_state_batch_indices", "distinct slots", f"{int(twice[0])} more than once"))
        if self.out.data_ptr() == self.state.data_ptr():
            position = torch.arange(len(source))
            others = (target[:, None] == source) & (position[:, None] != position)
            if bool(others.any()):
                slot = int(target[others.any(1)][0])
                expected = "slots that no other row reads"
                raise ValueError(describe("dst_state_batch_indices", expected, slot, "rows are processed in any order"))
        found = torch.stack([source, target, self.cursor[source].long(), counts[active]], 1).tolist()
        return [Move(*row) for row in found]

"""The cursors of a batch between steps of a model, as mathematics.

A slot holds a state and a *history*: the inputs of tokens that are accepted but not yet in the state.  Two cursors say
where: PNAT, the number of *pending* tokens, and either the index of the active one of two buffers or the row of a ring
that holds the oldest pending token.  A step with n tokens **writes** the state if PNAT + n > window: it first folds all
pending tokens, so that afterwards only its own are pending.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cursors:
    """The cursors of all slots, and the rows of a batch.

    Attributes
    ----------
    pnat : Tensor, (slots,), int32
        Pending tokens of each slot, at most `window`.
    place : Tensor, (slots,), int32
        Active buffer (0 or 1), or start in the ring.
    places : int
        Values that `place` takes: 2, or the rows of the ring.
    ring : bool
        Which of both it is.
    window : int
        Largest number of pending tokens.
    slots : Tensor, (batch,), int64
        Slot of each row; where it is not live, anything.
    counts : Tensor, (batch,), int64
        New tokens of each row.
    live : Tensor, (batch,), bool
        Rows that are not padding and have tokens.
    """

    pnat: Tensor
    place: Tensor
    places: int
    ring: bool
    window: int
    slots: Tensor
    counts: Tensor
    live: Tensor

    def writes(self) -> Tensor:
        """Whether the step of each row writes the state; False where it is not live."""
        pending = self.pnat[torch.where(self.live, self.slots, 0)] if len(self.pnat) else self.counts * 0
        return self.live & (pending + self.counts > self.window)

"""The cursors of a batch between the steps of a model: definitions, in plain PyTorch.

A slot holds a state and a *history*: the inputs of its *pending* tokens, which are accepted but not yet in the state.
``prev_num_accepted_tokens`` counts the pending tokens of each slot.  The *cursor* of a slot says where they lie: it is
the index of the active one of two buffers, or the row of a ring that holds the oldest pending token.  A step with n new
tokens **writes** the state if pending + n > window: it first folds all pending tokens into the state, so that
afterwards only its own tokens are pending.
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
    pending : Tensor, (slots,), int32
        Number of pending tokens of each slot, at most `window`.
    cursor : Tensor, (slots,), int32
        Active buffer (0 or 1), or first row in the ring.
    num_cursors : int
        Number of values of `cursor`: 2, or the rows of the ring.
    ring : bool
        Whether histories are rings.
    window : int
        Largest number of pending tokens.
    slots : Tensor, (batch,), int64
        Slot of each row; undefined for inactive rows.
    num_tokens : Tensor, (batch,), int64
        Number of new tokens of each row.
    active : Tensor, (batch,), bool
        Rows that are not padding and have new tokens.
    """

    pending: Tensor
    cursor: Tensor
    num_cursors: int
    ring: bool
    window: int
    slots: Tensor
    num_tokens: Tensor
    active: Tensor

    def writes(self) -> Tensor:
        """Return whether the step of each row writes the state; False for inactive rows."""
        pending = self.pending[torch.where(self.active, self.slots, 0)] if len(self.pending) else self.num_tokens * 0
        return self.active & (pending + self.num_tokens > self.window)

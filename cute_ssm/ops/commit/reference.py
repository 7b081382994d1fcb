"""What `commit` computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.reference.cursors import Cursors


def commit(cursors: Cursors, num_accepted: Tensor, seeds: Tensor | None) -> None:
    """Advance the cursors of active rows by their accepted tokens, and their seeds by one.

    The step of a row that writes has stored its new tokens in the other buffer, or in the ring behind the tokens that
    it folded: the number of pending tokens becomes `num_accepted`, and the buffer flips, or the ring starts where the
    folded tokens end.  The step of another row has appended its new tokens: the number of pending tokens grows by
    `num_accepted`.  Rows with a negative `num_accepted` do not change.

    Parameters
    ----------
    cursors : Cursors
        ``pending`` and ``cursor`` are **written**.
    num_accepted : Tensor, (batch,), integers
        The first ``num_accepted[b]`` new tokens of row b are accepted.
    seeds : Tensor, (layers, slots), int64, optional
        **Written.**
    """
    c = cursors
    rows = c.active & (num_accepted >= 0)
    writes, slots, accepted = c.writes()[rows], c.slots[rows], num_accepted[rows].to(c.pending.dtype)
    pending, cursor = c.pending[slots], c.cursor[slots]
    moved = (cursor + pending) % c.num_cursors if c.ring else 1 - cursor
    c.cursor[slots] = torch.where(writes, moved, cursor)
    c.pending[slots] = torch.where(writes, accepted, pending + accepted)
    if seeds is not None:
        seeds[:, slots] += 1

"""`commit`, as mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.reference.cursors import Cursors


def commit(cursors: Cursors, accepted: Tensor, seeds: Tensor | None) -> None:
    """Advance the cursors of live rows by their accepted tokens, and their seeds by one.

    A row that writes has its new tokens, and nothing else, in the other buffer, or in the ring behind those that were
    folded: PNAT becomes `accepted`, the buffer flips, or the start moves on by the old PNAT.  A row that does not
    write has appended them: PNAT grows by `accepted`.  Rows with a negative `accepted` stay as they are.

    Parameters
    ----------
    cursors : Cursors
        ``pnat`` and ``place`` are **written**.
    accepted : Tensor, (batch,), integers
        Of row b, the first ``accepted[b]`` new tokens are kept.
    seeds : Tensor, (layers, slots), int64, optional
        **Written.**
    """
    c = cursors
    rows = c.live & (accepted >= 0)
    writes, slots, accepted = c.writes()[rows], c.slots[rows], accepted[rows].to(c.pnat.dtype)
    pending, place = c.pnat[slots], c.place[slots]
    moved = (place + pending) % c.places if c.ring else 1 - place
    c.place[slots] = torch.where(writes, moved, place)
    c.pnat[slots] = torch.where(writes, accepted, pending + accepted)
    if seeds is not None:
        seeds[:, slots] += 1

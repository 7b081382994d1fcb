"""Histories of pending tokens, and the states they lead to, as mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """A state that goes from one slot to another, with pending tokens folded in.

    Attributes
    ----------
    source, destination : int
        Slots.
    place : int
        Active buffer of the source, or start of its ring.
    tokens : int
        Pending tokens that are folded, from the oldest on.
    """

    source: int
    destination: int
    place: int
    tokens: int


class History(ABC):
    """Tokens that were accepted but are not in the state yet; subclasses say in which rows they lie."""

    @staticmethod
    def of(x: Tensor, B: Tensor, dt: Tensor, sums: Tensor | None) -> History:
        """Return the view of a double buffer, or of a ring if there are no `sums`."""
        return Ring(x, B, dt) if sums is None else DoubleBuffer(x, B, dt, sums)

    @abstractmethod
    def read(self, slot: int, cursor: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (count, nheads, dim), B (count, ngroups, dstate) and dt' (nheads, count) of a slot, oldest first.

        ``cursor`` is the index of the active buffer, or the first row of the ring.
        """

    @abstractmethod
    def append(
        self, slot: int, cursor: int, count: int, writes: bool, x: Tensor, B: Tensor, dt: Tensor, sums: Tensor
    ) -> None:
        """Store new tokens behind the `count` of the history, or where they start a new one if the step `writes`.

        ``sums`` (nheads, tokens) are the running sums of A dt' since the start of the buffer that takes the tokens.
        """


class DoubleBuffer(History):
    """B, dt' and their running sums in two buffers of W rows, x in one or two; new ones start in the other buffer."""

    def __init__(self, x: Tensor, B: Tensor, dt: Tensor, sums: Tensor) -> None:
        self.x, self.B, self.dt, self.sums = x, B, dt, sums
        self.window = dt.shape[-1]

    def _x(self, slot: int, buffer: int) -> Tensor:
        return self.x[slot, buffer] if self.x.dim() == 5 else self.x[slot]

    def read(self, slot: int, cursor: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._x(slot, cursor)[:count], self.B[slot, cursor, :count], self.dt[slot, cursor, :, :count]

    def append(
        self, slot: int, cursor: int, count: int, writes: bool, x: Tensor, B: Tensor, dt: Tensor, sums: Tensor
    ) -> None:
        buffer, first = (1 - cursor, 0) if writes else (cursor, count)
        kept = min(len(x), self.window)  # of more tokens than a window holds no more can be accepted
        rows = slice(first, first + kept)
        self._x(slot, buffer)[rows] = x[:kept]
        self.B[slot, buffer, rows] = B[:kept]
        self.dt[slot, buffer, :, rows] = dt[:, :kept]
        self.sums[slot, buffer, :, rows] = sums[:, :kept]


class Ring(History):
    """x, B and dt' in one ring of at least W + T rows per slot, so that new tokens never meet the history."""

    def __init__(self, x: Tensor, B: Tensor, dt: Tensor) -> None:
        self.x, self.B, self.dt = x, B, dt
        self.rows = dt.shape[-1]

    def read(self, slot: int, cursor: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = (cursor + torch.arange(count)) % self.rows
        return self.x[slot, :, rows].transpose(0, 1), self.B[slot, :, rows].transpose(0, 1), self.dt[slot][:, rows]

    def append(
        self, slot: int, cursor: int, count: int, writes: bool, x: Tensor, B: Tensor, dt: Tensor, sums: Tensor
    ) -> None:
        rows = (cursor + count + torch.arange(len(x))) % self.rows
        self.x[slot, :, rows] = x.transpose(0, 1)
        self.B[slot, :, rows] = B.transpose(0, 1)
        self.dt[slot, :, rows] = dt


def running_sums(A: Tensor, dt: Tensor) -> Tensor:
    """Return c (nheads, tokens) of decay rates A (nheads,) and processed step sizes dt' (nheads, tokens)."""
    return torch.cumsum(A[:, None] * dt, 1)


def fold(state: Tensor, x: Tensor, B: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """Return what tokens make of a state.

    Parameters
    ----------
    state : Tensor, (nheads, dim, dstate)
    x : Tensor, (tokens, nheads, dim)
    B : Tensor, (tokens, ngroups, dstate)
    dt : Tensor, (nheads, tokens)
        Processed step sizes.
    A : Tensor, (nheads,)

    Returns
    -------
    Tensor, (nheads, dim, dstate)
        In the type of ``state``, which is that of all arithmetic.
    """
    if not len(x):
        return state
    x, B, dt, A = (tensor.to(state.dtype) for tensor in (x, B, dt, A))
    later = running_sums(A, dt.flip(1)).flip(1)  # of a token and all after it
    coefficients = torch.exp(torch.nn.functional.pad(later[:, 1:], (0, 1))) * dt  # (nheads, tokens)
    B = B.repeat_interleave(x.shape[1] // B.shape[1], dim=1)
    added = torch.einsum("jhp,jhn->hpn", coefficients.T[..., None] * x, B)
    return torch.exp(later[:, 0])[:, None, None] * state + added

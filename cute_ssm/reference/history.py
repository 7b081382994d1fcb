"""Histories of pending tokens, and folding them into states, in plain PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Move(NamedTuple):
    """A state to store in another slot, with pending tokens folded in.

    Attributes
    ----------
    source, destination : int
        Slots that are read and written.
    cursor : int
        Active buffer of the source, or first row of its ring.
    num_tokens : int
        Number of pending tokens to fold, from the oldest on.
    """

    source: int
    destination: int
    cursor: int
    num_tokens: int


class History(ABC):
    """Inputs of pending tokens: those that are accepted but not in the state yet.  Subclasses define the layout."""

    @staticmethod
    def of(x: Tensor, B: Tensor, dt: Tensor, sums: Tensor | None) -> History:
        """Return a `DoubleBuffer`, or a `Ring` if there are no `sums`."""
        return Ring(x, B, dt) if sums is None else DoubleBuffer(x, B, dt, sums)

    @abstractmethod
    def read(self, slot: int, cursor: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (count, nheads, dim), B (count, ngroups, dstate) and dt' (nheads, count) of a slot, oldest first.

        ``cursor`` is the active buffer, or the first row of the ring.
        """

    @abstractmethod
    def append(
        self, slot: int, cursor: int, count: int, writes: bool, x: Tensor, B: Tensor, dt: Tensor, sums: Tensor
    ) -> None:
        """Store new tokens behind the `count` pending ones, or at the start of a new history if the step `writes`.

        ``sums`` (nheads, tokens) are the running sums of A dt' since the start of the buffer that stores the tokens.
        """


class DoubleBuffer(History):
    """Two buffers of W rows of B, dt' and running sums, one or two of x; a step that writes starts the other one."""

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
        stored = min(len(x), self.window)  # no step accepts more tokens than a window holds
        rows = slice(first, first + stored)
        self._x(slot, buffer)[rows] = x[:stored]
        self.B[slot, buffer, rows] = B[:stored]
        self.dt[slot, buffer, :, rows] = dt[:, :stored]
        self.sums[slot, buffer, :, rows] = sums[:, :stored]


class Ring(History):
    """One ring of at least W + T rows of x, B and dt' per slot, so that new tokens never overwrite pending ones."""

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
    """Return the running sums c (nheads, tokens) of A dt', from A (nheads,) and step sizes dt' (nheads, tokens)."""
    return torch.cumsum(A[:, None] * dt, 1)


def fold(state: Tensor, x: Tensor, B: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """Return a state after tokens.

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

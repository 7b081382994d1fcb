"""What happens to cursors and states between steps of a model, as mathematics: `cute_ssm.serving`.

A slot holds a state and a *history*: the inputs of tokens that are accepted but not yet in the state.  Two cursors say
where: PNAT, the number of *pending* tokens, and either the index of the active one of two buffers or the place in a
ring where the oldest pending token lies.  A step with n tokens **writes** the state if PNAT + n > window: it first
folds all pending tokens, so that afterwards only its own are pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.reference import rounding
from cute_ssm.reference.checkpointing_ssu import History, fold
from cute_ssm.reference.gated_delta_rule import recurrence


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


class DeltaRings(NamedTuple):
    """The history of `gated_delta_rule_replay`.

    Attributes
    ----------
    k : Tensor, (slots, heads, L, K)
    v : Tensor, (slots, value_heads, L, V)
    g, beta : Tensor, (slots, value_heads, L)
    """

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


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


def materialize(
    pool: tuple[Tensor, Tensor | None],
    history: History,
    A: Tensor,
    out: tuple[Tensor, Tensor | None],
    rows: Sequence[Move],
    seeds: Tensor | None,
    rounds: int,
    saturate: bool = False,
) -> None:
    """Write the states that pending tokens lead to, `reference.checkpointing_ssu.fold`, in float32.

    Parameters
    ----------
    pool, out : (Tensor, (slots, nheads, dim, dstate), float32 Tensor, (slots, nheads, dim), or None)
        States and scales that are read, and those that are **written**; they may be the same.
    history : History
        Pending tokens of all slots of `pool`.
    A : Tensor, (nheads,)
    rows : sequence of Move
        With no tokens, and if both pools have the same type, the bytes of the state are copied.
    seeds : Tensor, (1,) or (slots,), int64, optional
        Round stochastically, by the map of rows of `reference.rounding`, with the number of tokens less one as the
        token, and the seed of the source.
    rounds : int
        Rounds of Philox.
    saturate : bool
        Make float16 `rounding.saturated`.
    """
    (state, scale), (target, target_scale) = pool, out
    for source, destination, place, count in rows:
        if count == 0 and state.dtype == target.dtype:
            stored, new_scale = state[source], None if scale is None else scale[source]
        else:
            bits = None
            if seeds is not None:
                head, row, column = torch.meshgrid(*(torch.arange(size) for size in state.shape[1:]), indexing="ij")
                seed = seeds[source if len(seeds) > 1 else 0]
                bits = rounding.random_bits(seed, rounds, destination, head, row, column, state.shape[-1], count - 1)
            first = rounding.load(state[source], None if scale is None else scale[source])
            values = fold(first, *history.read(source, place, count), A.float())
            stored, new_scale = rounding.store(values, target.dtype, bits=bits, saturate=saturate)
        target[destination] = stored
        if target_scale is not None and new_scale is not None:
            target_scale[destination] = new_scale


def materialize_gated_delta(
    state: Tensor,
    rings: DeltaRings,
    out: Tensor,
    rows: Sequence[Move],
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
    saturate: bool = False,
) -> None:
    """Write the states that pending tokens lead to, `reference.gated_delta_rule.recurrence`, rounded to nearest even.

    Parameters
    ----------
    state, out : Tensor, (slots, value_heads, V, K)
        States that are read and **written**; they may be the same.
    rings : DeltaRings
    rows : sequence of Move
        With no tokens, and if both pools have the same type, the bytes of the state are copied.
    use_qk_l2norm : bool
        Normalise keys.
    compute_dtype : torch.dtype
    saturate : bool
        Make float16 `rounding.saturated`.
    """
    results = []
    for source, destination, start, count in rows:
        result = state[source].clone()
        if count:
            places = (start + torch.arange(count)) % rings.k.shape[2]
            k, v, g, beta = (ring[source][:, places].transpose(0, 1)[None] for ring in rings)
            _, states = recurrence(state[source][None], k, k, v, g, beta, 1.0, use_qk_l2norm, compute_dtype)
            result = states[0, -1]
        if saturate and (count or state.dtype != out.dtype):
            result = rounding.saturated(result)
        results.append((destination, result))
    for destination, result in results:
        out[destination] = result.to(out.dtype)

"""`materialize`, as mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cute_ssm.reference import rounding
from cute_ssm.reference.history import History, Move, fold


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

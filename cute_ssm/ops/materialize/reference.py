"""What `materialize` computes, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cute_ssm.reference import rounding
from cute_ssm.reference.history import History, Move, fold


class Pool(NamedTuple):
    """States (slots, nheads, dim, dstate), and the float32 scales (slots, nheads, dim) of quantised ones."""

    state: Tensor
    scale: Tensor | None


def materialize(
    pool: Pool,
    history: History,
    A: Tensor,
    out: Pool,
    rows: Sequence[Move],
    seeds: Tensor | None,
    rounds: int,
    saturate: bool = False,
) -> None:
    """Fold pending tokens into states in float32, by `history.fold`, and store the results.

    Parameters
    ----------
    pool, out : Pool
        States and scales that are read, and those that are **written**; they may be the same.
    history : History
        Pending tokens of all slots of `pool`.
    A : Tensor, (nheads,)
    rows : sequence of Move
        The state of a row without tokens is copied byte for byte, if both pools have the same type.
    seeds : Tensor, (1,) or (slots,), int64, optional
        Round stochastically by the map of rows of `reference.rounding`, with the number of tokens minus one as the
        token, and the seed of the source slot.
    rounds : int
        Rounds of Philox.
    saturate : bool
        Apply `rounding.saturated` to float16 states.
    """
    (state, scale), (target, target_scale) = pool, out
    for row in rows:
        source, destination, count = row.source, row.destination, row.num_tokens
        if count == 0 and state.dtype == target.dtype:
            stored, new_scale = state[source], None if scale is None else scale[source]
        else:
            bits = None
            if seeds is not None:
                head, line, column = torch.meshgrid(*(torch.arange(size) for size in state.shape[1:]), indexing="ij")
                seed = seeds[source if len(seeds) > 1 else 0]
                bits = rounding.random_bits(seed, rounds, destination, head, line, column, state.shape[-1], count - 1)
            first = rounding.load(state[source], None if scale is None else scale[source])
            values = fold(first, *history.read(source, row.cursor, count), A.float())
            stored, new_scale = rounding.store(values, target.dtype, bits=bits, saturate=saturate)
        target[destination] = stored
        if target_scale is not None and new_scale is not None:
            target_scale[destination] = new_scale

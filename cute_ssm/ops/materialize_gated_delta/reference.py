"""`materialize_gated_delta`, as mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import Tokens, recurrence
from cute_ssm.reference import rounding
from cute_ssm.reference.history import Move

if TYPE_CHECKING:
    from cute_ssm.ops.materialize_gated_delta.arguments import Arguments


def materialize_gated_delta(
    state: Tensor,
    rings: Tokens,
    out: Tensor,
    rows: Sequence[Move],
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
    saturate: bool = False,
) -> None:
    """Write the states after pending tokens, computed by `recurrence` and rounded to nearest even.

    Parameters
    ----------
    state, out : Tensor, (slots, value_heads, V, K)
        Pools that are read and **written**; they may be the same tensor.
    rings : Tokens
        The history of all slots.
    rows : sequence of Move
        What is read, what is written, and the pending tokens.  With no tokens, and if both pools have the same type,
        the bytes of the state are copied.
    use_qk_l2norm : bool
        Normalise keys.
    compute_dtype : torch.dtype
    saturate : bool
        Clamp float16 results with `rounding.saturated`.
    """
    results = []
    for source, destination, start, count in rows:
        result = state[source].clone()
        if count:
            positions = (start + torch.arange(count)) % rings.k.shape[2]
            tokens = Tokens(*(ring[source][:, positions].transpose(0, 1)[None] for ring in rings))
            _, states = recurrence(state[source][None], tokens.k, *tokens, 1.0, use_qk_l2norm, compute_dtype)
            result = states[0, -1]
        if saturate and (count or state.dtype != out.dtype):
            result = rounding.saturated(result)
        results.append((destination, result))
    for destination, result in results:
        out[destination] = result.to(out.dtype)


def run(call: Arguments, rows: Sequence[Move]) -> None:
    """Do to checked arguments what the operator documents."""
    rings = Tokens(call.k_cache, call.v_cache, call.g_cache, call.beta_cache)
    materialize_gated_delta(call.initial_state, rings, call.target, rows, call.use_qk_l2norm, saturate=call.saturate)

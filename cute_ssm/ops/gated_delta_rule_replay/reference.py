"""The gated delta rule after pending tokens, as mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import recurrence


def gated_delta_rule_replay(
    state: Tensor,
    pending: Sequence[Tensor],
    counts: Tensor,
    q: Tensor,
    new: Sequence[Tensor],
    scale: float,
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Fold the pending tokens into the states, then verify the new ones; nothing is modified and nothing is rounded.

    Parameters
    ----------
    state : Tensor, (batch, value_heads, V, K)
        Checkpoints, already gathered.
    pending : k (batch, heads, window, K), v (batch, value_heads, window, V), g and beta (batch, value_heads, window)
        Rows of the rings, already gathered, with the oldest token first.
    counts : Tensor, (batch,)
        Number of pending tokens of each request; rows behind them may hold anything.
    q : Tensor, (batch, tokens, heads, K)
    new : k (batch, tokens, heads, K), v (batch, tokens, value_heads, V), g and beta (batch, tokens, value_heads)
    scale, use_qk_l2norm, compute_dtype
        As in `gated_delta_rule`.

    Returns
    -------
    out : Tensor, (batch, tokens, value_heads, V), compute_dtype
    folded : Tensor, (batch, value_heads, V, K), compute_dtype
        The states after the pending tokens, before the new ones.
    """
    window = pending[0].shape[2]
    active = (torch.arange(window, device=counts.device) < counts[:, None])[:, :, None]
    rows = [x.transpose(1, 2) for x in pending]
    # a token with g = 0 and beta = 0 does not change the state
    old_k, old_v, old_g, old_beta = (torch.where(active if x.dim() == 3 else active[..., None], x, 0) for x in rows)
    _, states = recurrence(state, old_k, old_k, old_v, old_g, old_beta, 1.0, use_qk_l2norm, compute_dtype)
    folded = states[:, -1]
    k, v, g, beta = new
    out, _ = recurrence(folded, q, k, v, g, beta, scale, use_qk_l2norm, compute_dtype)
    return out, folded

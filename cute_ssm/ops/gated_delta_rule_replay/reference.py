"""The gated delta rule after pending tokens, as mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import Tokens, gates, recurrence
from cute_ssm.reference.rounding import saturated

if TYPE_CHECKING:
    from cute_ssm.ops.gated_delta_rule_replay.arguments import Arguments

MIN_G = -1e4  # of logarithms of decays in the ring: e^g is zero well above it


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
        Number of pending tokens of each request; later rows may hold anything.
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
    old = Tokens(*(torch.where(active if x.dim() == 3 else active[..., None], x, 0) for x in rows))
    _, states = recurrence(state, old.k, *old, 1.0, use_qk_l2norm, compute_dtype)
    folded = states[:, -1]
    out, _ = recurrence(folded, q, *Tokens(*new), scale, use_qk_l2norm, compute_dtype)
    return out, folded


def step(call: Arguments) -> None:
    """Do to checked arguments what the operator documents: gather, compute in float32, round, scatter."""
    state, src, output = call.initial_state, call.initial_state_indices, call.output
    active = src >= 0
    if call.zero_padding:
        output[~active] = 0
    rows = torch.arange(src.numel())[active]
    if not rows.numel():
        return
    rings = (call.k_cache, call.v_cache, call.g_cache, call.beta_cache)
    slots, tokens, length = src[active].long(), call.q.shape[1], call.k_cache.shape[2]
    start, pending = call.ring_start[slots].long(), call.prev_num_accepted_tokens[slots].long()
    g, beta = gates(call.a[rows], call.b[rows], call.A_log, call.dt_bias)
    new = (call.k[rows], call.v[rows], g.clamp(min=MIN_G), beta)
    history = (start[:, None] + torch.arange(max(call.window, 1))) % length  # (batch, window)
    old = [ring[slots[:, None], :, history].transpose(1, 2) for ring in rings]  # (batch, heads, window, ...)
    out, folded = gated_delta_rule_replay(state[slots], old, pending, call.q[rows], new, call.scale, call.use_qk_l2norm)
    output[rows] = out.to(output.dtype)
    flush = (pending + tokens > call.window) & (pending > 0)
    folded = saturated(folded) if call.saturate else folded
    state[slots[flush]] = folded[flush].to(state.dtype)
    appended = (start[:, None] + pending[:, None] + torch.arange(tokens)) % length
    for ring, values in zip(rings, new):
        ring[slots[:, None], :, appended] = values

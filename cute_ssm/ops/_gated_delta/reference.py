"""Mathematics that the references of the gated delta rule share: gates, normalised keys, and the recurrence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6  # added to sums of squares before the root


class Tokens(NamedTuple):
    """Keys, values, logarithms of decays, and step sizes of tokens; in rings, or of a batch.

    Attributes
    ----------
    k : Tensor, (slots, heads, L, K) or (batch, tokens, heads, K)
    v : Tensor, (slots, value_heads, L, V) or (batch, tokens, value_heads, V)
    g, beta : Tensor, (slots, value_heads, L) or (batch, tokens, value_heads)
    """

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the decay and the step size of every token.

    ``g = -exp(A_log) softplus(a + dt_bias)`` (softplus is the identity above 20) and ``beta = sigmoid(b)``.

    Parameters
    ----------
    a, b : Tensor, (batch, tokens, value_heads)
    A_log, dt_bias : Tensor, (value_heads,)
    compute_dtype : torch.dtype

    Returns
    -------
    g, beta : Tensor, (batch, tokens, value_heads), compute_dtype
    """
    x = a.to(compute_dtype) + dt_bias.to(compute_dtype)
    g = -torch.exp(A_log.to(compute_dtype)) * torch.nn.functional.softplus(x, threshold=20.0)
    return g, torch.sigmoid(b.to(compute_dtype))


def heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float, use_qk_l2norm: bool, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in `compute_dtype`, with q and k normalised, q scaled, and one row of both per value head."""
    per_head = v.shape[2] // q.shape[2]
    q, k, v = (tensor.to(compute_dtype) for tensor in (q, k, v))
    if use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON) for x in (q, k))
    q, k = (x.repeat_interleave(per_head, dim=2) for x in (q * scale, k))
    return q, k, v


def recurrence(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Advance all tokens one after the other, given their gates; nothing is modified and nothing is rounded.

    With the state S [V, K] of a (request, value head), k^ and q^ normalised (optionally) and q^ scaled::

        S <- e^g S;   u = beta (v - S k^);   S <- S + u k^^T;   out = S q^

    Parameters
    ----------
    state : Tensor, (batch, value_heads, V, K)
        One state per request, already gathered.
    q, k : Tensor, (batch, tokens, heads, K)
        Value head h uses row ``h // (value_heads / heads)``.
    v : Tensor, (batch, tokens, value_heads, V)
    g, beta : Tensor, (batch, tokens, value_heads)
        Logarithms of the decays, and step sizes.
    scale : float
        Factor of q.
    use_qk_l2norm : bool
        Normalise q and k.
    compute_dtype : torch.dtype
        Type of all arithmetic; float64 makes this the oracle.

    Returns
    -------
    out : Tensor, (batch, tokens, value_heads, V), compute_dtype
    states : Tensor, (batch, tokens, value_heads, V, K), compute_dtype
        The state after every token.
    """
    g, beta = g.to(compute_dtype), beta.to(compute_dtype)
    q, k, v = heads(q, k, v, scale, use_qk_l2norm, compute_dtype)
    current = state.to(compute_dtype)
    outs, states = [], []
    for t in range(q.shape[1]):
        current = torch.exp(g[:, t])[..., None, None] * current
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", current, k[:, t]))
        current = current + u[..., None] * k[:, t, :, None, :]
        outs.append(torch.einsum("bhvk,bhk->bhv", current, q[:, t]))
        states.append(current)
    return torch.stack(outs, 1), torch.stack(states, 1)

"""The gated delta rule, as mathematics: token by token, as products of all tokens at once, and behind pending ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6  # added to sums of squares before the root


def gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, compute_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the decay and the step of every token.

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


def _heads(
    q: Tensor, k: Tensor, v: Tensor, scale: float, use_qk_l2norm: bool, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k normalised and scaled, one row per value head; v wide."""
    per_head = v.shape[2] // q.shape[2]
    q, k, v = (tensor.to(compute_dtype) for tensor in (q, k, v))
    if use_qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON) for x in (q, k))
    q, k = (x.repeat_interleave(per_head, dim=2) for x in (q * scale, k))
    return q, k, v


def gated_delta_rule(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Advance all tokens one after the other; nothing is modified and nothing is rounded.

    With the state S [V, K] of a (request, value head), k^ and q^ normalised (optionally) and q^ scaled::

        S <- e^g S;   u = beta (v - S k^);   S <- S + u k^^T;   out = S q^

    Parameters
    ----------
    state : Tensor, (batch, value_heads, V, K)
        One state per request, already gathered.
    q, k : Tensor, (batch, tokens, heads, K)
        Value head h uses row ``h // (value_heads / heads)``.
    v : Tensor, (batch, tokens, value_heads, V)
    a, b : Tensor, (batch, tokens, value_heads)
    A_log, dt_bias : Tensor, (value_heads,)
    scale : float
    use_qk_l2norm : bool
    compute_dtype : torch.dtype
        Type of all arithmetic; float64 makes this the oracle.

    Returns
    -------
    out : Tensor, (batch, tokens, value_heads, V), compute_dtype
    states : Tensor, (batch, tokens, value_heads, V, K), compute_dtype
        The state after every token.
    """
    g, beta = gates(a, b, A_log, dt_bias, compute_dtype)
    return recurrence(state, q, k, v, g, beta, scale, use_qk_l2norm, compute_dtype)


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
    """Do what `gated_delta_rule` does, given the gates: g and beta, (batch, tokens, value_heads)."""
    g, beta = g.to(compute_dtype), beta.to(compute_dtype)
    q, k, v = _heads(q, k, v, scale, use_qk_l2norm, compute_dtype)
    current = state.to(compute_dtype)
    outs, states = [], []
    for t in range(q.shape[1]):
        current = torch.exp(g[:, t])[..., None, None] * current
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", current, k[:, t]))
        current = current + u[..., None] * k[:, t, :, None, :]
        outs.append(torch.einsum("bhvk,bhk->bhv", current, q[:, t]))
        states.append(current)
    return torch.stack(outs, 1), torch.stack(states, 1)


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
    """Pass the pending tokens, then verify the new ones; nothing is modified and nothing is rounded.

    Parameters
    ----------
    state : Tensor, (batch, value_heads, V, K)
        Checkpoints, already gathered.
    pending : k (batch, heads, window, K), v (batch, value_heads, window, V), g and beta (batch, value_heads, window)
        Rows of the rings, the oldest token first, already gathered.
    counts : Tensor, (batch,)
        Pending tokens of each request; rows behind them may hold anything.
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
    real = (torch.arange(window, device=counts.device) < counts[:, None])[:, :, None]
    rows = [x.transpose(1, 2) for x in pending]
    # a token with g = 0 and beta = 0 leaves the state exactly as it is
    old_k, old_v, old_g, old_beta = (torch.where(real if x.dim() == 3 else real[..., None], x, 0) for x in rows)
    _, states = recurrence(state, old_k, old_k, old_v, old_g, old_beta, 1.0, use_qk_l2norm, compute_dtype)
    folded = states[:, -1]
    k, v, g, beta = new
    out, _ = recurrence(folded, q, k, v, g, beta, scale, use_qk_l2norm, compute_dtype)
    return out, folded


def gated_delta_rule_products(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute the same from products of the first state with all keys and queries: what the kernel does.

    With D[t, j] the product of the decays of tokens j + 1 .. t, gamma_t that of tokens 0 .. t, and rows u_t of U::

        (1 + L) U = diag(beta) (V - diag(gamma) K^ S^T),    L[t, j] = beta_t D[t, j] k^_t . k^_j   (j < t)
        out       = diag(gamma) Q^ S^T + A U,               A[t, j] = D[t, j] q^_t . k^_j          (j <= t)
        S_t       = gamma_t S + sum_{j <= t} D[t, j] u_j k^_j^T

    Decays are products of the tokens' decays, never quotients: no strength of decay overflows.  Raw keys and queries
    are multiplied; their norms are applied to the products.  No sum has a term of a later token, not even 0 times it.

    Parameters and results are those of `gated_delta_rule`.
    """
    g, beta = gates(a, b, A_log, dt_bias, compute_dtype)
    alpha = torch.exp(g).transpose(1, 2)  # (batch, value_heads, tokens)
    beta = beta.transpose(1, 2)
    per_head = v.shape[2] // q.shape[2]
    raw_q, raw_k = (x.to(compute_dtype).repeat_interleave(per_head, dim=2).transpose(1, 2) for x in (q, k))
    values = v.to(compute_dtype).transpose(1, 2)  # (batch, value_heads, tokens, V)
    tokens = q.shape[1]
    kappa, rho = torch.ones_like(alpha), torch.full_like(alpha, scale)
    if use_qk_l2norm:
        kappa = torch.rsqrt(raw_k.square().sum(-1) + EPSILON)
        rho = scale * torch.rsqrt(raw_q.square().sum(-1) + EPSILON)
    decay = torch.zeros(*alpha.shape, tokens, dtype=compute_dtype)  # above the diagonal nothing is used
    for t in range(tokens):
        decay[..., t, :t] = decay[..., t - 1, :t] * alpha[..., t, None]
        decay[..., t, t] = 1
    gamma = torch.cumprod(alpha, -1)
    first = state.to(compute_dtype).transpose(-1, -2)
    P, R = raw_k @ first, raw_q @ first  # (batch, value_heads, tokens, V)
    scaled = decay * kappa[..., None, :]
    L = beta[..., None] * kappa[..., None] * scaled * (raw_k @ raw_k.transpose(-1, -2))
    A = rho[..., None] * scaled * (raw_q @ raw_k.transpose(-1, -2))
    X = beta[..., None] * (values - (gamma * kappa)[..., None] * P)
    U, out = torch.empty_like(X), (gamma * rho)[..., None] * R
    states = gamma[..., None, None] * state.to(compute_dtype)[:, :, None]
    for t in range(tokens):
        before, seen = slice(t), slice(t + 1)
        U[..., t, :] = X[..., t, :] - torch.einsum("bhj,bhjv->bhv", L[..., t, before], U[..., before, :])
        out[..., t, :] += torch.einsum("bhj,bhjv->bhv", A[..., t, seen], U[..., seen, :])
        weighted = scaled[..., t, seen, None] * U[..., seen, :]
        states[:, :, t] += torch.einsum("bhjv,bhjk->bhvk", weighted, raw_k[..., seen, :])
    return out.transpose(1, 2), states.transpose(1, 2)

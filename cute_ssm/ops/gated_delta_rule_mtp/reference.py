"""The gated delta rule, as mathematics: token by token, and as products of all tokens at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import EPSILON, gates, recurrence
from cute_ssm.ops.gated_delta_rule_mtp.arguments import lengths
from cute_ssm.reference.rounding import saturated

if TYPE_CHECKING:
    from cute_ssm.ops.gated_delta_rule_mtp.arguments import Arguments


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
    """Compute the same as `gated_delta_rule` by products of the first state with all keys and queries.

    This is the kernel's order of operations.

    With D[t, j] the product of the decays of tokens j + 1 .. t, gamma_t that of tokens 0 .. t, and rows u_t of U::

        (1 + L) U = diag(beta) (V - diag(gamma) K^ S^T),    L[t, j] = beta_t D[t, j] k^_t . k^_j   (j < t)
        out       = diag(gamma) Q^ S^T + A U,               A[t, j] = D[t, j] q^_t . k^_j          (j <= t)
        S_t       = gamma_t S + sum_{j <= t} D[t, j] u_j k^_j^T

    Decays are products of the tokens' decays, never quotients, so that strong decays do not overflow.  Raw keys and
    queries are multiplied; their norms are applied to the products.  No sum has a term of a later token, not even one
    multiplied by 0.

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


def step(call: Arguments) -> None:
    """Do to checked arguments what the operator documents: gather, compute in float32, round, scatter."""
    state, src, output = call.initial_state, call.initial_state_indices, call.output
    positions = torch.arange(src.numel(), device=src.device)
    counts = lengths(call)
    active = (src >= 0) & (counts > 0)
    if call.zero_padding:
        output[~active] = 0
    rows, source, counts = positions[active], src[active].long(), counts[active]
    if not rows.numel():
        return
    first = state[source]
    g, beta = gates(call.a, call.b, call.A_log, call.dt_bias) if call.gate_logits else (call.a, call.b)
    request, token = _tokens(call, rows)  # of row and place in `used`
    used = torch.arange(token.shape[1]) < counts[:, None]

    def taken(x: Tensor) -> Tensor:
        """Return a tensor's tokens (rows, tokens, ...); zeros past those of a request leave its state unchanged."""
        return torch.where(used.view(*used.shape, *[1] * (x.dim() - 2)), x[request, token], 0)

    q, k, v, g, beta = (taken(x) for x in (call.q, call.k, call.v, g, beta))
    out, states = recurrence(first, q, k, v, g, beta, call.scale, call.use_qk_l2norm)
    output[request[used], token[used]] = out.to(output.dtype)[used]
    states = (saturated(states) if call.saturate else states).to(state.dtype)
    if call.intermediate_states_buffer is not None:
        row, place = used.nonzero(as_tuple=True)
        call.intermediate_states_buffer[rows[row], place] = states[used]
    if call.disable_state_update:
        return
    if call.ssm_state_indices is not None:
        slots = call.ssm_state_indices[rows, : used.shape[1]].long()
        written = used & (slots >= 0)
        state[slots[written]] = states[written]
        return
    slots = source if call.output_state_indices is None else call.output_state_indices[rows].long()
    written = slots >= 0
    if call.accepted_steps is not None:
        counts = call.accepted_steps[rows].long()
    all_states = torch.cat([first[:, None], states], 1)
    state[slots[written]] = all_states[positions[: counts.numel()], counts][written]


def _tokens(call: Arguments, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return where tokens of requests are, (rows, tokens): in the first two axes of tensors of tokens."""
    total = call.q.shape[1]
    if call.cu_seqlens is None:
        token = torch.arange(total).expand(rows.numel(), total)
        return rows[:, None].expand_as(token), token
    places = torch.arange(call.max_seqlen or 0)
    token = (call.cu_seqlens[rows].long()[:, None] + places).clamp(max=total - 1)
    return torch.zeros_like(token), token

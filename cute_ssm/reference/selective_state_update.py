"""The selective state update, as mathematics."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Advance one token per sequence; nothing is modified and nothing is rounded.

    With the state h [dim, dstate] of a (sequence, head) and the group g of the head::

        dt' = softplus(dt + dt_bias)                 (softplus optional; the identity above 20)
        h'  = exp(A dt') h + (dt' x) B_g^T
        out = (h' C_g + D x) silu(z)                 (skip term and gate optional)

    Parameters
    ----------
    state : Tensor, (batch, nheads, dim, dstate)
        One state per sequence, already gathered.
    x, dt, z : Tensor, (batch, nheads, dim)
    A : Tensor, (nheads, dim, dstate)
    B, C : Tensor, (batch, ngroups, dstate)
    D, dt_bias : Tensor, (nheads, dim)
    dt_softplus : bool
    compute_dtype : torch.dtype
        Type of all arithmetic; float64 makes this the oracle.

    Returns
    -------
    out : Tensor, (batch, nheads, dim), compute_dtype
    new_state : Tensor, (batch, nheads, dim, dstate), compute_dtype
    """

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(compute_dtype)

    per_group = x.shape[1] // B.shape[1]
    B, C = (wide(t).repeat_interleave(per_group, dim=1) for t in (B, C))  # (batch, nheads, dstate)
    step = wide(dt)
    if dt_bias is not None:
        step = step + wide(dt_bias)
    if dt_softplus:
        step = torch.nn.functional.softplus(step, threshold=20.0)
    decay = torch.exp(wide(A) * step[..., None])  # (batch, nheads, dim, dstate)
    new_state = decay * wide(state) + (step * wide(x))[..., None] * B[:, :, None, :]
    out = torch.einsum("bhpn,bhn->bhp", new_state, C)
    if D is not None:
        out = out + wide(D) * wide(x)
    if z is not None:
        out = out * torch.nn.functional.silu(wide(z))
    return out, new_state

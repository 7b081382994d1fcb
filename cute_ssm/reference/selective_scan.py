"""The selective scan, as mathematics."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan sequences of equal length token by token; nothing is modified and nothing is rounded.

    With the states h [dstate] of a (sequence, channel) and the group g of the channel, for every token::

        delta' = softplus(delta + delta_bias)        (softplus optional; the identity above 20)
        h     <- exp(A delta') h + (delta' u) B_g
        y      = h . C_g + D u                       (skip term optional)
        out    = y silu(z)                           (gate optional)

    Parameters
    ----------
    u, delta, z : Tensor, (batch, dim, length)
    A : Tensor, (dim, dstate)
    B, C : Tensor, (batch, ngroups, dstate, length)
    D, delta_bias : Tensor, (dim,)
    delta_softplus : bool
    state : Tensor, (batch, dim, dstate), optional
        Initial states.  None: zeros.
    compute_dtype : torch.dtype
        Type of all arithmetic; float64 makes this the oracle.

    Returns
    -------
    y, out : Tensor, (batch, dim, length), compute_dtype
        Before and after the gate; the same if there is none.
    new_state : Tensor, (batch, dim, dstate), compute_dtype
    """

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(compute_dtype)

    batch, dim, length = u.shape
    per_group = dim // B.shape[1]
    rates, inputs, steps = wide(A), wide(u), wide(delta)
    if delta_bias is not None:
        steps = steps + wide(delta_bias)[:, None]
    if delta_softplus:
        steps = torch.nn.functional.softplus(steps, threshold=20.0)
    gains = steps * inputs
    h = wide(state) if state is not None else rates.new_zeros(batch, dim, A.shape[1])
    outputs = [inputs.new_zeros(batch, dim, 0)]
    for t in range(length):
        column_B, column_C = (wide(x[..., t]).repeat_interleave(per_group, dim=1) for x in (B, C))
        h = torch.exp(rates * steps[..., t, None]) * h + gains[..., t, None] * column_B
        outputs.append((h * column_C).sum(-1, keepdim=True))
    y = torch.cat(outputs, -1)
    if D is not None:
        y = y + wide(D)[:, None] * inputs
    return y, y if z is None else y * torch.nn.functional.silu(wide(z)), h

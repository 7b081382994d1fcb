"""The Mamba-2 recurrence over sequences: token by token, and in chunks of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import describe

__all__ = ["chunked_scan", "recurrence"]


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one token after the other.

    ``state = exp(A dt) state + dt x B^T`` and ``y = state C + D x`` for each token and head.

    Parameters
    ----------
    x : Tensor
        Inputs ``(batch, time, heads, headdim)``.
    dt : Tensor
        Positive step sizes ``(batch, time, heads)``, bias and softplus already applied.
    A : Tensor
        Negative decay rates ``(heads,)``.
    B, C : Tensor
        Input and output projections ``(batch, time, groups, dstate)``; heads are split evenly over groups.
    D : Tensor
        Skip weights ``(heads,)``.
    state : Tensor, optional
        State before the first token ``(batch, heads, headdim, dstate)``; None: zeros.  Not modified.

    Returns
    -------
    tuple of Tensor
        Outputs ``(batch, time, heads, headdim)`` and the state after the last token.
    """
    batch, time, heads, headdim = x.shape
    repeat = heads // B.shape[2]
    B, C = B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2)
    if state is None:
        state = x.new_zeros(batch, heads, headdim, B.shape[-1])
    outputs = []
    for t in range(time):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    y = torch.stack(outputs, dim=1) if outputs else x.new_zeros(x.shape)
    return y, state


def chunked_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence in chunks, each a few matrix products; arguments and results are those of :func:`recurrence`.

    Parameters
    ----------
    chunk : int
        Tokens per chunk.  Sequences may have any length; the last chunk is padded with step sizes of zero, which change
        nothing.
    """
    if chunk < 1:
        raise ValueError(describe("chunk", "a positive number of tokens", chunk))
    batch, time, heads, headdim = x.shape
    groups, dstate = B.shape[2:]
    count = -(-time // chunk)
    fill = count * chunk - time
    skip = D[:, None] * x
    if fill:
        x, B, C = (torch.nn.functional.pad(v, (0, 0, 0, 0, 0, fill)) for v in (x, B, C))
        dt = torch.nn.functional.pad(dt, (0, 0, 0, fill))

    per_group = heads // groups
    # (batch, chunk, group, head of the group, token of the chunk, ...)
    X = (
        (dt[..., None] * x)
        .to(x.dtype)
        .reshape(batch, count, chunk, groups, per_group, headdim)
        .permute(0, 1, 3, 4, 2, 5)
    )
    Bc = B.reshape(batch, count, chunk, groups, dstate).permute(0, 1, 3, 2, 4)
    Cc = C.reshape(batch, count, chunk, groups, dstate).permute(0, 1, 3, 2, 4)
    total = torch.cumsum((dt * A).reshape(batch, count, chunk, groups, per_group).permute(0, 1, 3, 4, 2), dim=-1)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")))
    scores = torch.matmul(Cc, Bc.transpose(-1, -2))
    y = torch.matmul(scores[:, :, :, None] * decay.to(scores.dtype), X)

    # contribution of each chunk to the state at its end, and the state at its start
    left = torch.exp(total[..., -1:] - total)
    added = torch.matmul((X * left[..., None].to(X.dtype)).transpose(-1, -2), Bc[:, :, :, None])
    kept = torch.exp(total[..., -1])[..., None, None]
    if state is None:
        current = added.new_zeros(batch, groups, per_group, headdim, dstate, dtype=dt.dtype)
    else:
        current = state.reshape(batch, groups, per_group, headdim, dstate)
    starts = []
    for index in range(count):
        starts.append(current)
        current = kept[:, index] * current + added[:, index]
    if starts:
        carried = torch.matmul(Cc[:, :, :, None], torch.stack(starts, dim=1).to(Cc.dtype).transpose(-1, -2))
        y = y + torch.exp(total)[..., None].to(carried.dtype) * carried
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, count * chunk, heads, headdim)[:, :time]
    return y + skip, current.reshape(batch, heads, headdim, dstate)

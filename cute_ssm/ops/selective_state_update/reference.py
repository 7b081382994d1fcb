"""The selective state update, as mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cute_ssm.reference import rounding

if TYPE_CHECKING:
    from cute_ssm.ops.selective_state_update.arguments import Arguments


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


def update(call: Arguments, philox_rounds: int) -> None:
    """Do to checked arguments what the operator documents, token by token in float32.

    Parameters
    ----------
    call : Arguments
        ``state``, ``state_scale``, ``out`` and the intermediate tensors are **written**.
    philox_rounds : int
        0: round states to nearest even.
    """
    o = call
    first, lengths = _extents(o)
    batch = len(first)
    rows = torch.arange(batch)
    source = rows if o.state_batch_indices is None else _source(o)
    real = torch.ones(batch, dtype=torch.bool) if o.state_batch_indices is None else source != o.pad_slot_id
    if o.zero_padding:
        for b in rows[~real].tolist():
            o.out[_token(o, first, torch.tensor([b]), slice(0, int(lengths[b])))] = 0
    rows = rows[real & (lengths > 0)]
    source = source.long()
    states = torch.zeros(batch, *o.state.shape[1:])
    states[rows] = rounding.load(o.state[source[rows]], None if o.state_scale is None else o.state_scale[source[rows]])
    for t in range(int(lengths[rows].max()) if len(rows) else 0):
        rows = rows[lengths[rows] > t]
        at = _token(o, first, rows, t)
        z = None if o.z is None else o.z[at]
        y, states[rows] = selective_state_update(
            states[rows], o.x[at], o.dt[at], o.A, o.B[at], o.C[at], o.D, z, o.dt_bias, o.dt_softplus
        )
        o.out[at] = y.to(o.out.dtype)
        ends = rows[lengths[rows] == t + 1]
        _keep(o, philox_rounds, states, source, rows, ends, t)


def _keep(o: Arguments, rounds: int, states: Tensor, source: Tensor, rows: Tensor, ends: Tensor, t: int) -> None:
    """Store states after token t: of `rows` where every token's goes somewhere, of `ends` where the last one's does."""

    def store(
        pool: Tensor, scales: Tensor | None, at: tuple[Tensor | int, ...], sequences: Tensor, lines: Tensor
    ) -> None:
        bits = None
        if rounds and o.rand_seed is not None:
            seeds = o.rand_seed[source[sequences] if len(o.rand_seed) > 1 else torch.zeros_like(sequences)]
            bits = _random_bits(seeds, rounds, lines, pool.shape[-3:], t)
        stored, scale = rounding.store(states[sequences], pool.dtype, bits=bits, saturate=o.saturate)
        pool[at] = stored
        if scale is not None and scales is not None:
            scales[at] = scale

    if o.intermediate_states_buffer is not None:
        indices = o.intermediate_state_indices
        lines = (source if indices is None else indices.long())[rows]
        store(o.intermediate_states_buffer, o.intermediate_state_scales, (lines, t), rows, lines)
    if o.disable_state_update:
        return
    dst = o.dst_state_batch_indices
    if dst is not None and dst.dim() == 2:
        sequences, target = rows, dst[rows, t].long()
    else:
        sequences, target = ends, source[ends] if dst is None else dst[ends].long()
    kept = target != o.pad_slot_id if dst is not None else torch.ones_like(target, dtype=torch.bool)
    if kept.any():
        store(o.state, o.state_scale, (target[kept],), sequences[kept], target[kept])


def _extents(o: Arguments) -> tuple[Tensor, Tensor]:
    """(first packed row, number of tokens) of each sequence."""
    if o.cu_seqlens is not None:
        return o.cu_seqlens[:-1].long(), o.cu_seqlens.diff().long()
    batch, steps = o.x.shape[0], o.x.shape[1] if o.x.dim() == 4 else 1
    return torch.arange(batch), torch.full((batch,), steps)


def _source(o: Arguments) -> Tensor:
    """Slot that each sequence reads."""
    indices = o.state_batch_indices
    if indices is None or o.num_accepted_tokens is None:
        return torch.empty(0) if indices is None else indices
    columns = (o.num_accepted_tokens.long() - 1).clamp(0, indices.shape[1] - 1)
    return indices[torch.arange(len(indices)), columns]


def _token(o: Arguments, first: Tensor, rows: Tensor, t: int | slice) -> tuple[Any, ...]:
    """Index of token t of sequences in x, dt, B, C, z and out."""
    if o.cu_seqlens is None:
        return (rows, t) if o.x.dim() == 4 else (rows,)
    if isinstance(t, slice):
        return (torch.arange(int(first[rows]), int(first[rows]) + t.stop),)
    return (first[rows] + t,)


def _random_bits(seeds: Tensor, rounds: int, lines: Tensor, shape: torch.Size, t: int) -> Tensor:
    """Random bits of states (sequences, nheads, dim, dstate) that are written to slots or rows `lines`."""
    heads, dim, dstate = shape
    axes = [torch.arange(n) for n in (heads, dim, dstate)]
    head, row, column = torch.meshgrid(*axes, indexing="ij")
    view = (-1, 1, 1, 1)
    return rounding.random_bits(seeds.view(view), rounds, lines.view(view), head, row, column, dstate, t)

"""The selective state update in PyTorch: the mathematics, and what the operator does with it."""

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
    """Advance one token per sequence.  Modifies no argument and rounds nothing to the types of storage.

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
    """Run a checked call, token by token in float32.

    Parameters
    ----------
    call : Arguments
        ``state``, ``state_scale``, ``out`` and the intermediate tensors are **written**.
    philox_rounds : int
        0: round states to nearest even.
    """
    first_rows, lengths = _extents(call)
    batch = len(lengths)
    src_slots, active = torch.arange(batch), torch.ones(batch, dtype=torch.bool)
    if call.state_batch_indices is not None:
        src_slots = _src_slots(call.state_batch_indices, call.num_accepted_tokens)
        active = src_slots != call.pad_slot_id
    if call.zero_padding:
        for b in (~active).nonzero()[:, 0].tolist():
            call.out[_token(call, first_rows, torch.tensor([b]), slice(0, int(lengths[b])))] = 0
    sequences = (active & (lengths > 0)).nonzero()[:, 0]
    src_slots = src_slots.long()
    states = torch.zeros(batch, *call.state.shape[1:])
    slots = src_slots[sequences]
    scales = None if call.state_scale is None else call.state_scale[slots]
    states[sequences] = rounding.load(call.state[slots], scales)
    for t in range(int(lengths[sequences].max()) if len(sequences) else 0):
        sequences = sequences[lengths[sequences] > t]
        at = _token(call, first_rows, sequences, t)
        z = None if call.z is None else call.z[at]
        y, states[sequences] = selective_state_update(
            states[sequences], call.x[at], call.dt[at], call.A, call.B[at], call.C[at], call.D, z, call.dt_bias,
            call.dt_softplus,
        )  # fmt: skip
        call.out[at] = y.to(call.out.dtype)
        ended = sequences[lengths[sequences] == t + 1]
        _store_states(call, philox_rounds, states, src_slots, sequences, ended, t)


def _store_states(
    call: Arguments, rounds: int, states: Tensor, src_slots: Tensor, sequences: Tensor, ended: Tensor, t: int
) -> None:
    """Store states after token t.

    `sequences` have a token t, `ended` no later one: the former are stored where every token has a destination.
    """

    def store(
        pool: Tensor, scales: Tensor | None, at: tuple[Tensor | int, ...], chosen: Tensor, dst_slots: Tensor
    ) -> None:
        bits = None
        if rounds and call.rand_seed is not None:
            seeds = call.rand_seed[src_slots[chosen] if len(call.rand_seed) > 1 else torch.zeros_like(chosen)]
            bits = _random_bits(seeds, rounds, dst_slots, pool.shape[-3:], t)
        stored, scale = rounding.store(states[chosen], pool.dtype, bits=bits, saturate=call.saturate)
        pool[at] = stored
        if scale is not None and scales is not None:
            scales[at] = scale

    if call.intermediate_states_buffer is not None:
        indices = call.intermediate_state_indices
        rows = (src_slots if indices is None else indices.long())[sequences]
        store(call.intermediate_states_buffer, call.intermediate_state_scales, (rows, t), sequences, rows)
    if call.disable_state_update:
        return
    dst = call.dst_state_batch_indices
    if dst is not None and dst.dim() == 2:
        chosen, dst_slots = sequences, dst[sequences, t].long()
    else:
        chosen, dst_slots = ended, src_slots[ended] if dst is None else dst[ended].long()
    if dst is not None:
        active = dst_slots != call.pad_slot_id
        chosen, dst_slots = chosen[active], dst_slots[active]
    if len(chosen):
        store(call.state, call.state_scale, (dst_slots,), chosen, dst_slots)


def _extents(call: Arguments) -> tuple[Tensor, Tensor]:
    """Return the first packed row and the number of tokens of each sequence."""
    if call.cu_seqlens is not None:
        return call.cu_seqlens[:-1].long(), call.cu_seqlens.diff().long()
    batch, steps = call.x.shape[0], call.x.shape[1] if call.x.dim() == 4 else 1
    return torch.arange(batch), torch.full((batch,), steps)


def _src_slots(indices: Tensor, num_accepted_tokens: Tensor | None) -> Tensor:
    """Return the slot that each sequence reads."""
    if num_accepted_tokens is None:
        return indices
    columns = (num_accepted_tokens.long() - 1).clamp(0, indices.shape[1] - 1)
    return indices[torch.arange(len(indices)), columns]


def _token(call: Arguments, first_rows: Tensor, sequences: Tensor, t: int | slice) -> tuple[Any, ...]:
    """Return the index of token t of some sequences in x, dt, B, C, z and out."""
    if call.cu_seqlens is None:
        return (sequences, t) if call.x.dim() == 4 else (sequences,)
    if isinstance(t, slice):
        return (torch.arange(int(first_rows[sequences]), int(first_rows[sequences]) + t.stop),)
    return (first_rows[sequences] + t,)


def _random_bits(seeds: Tensor, rounds: int, dst_slots: Tensor, shape: torch.Size, t: int) -> Tensor:
    """Return the random bits of states (sequences, nheads, dim, dstate) that are written to slots of a pool."""
    heads, dim, dstate = shape
    axes = [torch.arange(n) for n in (heads, dim, dstate)]
    head, row, column = torch.meshgrid(*axes, indexing="ij")
    view = (-1, 1, 1, 1)
    return rounding.random_bits(seeds.view(view), rounds, dst_slots.view(view), head, row, column, dstate, t)

"""One token of a recurrence from a state and a window of earlier tokens, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cute_ssm.reference import rounding
from cute_ssm.reference.history import fold

if TYPE_CHECKING:
    from cute_ssm.ops.replay_decode.arguments import Arguments


class Weights(NamedTuple):
    """Weights of the heads: A (nheads,), and D (nheads, dim)."""

    A: Tensor
    D: Tensor | None


def replay_decode(
    state: Tensor, x: Tensor, B: Tensor, dt: Tensor, C: Tensor, z: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor]:
    """Return the outputs at the last of several tokens, and the state after it.

    With the state S0 [dim, dstate] of a head before the tokens, and c_j the sum of A dt' of all tokens after token j::

        S = exp(A sum_j dt'_j) S0 + sum_j exp(c_j) dt'_j x_j B_j^T;    out = (S C + D x) silu(z)

    Parameters
    ----------
    state : Tensor, (nheads, dim, dstate)
        Its type is that of all arithmetic.
    x, B, dt : Tensor, (tokens, nheads, dim), (tokens, ngroups, dstate), (nheads, tokens)
        ``dt`` is processed.
    C, z : Tensor, (ngroups, dstate), (nheads, dim)
        Of the last token.

    Returns
    -------
    out : Tensor, (nheads, dim)
    state : Tensor, (nheads, dim, dstate)
    """
    new = fold(state, x, B, dt, weights.A)
    C = C.to(state.dtype).repeat_interleave(len(weights.A) // len(C), 0)
    out = torch.einsum("hpn,hn->hp", new, C)
    if weights.D is not None:
        out = out + weights.D.to(state.dtype) * x[-1].to(state.dtype)
    if z is not None:
        out = out * torch.nn.functional.silu(z.to(state.dtype))
    return out, new


def update(call: Arguments, rounds: int) -> None:
    """Run a checked call in float32: store outputs, and either the token in the caches or the new state.

    Parameters
    ----------
    rounds : int
        Rounds of Philox; 0: states are rounded to nearest even.
    """
    batch = call.x.shape[0]
    slots = range(batch) if call.state_batch_indices is None else call.state_batch_indices.tolist()
    weights = Weights(call.A, call.D)
    for b, slot in enumerate(slots):
        if call.state_batch_indices is not None and slot == call.null_block_id:
            continue
        k, caches = int(call.write_pos[b]), (call.x_cache[slot], call.B_cache[slot])
        x, B = (torch.cat([cache[:, :k].transpose(0, 1), new[b, None]]) for cache, new in zip(caches, (call.x, call.B)))
        step = call.dt[b].float() if call.dt_bias is None else call.dt[b].float() + call.dt_bias.float()
        step = torch.nn.functional.softplus(step, threshold=20.0) if call.dt_softplus else step
        dt = torch.cat([call.dt_cache[slot, :, :k], step[:, None]], 1)
        z = None if call.z is None else call.z[b]
        out, new = replay_decode(call.state[slot].float(), x, B, dt, call.C[b], z, weights)
        call.out[b] = out.to(call.out.dtype)
        if not bool(call.is_flush[b]):
            call.x_cache[slot, :, k], call.B_cache[slot, :, k], call.dt_cache[slot, :, k] = call.x[b], call.B[b], step
            continue
        bits = None
        if call.rand_seed is not None:
            head, row, column = torch.meshgrid(*(torch.arange(size) for size in new.shape), indexing="ij")
            bits = rounding.random_bits(call.rand_seed[0], rounds, slot, head, row, column, new.shape[-1], k)
        call.state[slot], _ = rounding.store(new, call.state.dtype, bits=bits, saturate=call.saturate)

"""Tokens of a recurrence that defers state writes: the mathematics, and which rows of the history it reads and writes.

For every sequence the pool holds a state S0 and the inputs of its ``k`` pending tokens, at most W: those that were
accepted after S0 was stored.  With dt' the processed step sizes, and one running sum over pending and new tokens ::

    c_j = sum_{i <= j} A dt'_i

the output at the new token t, which is token ``m = k + t`` of all, is ::

    y_t = e^{c_m} S0 C_t + sum_{j <= m} e^{c_m - c_j} dt'_j (C_t . B_j) x_j + D x_t,     out_t = y_t silu(z_t)

whether or not the step writes the state.  A step with n tokens writes it if they do not fit, ``k + n > W``.  The new
state depends on the pending tokens only, not on the new ones ::

    S1 = e^{c_{k-1}} S0 + sum_{j < k} e^{c_{k-1} - c_j} dt'_j x_j B_j^T

Its exponents are summed from the last token on, because differences of long sums lose the digits that cancel.
With k = 0 it is S0 itself, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cute_ssm.reference import rounding
from cute_ssm.reference.history import History, fold, running_sums

if TYPE_CHECKING:
    from cute_ssm.ops.checkpointing_ssu.arguments import Arguments
    from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec


def outputs(state: Tensor, x: Tensor, B: Tensor, dt: Tensor, A: Tensor, C: Tensor) -> Tensor:
    """Return ``y``, without skip term and gate, at the last tokens: as many as C has.

    Parameters
    ----------
    state, x, B, dt, A
        As for `fold`: a state, and all tokens since.
    C : Tensor, (new tokens, ngroups, dstate)

    Returns
    -------
    Tensor, (new tokens, nheads, dim)
    """
    x, B, dt, A, C = (tensor.to(state.dtype) for tensor in (x, B, dt, A, C))
    n, m, heads = len(C), len(x), x.shape[1]
    B, C = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))
    sums = running_sums(A, dt)
    results = [x.new_zeros(0, *x.shape[1:])]
    for t in range(n):
        end = m - n + t + 1  # later tokens are left out: zero times NaN or infinity is not zero
        c = sums[:, :end]
        products = torch.einsum("hn,jhn->hj", C[t], B[:end])  # (nheads, tokens)
        coefficients = torch.exp(c[:, -1:] - c) * dt[:, :end] * products
        of_state = torch.exp(c[:, -1])[:, None] * torch.einsum("hpn,hn->hp", state, C[t])
        results.append((of_state + torch.einsum("hj,jhp->hp", coefficients, x[:end]))[None])
    return torch.cat(results)


def step_sizes(dt: Tensor, dt_bias: Tensor | None, softplus: bool) -> Tensor:
    """Return dt' (nheads, tokens), float32, of dt (tokens, nheads) and dt_bias (nheads,)."""
    steps = dt.float()
    if dt_bias is not None:
        steps = steps + dt_bias.float()
    if softplus:
        steps = torch.nn.functional.softplus(steps, threshold=20.0)
    return steps.T


class Row(NamedTuple):
    """A sequence that a step works on."""

    position: int  # in the batch
    slot: int
    pending: int
    cursor: int
    tokens: slice  # its rows of x[batch]
    batch: int  # index of the first axis; 0 with cu_seqlens


def rows(o: Arguments) -> Iterator[Row]:
    """List the sequences that have tokens and are no padding, in the order of the batch or of the work items."""
    packed = o.cu_seqlens
    batch = o.x.shape[0] if packed is None else len(packed) - 1
    items = None if o.work_items is None else o.work_items.tolist()
    slots = range(batch) if o.state_batch_indices is None else o.state_batch_indices.tolist()
    for index in range(batch):
        position, slot, pending, cursor = items[index] if items is not None else (index, slots[index], 0, 0)
        first, last = (0, o.x.shape[1]) if packed is None else packed[position : position + 2].tolist()
        if slot == o.pad_slot_id or first >= last:
            continue
        if items is None:
            pending, cursor = int(o.prev_num_accepted_tokens[slot]), int(o.cursor[slot])
        yield Row(position, slot, pending, cursor, slice(first, last), position if packed is None else 0)


def update(call: Arguments, spec: CheckpointingSSUSpec) -> None:
    """Run a checked call as the operators document it, sequence by sequence in float32.

    Parameters
    ----------
    call : Arguments
        ``state``, ``state_scale``, ``out`` and the history are **written**.
    spec : CheckpointingSSUSpec
    """
    o = call
    history = History.of(o.x_history, o.B_history, o.dt_history, o.cum_history)
    A = o.A[:, 0, 0].float()
    D, dt_bias = (None if tensor is None else tensor[:, 0].float() for tensor in (o.D, o.dt_bias))
    for row in rows(o):
        x, B, C, dt = (tensor[row.batch, row.tokens] for tensor in (o.x, o.B, o.C, o.dt))
        new_dt = step_sizes(dt[..., 0], dt_bias, spec.dt_softplus)
        state = rounding.load(o.state[row.slot], None if o.state_scale is None else o.state_scale[row.slot])
        old_x, old_B, old_dt = history.read(row.slot, row.cursor, row.pending)
        all_dt = torch.cat([old_dt, new_dt], 1)
        y = outputs(state, torch.cat([old_x, x]), torch.cat([old_B, B]), all_dt, A, C)
        if D is not None:
            y = y + D[:, None] * x.float()
        if o.z is not None:
            y = y * torch.nn.functional.silu(o.z[row.batch, row.tokens].float())
        o.out[row.batch, row.tokens] = y.to(o.out.dtype)
        writes = row.pending + len(x) > spec.window
        if writes and row.pending:
            _write(o, spec, row.slot, fold(state, old_x, old_B, old_dt, A))
        sums = running_sums(A, new_dt if writes else all_dt)[:, -len(x) :]
        history.append(row.slot, row.cursor, row.pending, writes, x, B, new_dt, sums)


def _write(o: Arguments, spec: CheckpointingSSUSpec, slot: int, state: Tensor) -> None:
    """Round a state (nheads, dim, dstate) into a slot."""
    bits = None
    if spec.philox_rounds and o.rand_seed is not None:
        seed = o.rand_seed[slot if spec.seed_per_slot else 0]
        head, row, column = torch.meshgrid(*(torch.arange(size) for size in state.shape), indexing="ij")
        itemsize = o.state.element_size()
        bits = rounding.fragment_bits(seed, spec.philox_rounds, slot, head, row, column, spec.dstate, itemsize)
    stored, scale = rounding.store(state, o.state.dtype, bits=bits, saturate=spec.saturate)
    o.state[slot] = stored
    if scale is not None and o.state_scale is not None:
        o.state_scale[slot] = scale

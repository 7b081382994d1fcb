"""What `selective_scan` computes, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm.ops.selective_scan import plan
from cute_ssm.reference.rounding import saturated

if TYPE_CHECKING:
    from cute_ssm.ops.selective_scan.arguments import Arguments

_WEIGHTS = ("A", "D", "delta_bias")  # have no axis of tokens


class _Inputs(NamedTuple):
    """The tensors of a scan, or what belongs to each, in the order of `selective_scan`."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any


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
    """Scan sequences of equal length token by token, without modifying an argument or rounding a result.

    For every (sequence, channel) with the states h [dstate], and the group g of the channel, each token computes::

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
        Type of all arithmetic: float64 for the oracle of tests.

    Returns
    -------
    y, out : Tensor, (batch, dim, length), compute_dtype
        Outputs before and after the gate; the same if there is no gate.
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


def selective_scan_gradients(
    tensors: Sequence[Tensor | None],
    delta_softplus: bool,
    grad_out: Tensor,
    grad_state: Tensor | None,
    compute_dtype: torch.dtype = torch.float32,
    segment: int = 64,
) -> list[Tensor | None]:
    """Return the gradients of all arguments of a scan from zero states, by recomputing it.

    The scan is cut into segments, and only the states between them are stored.  From the last segment to the first,
    each is computed again and differentiated.

    Parameters
    ----------
    tensors : u, delta, A, B, C, D, z, delta_bias
        As for `selective_scan`.
    delta_softplus : bool
    grad_out : Tensor, (batch, dim, length)
        Gradient of `out`.
    grad_state : Tensor, (batch, dim, dstate), optional
        Gradient of `new_state`.
    compute_dtype : torch.dtype
    segment : int
        Tokens of a segment.  Memory grows with this, and with the number of segments.

    Returns
    -------
    list of Tensor or None
        In the order, shapes and types of `tensors`.
    """
    given = _Inputs(*tensors)
    batch, dim, length = given.u.shape
    parts = [slice(begin, begin + segment) for begin in range(0, length, segment)]

    def of(part: slice, values: _Inputs) -> _Inputs:
        """Return those of some tokens."""
        cut = {name: t if t is None or name in _WEIGHTS else t[..., part] for name, t in values._asdict().items()}
        return _Inputs(**cut)

    def scan(values: _Inputs, first: Tensor) -> tuple[Tensor, Tensor]:
        _, gated, state = selective_scan(*values, delta_softplus, first, compute_dtype)
        return gated, state

    carry = given.A.new_zeros(batch, dim, given.A.shape[1], dtype=compute_dtype)
    states = [carry]
    with torch.no_grad():
        for part in parts[:-1]:
            _, state = scan(of(part, given), states[-1])
            states.append(state)
    if grad_state is not None:
        carry = grad_state.to(compute_dtype)
    found = _Inputs(*(None if t is None else torch.zeros_like(t) for t in given))
    for part, state in zip(reversed(parts), reversed(states)):
        with torch.enable_grad():
            first = state.detach().requires_grad_()
            leaves = _Inputs(*(None if t is None else t.detach().requires_grad_() for t in of(part, given)))
            results = scan(leaves, first)
        wanted = [leaf for leaf in (*leaves, first) if leaf is not None]
        grads = iter(torch.autograd.grad(results, wanted, (grad_out[..., part].to(compute_dtype), carry)))
        for total in of(part, found):
            if total is not None:
                total.add_(next(grads))
        carry = next(grads)
    return list(found)


def scan_sequences(call: Arguments, ungated: Tensor | None, sequences: Sequence[plan.Sequence]) -> None:
    """Run a checked call, one sequence and segment after another in float32.

    Parameters
    ----------
    call : Arguments
        ``out`` and ``ssm_states`` are **written**.
    ungated : Tensor, like ``out``, optional
        **Written**: the outputs before the gate.
    sequences : sequence of plan.Sequence
    """

    def channels(tensor: Tensor) -> Tensor:
        return plan.channel_rows(call, tensor)

    u, delta, out, states = channels(call.u), channels(call.delta), channels(call.out), call.ssm_states
    B, C = plan.column_rows(call, call.B), plan.column_rows(call, call.C)
    for sequence in sequences:
        state = None if sequence.source is None or states is None else states[sequence.source][None]
        begin, row = sequence.begin, slice(sequence.row, sequence.row + 1)
        for stop, target in sequence.ends:
            part = (row, ..., slice(begin, stop))
            z = None if call.z is None else channels(call.z)[part]
            y, gated, state = selective_scan(
                u[part], delta[part], call.A, B[part], C[part], call.D, z, call.delta_bias, call.delta_softplus, state
            )
            if ungated is not None:
                channels(ungated)[part] = y.to(ungated.dtype)
            out[part] = gated.to(out.dtype)
            if target is not None and states is not None:
                states[target] = (saturated(state[0]) if call.saturate else state[0]).to(states.dtype)
            begin = stop

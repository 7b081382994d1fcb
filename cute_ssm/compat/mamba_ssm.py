"""Functions with the signatures and conventions of ``mamba_ssm``."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cute_ssm.compat._types import of_one_type
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gradients import requires_grad
from cute_ssm.ops.selective_scan.operator import selective_scan
from cute_ssm.ops.selective_scan.reference import selective_scan_gradients
from cute_ssm.ops.selective_state_update.operator import selective_state_update as _update

PAD_SLOT_ID = -1


@overload
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
) -> Tensor: ...


@overload
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan sequences of equal length from zero states, like mamba_ssm's function of this name.

    Parameters
    ----------
    u, delta : Tensor, (batch, dim, length), float32/bfloat16/float16
        Any strides, as for B, C and z; stride 1 in the last dimension avoids a copy.
    A : Tensor, (dim, dstate), float32
    B, C : Tensor, (batch, dstate, length) or (batch, ngroups, dstate, length), type of u
        Projections of shape (dim, dstate), the same for all tokens, are not supported.
    D, delta_bias : Tensor, (dim,), optional
        Converted to float32.
    z : Tensor, (batch, dim, length), type of u, optional
        Gate.
    delta_softplus : bool
        Apply softplus to delta + delta_bias.
    return_last_state : bool
        Return the final states as well.

    Returns
    -------
    out : Tensor, (batch, dim, length), type of u
    last_state : Tensor, (batch, dim, dstate), float32
        Only with ``return_last_state``.

    Raises
    ------
    ValueError, TypeError
        As for `cute_ssm.selective_scan`.
    UnsupportedSpecError
        B or C has shape (dim, dstate).

    Notes
    -----
    No argument is modified.  As in mamba_ssm, outputs and ``last_state`` have gradients with respect to all arguments,
    if grad mode is on and an argument requires grad.  The forward pass is that of the operator on every backend; the
    backward pass recomputes the scan in float32, token by token, in PyTorch.  It is meant for tests and small
    fine-tuning runs: use mamba_ssm's kernels for training.
    """
    for name, tensor in (("B", B), ("C", C)):
        if isinstance(tensor, Tensor) and tensor.dim() == 2:
            expected = "shape (batch, dstate, length) or (batch, ngroups, dstate, length)"
            raise UnsupportedSpecError(describe(name, expected, tuple(tensor.shape), "repeat it for every token"))
    states = None
    if return_last_state and isinstance(u, Tensor) and isinstance(A, Tensor) and u.dim() == 3 and A.dim() == 2:
        zeros = torch.zeros if u.shape[2] == 0 else torch.empty
        states = zeros(u.shape[0], u.shape[1], A.shape[1], dtype=torch.float32, device=u.device)
    D, delta_bias = (t.float() if isinstance(t, Tensor) else t for t in (D, delta_bias))
    if torch.is_grad_enabled() and requires_grad((u, delta, A, B, C, D, z, delta_bias)):
        return _Scan.apply(states, delta_softplus, u, delta, A, B, C, D, z, delta_bias)  # type: ignore[no-untyped-call, no-any-return]
    out = selective_scan(u, states, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return out if states is None else (out, states)


class _Scan(torch.autograd.Function):
    """The operator, with gradients by its reference."""

    @staticmethod
    def forward(ctx: Any, states: Tensor | None, delta_softplus: bool, *tensors: Any) -> Any:
        u, delta, A, B, C, D, z, delta_bias = tensors
        ctx.softplus = delta_softplus
        ctx.save_for_backward(*tensors)
        out = selective_scan(u, states, delta, A, B, C, D, z, delta_bias, delta_softplus)
        if states is None:
            return out
        ctx.mark_dirty(states)
        return out, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor | None = None) -> Any:
        tensors = list(ctx.saved_tensors)
        grouped = [t.unsqueeze(1) if i in (3, 4) and t.dim() == 3 else t for i, t in enumerate(tensors)]
        found = selective_scan_gradients(grouped, ctx.softplus, grad_out, grad_state)
        return None, None, *(None if g is None else g.view(t.shape) for g, t in zip(found, tensors))


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance states by one token, like mamba_ssm's function of this name.

    Parameters
    ----------
    state : Tensor, (batch or slots[, nheads], dim, dstate), float32/bfloat16/float16
        **Updated in place.**  Layout as for `cute_ssm.selective_state_update`.
    x, dt : Tensor, (batch[, nheads], dim), float32/bfloat16/float16
        Any strides, as for B, C and z; stride 1 in the last dimension avoids a copy, as does stride 0 for dt.
    A : Tensor, ([nheads, ]dim, dstate), float32/bfloat16/float16
        Strides 0 in the last two dimensions mean one value per head.
    B, C : Tensor, (batch[, ngroups], dstate)
    D, dt_bias : Tensor, ([nheads, ]dim), optional
    z : Tensor, like x, optional
        Gate.
    dt_softplus : bool
        Apply softplus to dt + dt_bias.
    state_batch_indices : Tensor, (batch,), int32/int64, optional
        Slot of each sequence.  -1 is padding, whose output is zero.

    Returns
    -------
    Tensor
        Output, with shape and dtype of x.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    If x, B, C and z have different types, those that are not float32 are converted to it, and the output back: nothing
    but the output is rounded, as in mamba_ssm.
    """
    kind = x.dtype if isinstance(x, Tensor) else None
    x, B, C, z = map(_dense, of_one_type(x, *map(_narrow, (B, C, z))))
    if isinstance(A, Tensor) and A.dim() >= 2 and A.stride(-1) != 1 and (A.stride(-1) or A.stride(-2)):
        A = A.contiguous()
    out = _update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        state_batch_indices=state_batch_indices,
        pad_slot_id=PAD_SLOT_ID,
    )
    return out if kind in (None, out.dtype) else out.to(kind)


def _narrow(tensor: Any) -> Any:
    """Return a tensor of float64 as float32."""
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 else tensor


def _dense(tensor: Any) -> Any:
    """Return a tensor with stride 1 in its last dimension."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()

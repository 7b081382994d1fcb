"""Functions with the signatures and conventions of ``mamba_ssm``; forward only."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.selective_scan import selective_scan


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
    """Scan sequences of equal length from zero states, like ``mamba_ssm.ops.selective_scan_interface``.

    Parameters
    ----------
    u, delta : Tensor, (batch, dim, length), float32/bfloat16/float16
        Any strides, like B, C and z; stride 1 in the last dimension saves a copy.
    A : Tensor, (dim, dstate), float32
    B, C : Tensor, (batch, dstate, length) or (batch, ngroups, dstate, length), type of u
        Projections that do not depend on the token, (dim, dstate), are refused.
    D, delta_bias : Tensor, (dim,), optional
        Used in float32.
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
        B or C does not depend on the token.

    Notes
    -----
    No argument is modified, and there is no gradient.
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
    out = selective_scan(u, states, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return out if states is None else (out, states)

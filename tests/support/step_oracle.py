"""The recurrence of a state update as a NumPy loop in float64, and random arguments for it; free of the package."""

from __future__ import annotations

import numpy as np
import torch


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def softplus(value: np.ndarray) -> np.ndarray:
    return np.where(value > 20, value, np.log1p(np.exp(np.minimum(value, 20))))


def token(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """One token of one sequence: state (heads, dim, dstate), x (heads, dim), B (groups, dstate); (state, out)."""
    step = dt if dt_bias is None else dt + dt_bias
    step = softplus(step) if dt_softplus else step
    B, C = (np.repeat(t, len(x) // len(t), axis=0) for t in (B, C))
    new = np.exp(A * step[..., None]) * state + (step * x)[..., None] * B[:, None, :]
    y = (new * C[:, None, :]).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * z / (1 + np.exp(-z))
    return new, y


def tokens(rows=4, heads=4, dim=64, dstate=32, groups=2, dtype=torch.float32, seed=0, tied=True) -> dict:
    """Arguments of a call but for the state: a row of x for every token."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    def per_head(*shape):
        return randn(*shape)[..., None].expand(*shape, dim) if tied else randn(*shape, dim)

    log = torch.rand(heads, 1, 1, generator=g) if tied else torch.rand(heads, dim, dstate, generator=g)
    return {
        "x": randn(rows, heads, dim).to(dtype),
        "dt": per_head(rows, heads),
        "A": (-torch.exp(log)).expand(heads, dim, dstate),
        "B": randn(rows, groups, dstate).to(dtype),
        "C": randn(rows, groups, dstate).to(dtype),
        "D": per_head(heads),
        "dt_bias": per_head(heads),
        "z": randn(rows, heads, dim).to(dtype),
        "dt_softplus": True,
    }


def states(slots, heads=4, dim=64, dstate=32, dtype=torch.float32, seed=1) -> torch.Tensor:
    return torch.randn(slots, heads, dim, dstate, generator=torch.Generator().manual_seed(seed)).to(dtype)


def at_row(call: dict, row) -> dict:
    """Arguments of `token` for one row of a call."""
    per_token = {name: wide(call[name][row]) for name in ("x", "dt", "B", "C")}
    z = None if call.get("z") is None else wide(call["z"][row])
    weights = {name: None if call.get(name) is None else wide(call[name]) for name in ("A", "D", "dt_bias")}
    return {**per_token, **weights, "z": z, "dt_softplus": call.get("dt_softplus", False)}


def close(got: torch.Tensor, want: np.ndarray, dtype: torch.dtype | None = None) -> bool:
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype or got.dtype]
    return bool(np.allclose(wide(got), want, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(want).max()))))

"""The gated delta rule as a NumPy loop in float64, and arguments of engines' decode calls; free of the package."""

from __future__ import annotations

import numpy as np
import torch
from step_oracle import softplus, wide


def token(state, q, k, v, a, b, A_log, dt_bias, scale=None, l2norm=True):
    """One token of one request: state (value_heads, V, K), q and k (heads, K), v (value_heads, V); (state, out)."""
    if l2norm:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (np.repeat(x, len(v) // len(x), axis=0) for x in (q, k))
    decay = np.exp(-np.exp(A_log) * softplus(a + dt_bias))[:, None, None]
    state = decay * state
    change = (v - (state @ k[..., None])[..., 0]) / (1 + np.exp(-b))[:, None]
    state = state + change[..., None] * k[:, None, :]
    return state, (state @ q[..., None])[..., 0] * (q.shape[-1] ** -0.5 if scale is None else scale)


def rows(count=4, heads=2, value_heads=4, K=32, V=32, dtype=torch.bfloat16, seed=0) -> dict:
    """Inputs of this many tokens, a row each, and the weights."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    return {
        "q": randn(count, heads, K).to(dtype),
        "k": randn(count, heads, K).to(dtype),
        "v": randn(count, value_heads, V).to(dtype),
        "a": randn(count, value_heads).to(dtype),
        "b": randn(count, value_heads).to(dtype),
        "A_log": randn(value_heads) * 0.5,
        "dt_bias": randn(value_heads),
    }


def pool(slots, value_heads=4, V=32, K=32, dtype=torch.float32, seed=1) -> torch.Tensor:
    return torch.randn(slots, value_heads, V, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(call: dict) -> torch.Tensor:
    """The rows of q, k and v one behind the other, as the convolution of a layer returns them."""
    return torch.cat([call[name].flatten(1) for name in ("q", "k", "v")], dim=1)


def step(state, call: dict, row: int):
    """`token` for one row of a call."""
    inputs = (wide(call[name][row]) for name in ("q", "k", "v", "a", "b"))
    return token(state, *inputs, wide(call["A_log"]), wide(call["dt_bias"]))

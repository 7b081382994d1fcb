"""Functions with the signatures and conventions of ``fla`` (flash-linear-attention); forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gradients import refuse
from cute_ssm.ops.gated_delta_rule import gated_delta_rule_mtp


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Decode 1 to 16 tokens per sequence, like ``fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule``.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        tokens is 1 to 16; K is a multiple of 16 up to 256.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        V is a multiple of 16 up to 256, or 512.
    g : Tensor, (batch, tokens, value_heads), optional
        Logarithms of the decays, at most 0: states that grow are refused.  None: no decay.
    gk, gv, cu_seqlens
        Decays per key or value channel, and packed sequences: refused.
    beta : Tensor, (batch, tokens, value_heads), optional
        Steps, from 0 to 1: those up to 2 of ``allow_neg_eigval`` are refused.  None: 1.
    scale : float, optional
        Of q; None: ``K ** -0.5``.
    initial_state : Tensor, (batch, value_heads, K, V), float32/bfloat16/float16, optional
        Not modified.  None: zeros.
    output_final_state : bool
        Return the states after the last token.
    use_qk_l2norm_in_kernel : bool
        Normalise q and k.

    Returns
    -------
    out : Tensor, (batch, tokens, value_heads, V), type of q
    final_state : Tensor, (batch, value_heads, K, V), float32, or None

    Raises
    ------
    UnsupportedSpecError
        An argument that is refused, or values of g or beta that are.

    Notes
    -----
    Values of g and beta are looked at, which waits for a GPU, and cannot be captured into a CUDA graph.  States are
    copied to and from the layout of `cute_ssm.gated_delta_rule_mtp`, [V, K], which updates a pool in place: an engine
    calls that.
    """
    for name, value in (("gk", gk), ("gv", gv), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise UnsupportedSpecError(
                describe(name, "None", "a tensor", "this version decodes with one decay per head")
            )
    for name, value in (("q", q), ("v", v)):
        if not isinstance(value, Tensor) or value.dim() != 4:
            raise ValueError(describe(name, "a tensor of 4 dimensions", type(value).__name__))
    refuse("fused_recurrent_gated_delta_rule", q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    batch, tokens, value_heads, V = v.shape
    K = q.shape[-1]
    for name, value in (("g", g), ("beta", beta)):
        if value is not None and value.shape != (batch, tokens, value_heads):
            expected = f"shape (batch, tokens, value_heads) = {(batch, tokens, value_heads)}"
            raise ValueError(describe(name, expected, tuple(value.shape)))
    _check_gates(g, beta)
    if initial_state is not None and initial_state.shape != (batch, value_heads, K, V):
        expected = f"shape (batch, value_heads, K, V) = {(batch, value_heads, K, V)}"
        raise ValueError(describe("initial_state", expected, tuple(initial_state.shape)))
    pool = torch.zeros(batch, value_heads, V, K, device=v.device)
    if initial_state is not None:
        pool.copy_(initial_state.mT)
    # the operator's own gates, inverted: g = -softplus(a), beta = sigmoid(b)
    decay = torch.zeros(batch, tokens, value_heads, device=v.device) if g is None else -g.float()
    a = torch.where(decay < 20, decay + torch.log(-torch.expm1(-decay)), decay)
    b = torch.full_like(decay, torch.inf) if beta is None else torch.logit(beta.float())
    zeros = torch.zeros(value_heads, device=v.device)
    out, pool = gated_delta_rule_mtp(
        q.contiguous(), k.contiguous(), v.contiguous(), pool,
        torch.arange(batch, device=v.device, dtype=torch.int32), zeros, a, zeros, b, scale,
        disable_state_update=not output_final_state, use_qk_l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip
    return out, pool.mT if output_final_state else None


def _check_gates(g: Tensor | None, beta: Tensor | None) -> None:
    """Raise if a gate is none that the operator's own functions can give; NaN may be padding, and is let through."""
    if g is not None and bool((g > 0).any()):
        fix = "a softplus gives no decay above 1: the operator computes it from logits"
        raise UnsupportedSpecError(describe("g", "logarithms of decays, at most 0", float(g.nan_to_num(0).max()), fix))
    if beta is not None and bool(((beta < 0) | (beta > 1)).any()):
        low, high = (float(x) for x in beta.nan_to_num(0).aminmax())
        fix = "a sigmoid gives no step outside, such as those of allow_neg_eigval"
        raise UnsupportedSpecError(describe("beta", "steps from 0 to 1", f"{low:.4g} to {high:.4g}", fix))

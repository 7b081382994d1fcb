"""Functions with the signatures and conventions of ``fla`` (flash-linear-attention); forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._gradients import refuse
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp


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
    """Decode 1 to 16 tokens per sequence with the signature of fla's function of this name.

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        tokens is 1 to 16; K is a multiple of 16 up to 256.
    v : Tensor, (batch, tokens, value_heads, V), type of q
        V is a multiple of 16 up to 256, or 512.
    g : Tensor, (batch, tokens, value_heads), optional
        Logarithms of the decays, of any sign.  None: no decay.
    gk, gv, cu_seqlens
        Not supported: decays per key or value channel, and packed sequences.
    beta : Tensor, (batch, tokens, value_heads), optional
        Update weights, sigmoid already applied; up to 2 with ``allow_neg_eigval``.  None: 1.
    scale : float, optional
        Scale of q.  None: ``K ** -0.5``.
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
        An argument is not supported.

    Notes
    -----
    Every call copies states to and from the layout [V, K] of `cute_ssm.gated_delta_rule_mtp`.  Serving engines should
    call that function, which updates a pool in place.
    """
    for name, value in (("gk", gk), ("gv", gv), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            fix = "this version supports one decay per head, and sequences of equal length"
            raise UnsupportedSpecError(describe(name, "None", "a tensor", fix))
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
    if initial_state is not None and initial_state.shape != (batch, value_heads, K, V):
        expected = f"shape (batch, value_heads, K, V) = {(batch, value_heads, K, V)}"
        raise ValueError(describe("initial_state", expected, tuple(initial_state.shape)))
    pool = torch.zeros(batch, value_heads, V, K, device=v.device)
    if initial_state is not None:
        pool.copy_(initial_state.mT)
    decay = torch.zeros(batch, tokens, value_heads, device=v.device) if g is None else g.float()
    step = torch.ones_like(decay) if beta is None else beta.float()
    zeros = torch.zeros(value_heads, device=v.device)
    out, pool = gated_delta_rule_mtp(
        q.contiguous(), k.contiguous(), v.contiguous(), pool,
        torch.arange(batch, device=v.device, dtype=torch.int32), zeros, decay, zeros, step, scale,
        disable_state_update=not output_final_state, use_qk_l2norm=use_qk_l2norm_in_kernel, gate_logits=False,
    )  # fmt: skip
    return out, pool.mT if output_final_state else None

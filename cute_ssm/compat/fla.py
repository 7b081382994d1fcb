"""Functions with the signatures and conventions of ``fla`` (flash-linear-attention); forward only."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from cute_ssm.compat._arguments import checked_tensor
from cute_ssm.compat._gated_delta import TOKENS
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops._arguments import name_of
from cute_ssm.ops._gradients import refuse
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp
from cute_ssm.spec import FLOATS

COLUMNS = 16  # that K and V are multiples of there
OLD_NAME = "transpose_state_layout"  # of state_v_first


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
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Decode any number of tokens per sequence, with the signature of fla's function of this name (0.6.0).

    Parameters
    ----------
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16/float32
        K is at most 256.  Rounded to the type of v, or to float16 if that is float32.
    v : Tensor, (batch, tokens, value_heads, V), bfloat16/float16/float32
        V is at most 256, or from 497 to 512.  float32 is rounded to float16.
    g : Tensor, (batch, tokens, value_heads), optional
        Logarithms of the decays, of any sign.  None: no decay.
    gk, gv
        Not supported: decays per key or value channel.
    beta : Tensor, (batch, tokens, value_heads), optional
        Update weights, of any sign.  None: 1.
    scale : float, optional
        Scale of q.  None: ``K ** -0.5``.
    initial_state : Tensor, (sequences, value_heads, K, V), float32/bfloat16/float16, optional
        Not modified.  None: zeros.
    output_final_state : bool
        Return the states after the last token.
    use_qk_l2norm_in_kernel : bool
        Normalise q and k.
    use_gate_in_kernel : bool
        The decays are ``-exp(A_log) * softplus(g + dt_bias)``.
    A_log, dt_bias : Tensor, (value_heads,), optional
        With ``use_gate_in_kernel`` only, which requires ``A_log``.
    use_beta_sigmoid_in_kernel : bool
        The update weights are ``sigmoid(beta)``.
    allow_neg_eigval : bool
        They are ``2 sigmoid(beta)``; with ``use_beta_sigmoid_in_kernel`` only.
    state_v_first : bool
        Layout of the states: (sequences, value_heads, V, K).
    cu_seqlens : Tensor, (sequences + 1,), int32/int64, optional
        Packed sequences: the batch is 1, and sequence i has the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.
        The host reads it, which waits for a GPU.

    Returns
    -------
    out : Tensor, (batch, tokens, value_heads, V), type of v
    final_state : Tensor, (sequences, value_heads, K, V) or with ``state_v_first`` (..., V, K), float32, or None

    Raises
    ------
    ValueError, TypeError
        A shape, type or value is not as described above.
    UnsupportedSpecError
        An argument is not supported.

    Notes
    -----
    The operator takes 64 tokens per sequence, so longer sequences take a launch for every 64, all sequences together.
    Every call copies states to and from its layout, and gates are computed by PyTorch.  K and V that are no multiples
    of 16 are padded with zeros.

    With v of float32, q, k and v are rounded to float16, which has eight times the precision of bfloat16, and reaches
    65504: larger values on the CPU are refused, and on a GPU make results infinite or NaN.

    Serving engines should call `cute_ssm.gated_delta_rule_mtp`, which updates a pool in place and does not read
    ``cu_seqlens`` on the host.
    """
    if OLD_NAME in kwargs:
        if state_v_first:
            raise ValueError(describe(OLD_NAME, "not both names of one argument", "both", "pass state_v_first alone"))
        warnings.warn(f"{OLD_NAME} is called state_v_first since fla 0.6", DeprecationWarning, stacklevel=2)
        state_v_first = kwargs.pop(OLD_NAME)
    if kwargs:
        raise TypeError(describe(next(iter(kwargs)), "an argument of fla 0.6.0", "an unknown one"))
    for name, value in (("gk", gk), ("gv", gv)):
        if value is not None:
            raise UnsupportedSpecError(describe(name, "None", "a tensor", "this version supports one decay per head"))
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, Tensor) or value.dim() != 4:
            raise ValueError(describe(name, "a tensor of 4 dimensions", type(value).__name__))
    refuse("fused_recurrent_gated_delta_rule", q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        fix = "pass use_beta_sigmoid_in_kernel=True, or beta that is doubled"
        raise ValueError(describe("allow_neg_eigval", "False without use_beta_sigmoid_in_kernel", True, fix))
    gates = _gates(v, g, beta, A_log, dt_bias, use_gate_in_kernel)
    if use_beta_sigmoid_in_kernel:
        gates = gates._replace(step=(2 if allow_neg_eigval else 1) * torch.sigmoid(gates.step))
    starts = None if cu_seqlens is None else _starts(q, cu_seqlens)
    sequences = v.shape[0] if starts is None else len(starts) - 1
    longest = (
        q.shape[1] if starts is None else max((end - start for start, end in itertools.pairwise(starts)), default=0)
    )
    pool = _pool(initial_state, sequences, q, v, state_v_first)
    K, V = q.shape[3], v.shape[3]
    kind = v.dtype if v.dtype != torch.float32 else torch.float16
    scale = K**-0.5 if scale is None else scale
    rows = [_rounded(name, tensor, kind).contiguous() for name, tensor in (("q", q), ("k", k), ("v", v))]
    zeros = torch.zeros(v.shape[2], device=v.device)
    out = torch.empty_like(rows[2])
    rows += [gates.decay, gates.step, out]
    for first in range(0, longest, TOKENS):
        piece = _Piece(None, torch.arange(sequences, dtype=torch.int32, device=v.device))
        part = rows
        if starts is None:
            part = [tensor[:, first : first + TOKENS] for tensor in rows]
        elif longest <= TOKENS:
            piece = piece._replace(cu_seqlens=cu_seqlens)
        else:
            piece = _piece(starts, first, v.device)
        new_q, new_k, new_v, decay, step, new_out = part
        gated_delta_rule_mtp(
            new_q, new_k, new_v, pool, piece.indices, zeros, decay, zeros, step, scale, new_out,
            disable_state_update=first + TOKENS >= longest and not output_final_state,
            use_qk_l2norm=use_qk_l2norm_in_kernel, gate_logits=False, cu_seqlens=piece.cu_seqlens,
            max_seqlen=None if starts is None else min(longest, TOKENS),
        )  # fmt: skip
    out = out[..., :V].to(v.dtype)
    if not output_final_state:
        return out, None
    pool = pool[..., :V, :K]
    return out, pool if state_v_first else pool.mT


class _Gates(NamedTuple):
    """Logarithms of the decays, and update weights: (batch, tokens, value_heads), float32."""

    decay: Tensor
    step: Tensor


def _gates(v: Tensor, g: Any, beta: Any, A_log: Any, dt_bias: Any, activate: bool) -> _Gates:
    shape = v.shape[:3]
    for name, value in (("g", g), ("beta", beta)):
        if value is not None and checked_tensor(name, value).shape != shape:
            expected = f"shape (batch, tokens, value_heads) = {tuple(shape)}"
            raise ValueError(describe(name, expected, tuple(value.shape)))
    decay = torch.zeros(shape, device=v.device) if g is None else g.float()
    if activate:
        for name, value in (("A_log", A_log), ("g", g)):
            if value is None:
                raise ValueError(describe(name, "a tensor with use_gate_in_kernel", None))
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
            if value is not None and checked_tensor(name, value).shape != shape[2:]:
                expected = f"shape (value_heads,) = {tuple(shape[2:])}"
                raise ValueError(describe(name, expected, tuple(value.shape)))
        decay = -A_log.float().exp() * softplus(decay if dt_bias is None else decay + dt_bias.float())
    return _Gates(decay, torch.ones_like(decay) if beta is None else beta.float())


class _Piece(NamedTuple):
    """What a call of the operator takes of packed sequences: offsets, and the slot of each request between them."""

    cu_seqlens: Tensor | None
    indices: Tensor


def _piece(starts: list[int], first: int, device: torch.device) -> _Piece:
    """Return the tokens of every sequence from its token `first` on, up to `TOKENS`; between them is padding."""
    offsets, slots = [starts[0]], []
    for slot, (start, end) in enumerate(itertools.pairwise(starts)):
        offsets += [min(start + first, end), min(start + first + TOKENS, end)]
        slots += [-1, slot]
    indices = torch.tensor(slots, dtype=torch.int32, device=device)
    return _Piece(torch.tensor(offsets, dtype=torch.int32, device=device), indices)


def _starts(q: Tensor, cu_seqlens: Any) -> list[int]:
    """Return the offsets of packed sequences; raise unless they cover all tokens."""
    if q.shape[0] != 1:
        fix = "pack the sequences along the tokens"
        raise ValueError(describe("q", "a batch of 1 with cu_seqlens", q.shape[0], fix))
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        expected = "a tensor of shape (sequences + 1,), int32/int64"
        raise ValueError(describe("cu_seqlens", expected, type(cu_seqlens).__name__))
    starts: list[int] = cu_seqlens.tolist()
    falls = any(end < start for start, end in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] != q.shape[1] or falls:
        raise ValueError(describe("cu_seqlens", f"offsets that rise from 0 to {q.shape[1]} tokens", starts))
    return starts


def _rounded(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """Return a tensor rounded to the type that the operator gets, with columns of zeros up to a multiple of 16."""
    if not tensor.is_cuda and kind is torch.float16 and bool((tensor.abs() > torch.finfo(kind).max).any()):
        fix = "float32 is rounded to float16; pass v as bfloat16"
        raise ValueError(describe(name, "values up to 65504", float(tensor.abs().max()), fix))
    return pad(tensor.to(kind), (0, -tensor.shape[-1] % COLUMNS))


def _pool(initial_state: Any, sequences: int, q: Tensor, v: Tensor, state_v_first: bool) -> Tensor:
    """Return the states in the layout of the operator, (sequences, value_heads, V, K) with padding, float32."""
    value_heads, V = v.shape[2:]
    K = q.shape[-1]
    pool = torch.zeros(sequences, value_heads, V + -V % COLUMNS, K + -K % COLUMNS, device=v.device)
    if initial_state is not None:
        like = pool[..., :V, :K] if state_v_first else pool[..., :V, :K].mT
        if initial_state.shape != like.shape or name_of(initial_state.dtype) not in FLOATS:
            axes = "(sequences, value_heads, V, K)" if state_v_first else "(sequences, value_heads, K, V)"
            got = f"{tuple(initial_state.shape)}, {initial_state.dtype}"
            raise ValueError(describe("initial_state", f"shape {axes} = {tuple(like.shape)}, of floats", got))
        like.copy_(initial_state)
    return pool

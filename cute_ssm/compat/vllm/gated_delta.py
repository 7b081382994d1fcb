"""vLLM's decode functions for gated delta nets (0.33), with this package's operator.

They are those of ``vllm.third_party.flash_linear_attention.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.compat import _gated_delta
from cute_ssm.compat._arguments import checked_tensor
from cute_ssm.errors import UnsupportedSpecError, describe

LESS_1 = {
    "slots below": "slots less 1 below",
    "distinct slots to write": "distinct slots to write (less 1)",
    "no slot that another request reads": "no slot (less 1) that another request reads",
}  # of errors about slots of the pool behind the null slot
WORDS = {
    "raise max_seqlen": "give ssm_state_indices as many columns",
    "max_seqlen": "ssm_state_indices",
    "initial_state_indices": "ssm_state_indices",
    "use_qk_l2norm": "use_qk_l2norm_in_kernel",
    **LESS_1,
}  # of the operator's errors, and vLLM's

__all__ = ["fused_recurrent_gated_delta_rule_packed_decode", "fused_sigmoid_gating_delta_rule_update"]


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    write_padded_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run one token of every request on the packed output of the convolution, like vLLM's function of this name.

    Parameters
    ----------
    mixed_qkv : Tensor, (batch, 2 heads K + value_heads V), bfloat16/float16
        Queries, keys and values of each request, one behind the other.
    a, b : Tensor, (batch, value_heads)
        Logits of the decay and of beta.
    A_log, dt_bias : Tensor, (value_heads,)
        ``A_log`` is converted to float32, which costs a small kernel if it has another type.
    scale : float
        Factor of the queries.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of states, **updated in place**.
    out : Tensor, (batch, 1, value_heads, V)
        **Written.**
    ssm_state_indices : Tensor, (batch,), int32/int64
        Slots; those up to 0 are padding.
    use_qk_l2norm_in_kernel : bool
        Normalise queries and keys.
    write_padded_rows : bool
        Not in vLLM.  False does not write the zeros of padding rows, which saves two small kernels.

    Returns
    -------
    out, initial_state : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`.  Nothing has been written.
    """
    rows = _gated_delta.split(mixed_qkv, initial_state)
    pool, slots = _without_null(initial_state, checked_tensor("ssm_state_indices", ssm_state_indices))
    _gated_delta.packed_step(
        rows, a, b, A_log, dt_bias, scale, pool, slots, out, use_qk_l2norm_in_kernel, write_padded_rows,
        _gated_delta.PACKED_WORDS | LESS_1,
    )  # fmt: skip
    return out, initial_state


def fused_sigmoid_gating_delta_rule_update(
    A_log: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    is_kda: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one token of every request, or the tokens of a speculative step, like vLLM's function of this name.

    Parameters
    ----------
    A_log, dt_bias : Tensor, (value_heads,)
        ``A_log`` is converted to float32, which costs a small kernel if it has another type.
    a, b : Tensor, (tokens, value_heads) or (batch, tokens, value_heads)
        Logits of the decay and of beta.
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        With ``cu_seqlens``, all sequences in a batch of 1.
    v : Tensor, (batch, tokens, value_heads, V)
    beta, threshold : float
        Of softplus; 1 and 20 only.
    scale : float, optional
        Factor of the queries.  None: ``K ** -0.5``.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of states, **updated in place**.
    inplace_final_state : bool
        True only.
    cu_seqlens : Tensor, (sequences + 1,), int32/int64, optional
        Offsets of packed sequences, which have up to as many tokens as ``ssm_state_indices`` has columns.
    ssm_state_indices : Tensor, (>= sequences,) or (>= sequences, columns), int32/int64
        Slots; those up to 0 are padding.  Of a matrix, column t is the slot of the state after token t.
    num_accepted_tokens : Tensor, (>= sequences,), int32/int64, optional
        Sequence i starts from the slot in column ``num_accepted_tokens[i] - 1``.
    use_qk_l2norm_in_kernel : bool
        Normalise queries and keys.
    is_kda : bool
        False only: there is no kernel for decays per channel.

    Returns
    -------
    out : Tensor, of the shape of v
        Rows of padding are zero, where vLLM leaves them undefined.
    initial_state : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`, or a feature named above is asked for.  Nothing has been written.
    """
    features = {
        "is_kda": is_kda, "beta": beta != 1, "threshold": threshold != 20,
        "inplace_final_state": not inplace_final_state, "ssm_state_indices": ssm_state_indices is None,
    }  # fmt: skip
    _gated_delta.refuse(features)
    pool, slots = _without_null(
        checked_tensor("initial_state", initial_state), checked_tensor("ssm_state_indices", ssm_state_indices)
    )
    sequences, tokens = _gated_delta.count_sequences(q, cu_seqlens), q.shape[1]
    slots = slots[:sequences]
    columns = slots.shape[1] if slots.dim() == 2 else 1
    if slots.dim() not in (1, 2) or len(slots) != sequences:
        expected = f"shape (n,) or (n, columns), n >= {sequences} sequences"
        raise ValueError(describe("ssm_state_indices", expected, tuple(checked_tensor("", ssm_state_indices).shape)))
    if cu_seqlens is None and tokens != columns:
        fix = "the kernel takes as many tokens of every sequence as there are slots"
        raise UnsupportedSpecError(describe("q", f"{columns} tokens per sequence", tokens, fix))
    first, scatter = slots if slots.dim() == 1 else slots[:, 0], slots if columns > 1 else None
    if num_accepted_tokens is not None:
        _gated_delta.check_indices("num_accepted_tokens", num_accepted_tokens, sequences)
    if num_accepted_tokens is not None and scatter is not None:
        column = num_accepted_tokens[:sequences].long() - 1
        first = slots.gather(1, column.clamp(0, columns - 1)[:, None])[:, 0]
    a, b = _gated_delta.gate_rows("a", a, q), _gated_delta.gate_rows("b", b, q)
    out = _gated_delta.run(
        WORDS, q, k, v, pool, first, _gated_delta.rates(A_log), a, dt_bias, b, scale, ssm_state_indices=scatter,
        disable_state_update=False, use_qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
        max_seqlen=None if cu_seqlens is None else columns,
    )  # fmt: skip
    return out, checked_tensor("initial_state", initial_state)


def _without_null(pool: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pool behind vLLM's null slot 0, and slots in it: one subtraction makes padding negative."""
    if pool.dim() != 4:
        raise ValueError(describe("initial_state", "shape (slots, value_heads, V, K)", tuple(pool.shape)))
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(describe("ssm_state_indices", "dtype int32 or int64", slots.dtype))
    return pool[1:], slots - 1

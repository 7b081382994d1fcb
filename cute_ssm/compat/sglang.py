"""SGLang's decode functions (0.5.23), with this package's operators.

`selective_state_update` is that of ``sglang.kernels.ops.mamba.triton_ops``; the others are in
``sglang.kernels.ops.attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_ssm.compat import _gated_delta
from cute_ssm.compat._arguments import checked_tensor, rename
from cute_ssm.compat._padding import NOBODY, padding
from cute_ssm.compat._types import of_one_type
from cute_ssm.errors import describe
from cute_ssm.ops._arguments import PHILOX_ROUNDS, draw_seed
from cute_ssm.ops.selective_state_update.operator import selective_state_update as _update

PAD_SLOT_ID = -1
WORDS = {
    "initial_state": "initial_state_source",
    "use_qk_l2norm": "use_qk_l2norm_in_kernel",
}  # of the operator's errors, and SGLang's

__all__ = [
    "PAD_SLOT_ID",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "fused_sigmoid_gating_delta_rule_update",
    "selective_state_update",
]


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
    pad_slot_id: int = PAD_SLOT_ID,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    *,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
    write_padded_rows: bool = True,
) -> None:
    """Advance states by their tokens, like SGLang's function of this name.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16
        Pool of states, **updated in place**.  The layout of SGLang's Mamba-1 layers, (slots, channels, 1, dstate) with
        one group, is supported too.
    x, dt : Tensor, (batch[, T], nheads, dim)
    A : Tensor, (nheads, dim, dstate)
    B, C : Tensor, (batch[, T], ngroups, dstate)
        If x, B, C, z and ``out`` have different types, those that are not float32 are converted to it, and ``out``
        back, each by a small kernel: nothing but ``out`` is rounded, as in SGLang.
    D, dt_bias : Tensor, (nheads, dim), optional
    z : Tensor, like x, optional
    dt_softplus : bool
        Apply softplus to dt + dt_bias.
    state_batch_indices : Tensor, (batch,), int32/int64, optional
        Slot of each request.
    pad_slot_id : int
        A request with this slot reads a zero state and writes none.
    out : Tensor, like x
        **Written.**  Required.
    disable_state_update : bool
        Do not write ``state``.
    intermediate_states_buffer : Tensor, (rows, steps, nheads, dim, dstate), type of state, optional
        **Written** with the state after each token.
    cache_steps : int, optional
        Number of steps of that buffer.
    retrieve_parent_token
        Not supported: trees of draft tokens.
    intermediate_state_indices : Tensor, (>= batch,), int32/int64, optional
        Row of each request in that buffer.
    enable_stochastic_rounding : bool
        Of SGLang's Triton function.  Round float16 states stochastically when they are written to the pool, with a
        seed drawn on the device.  States in ``intermediate_states_buffer`` are rounded to nearest, as in SGLang; a call
        that writes both takes another launch.
    cache_philox_rounds : int
        Of SGLang's Triton function.  0: 10.
    write_padded_rows : bool
        Not in SGLang.  False does not write padding rows of ``out``, which saves a few small kernels.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.  Nothing has been written.
    """
    _gated_delta.refuse({"retrieve_parent_token": retrieve_parent_token is not None}, "trees have no kernel")
    if not isinstance(out, Tensor):
        raise TypeError(describe("out", "a torch.Tensor of the shape of x", type(out).__name__, "allocate it"))
    if intermediate_states_buffer is not None and cache_steps is not None:
        steps = checked_tensor("intermediate_states_buffer", intermediate_states_buffer).shape[1]
        if cache_steps != steps:
            raise ValueError(describe("cache_steps", f"{steps}, as intermediate_states_buffer has", cache_steps))
    seed = None
    if enable_stochastic_rounding:
        if checked_tensor("state", state).dtype != torch.float16:
            raise TypeError(describe("state", "dtype float16 with enable_stochastic_rounding", state.dtype))
        if not disable_state_update:
            seed = draw_seed(state.device)
    result = out
    x, B, C, z, out = of_one_type(x, B, C, z, out)
    swapped = checked_tensor("state", state).dim() == 4 and state.shape[2] == 1 and state.shape[1] > 1
    if swapped:
        state, x, dt, z, out = (_swap(t, -3, -2) if t is state else _swap(t, -2, -1) for t in (state, x, dt, z, out))
        A, D, dt_bias = _swap(A, 0, 1), _swap(D, 0, 1), _swap(dt_bias, 0, 1)
        intermediate_states_buffer = _swap(intermediate_states_buffer, -3, -2)

    def update(pool: Tensor, slots: Tensor | None, pad: int, rows: Tensor, **options: Any) -> None:
        try:
            _update(pool, x, dt, A, B, C, D, z, dt_bias, dt_softplus, slots, pad, out=rows, **options)
        except (ValueError, TypeError) as error:
            rename(error, {"philox_rounds": "cache_philox_rounds"})
            raise

    drafts: dict[str, Any] = {
        "intermediate_states_buffer": intermediate_states_buffer,
        "intermediate_state_indices": intermediate_state_indices,
    }
    rounding: dict[str, Any] = {"rand_seed": seed, "philox_rounds": cache_philox_rounds or PHILOX_ROUNDS}
    if intermediate_states_buffer is not None and seed is not None:
        update(state, state_batch_indices, pad_slot_id, torch.empty_like(out), disable_state_update=True, **drafts)
        drafts = {}
    update(
        state, state_batch_indices, pad_slot_id, out, disable_state_update=disable_state_update, **drafts, **rounding
    )
    if write_padded_rows and state_batch_indices is not None:
        padded = padding(state, None, state_batch_indices, None, pad_slot_id)
        update(padded.state, padded.slots, NOBODY, out, disable_state_update=True)
    if out.dtype is not result.dtype:
        result.copy_(_swap(out, -2, -1) if swapped else out)


def _swap(tensor: Any, first: int, second: int) -> Any:
    """Return a view with two axes swapped: heads of one channel become channels of one head."""
    return tensor.transpose(first, second) if isinstance(tensor, Tensor) else tensor


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
    """Run one token of every request on the packed output of the convolution, like SGLang's function of this name.

    Parameters
    ----------
    mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, use_qk_l2norm_in_kernel, write_padded_rows
        As for `cute_ssm.compat.vllm.gated_delta.fused_recurrent_gated_delta_rule_packed_decode`.
    ssm_state_indices : Tensor, (batch,), int32/int64
        Slots; negative ones are padding.

    Returns
    -------
    out, initial_state : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`.  Nothing has been written.

    Notes
    -----
    SGLang rounds sigmoid(b) to the type of b; this function does not.
    """
    rows = _gated_delta.split(mixed_qkv, initial_state)
    slots = checked_tensor("ssm_state_indices", ssm_state_indices)
    _gated_delta.packed_step(
        rows, a, b, A_log, dt_bias, scale, initial_state, slots, out, use_qk_l2norm_in_kernel, write_padded_rows
    )
    return out, initial_state


def fused_sigmoid_gating_delta_rule_update(
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Tensor | None = None,
    cache_ring: bool = False,
    replayssm_rawv: Tensor | None = None,
    replayssm_rawk: Tensor | None = None,
    replayssm_g: Tensor | None = None,
    replayssm_beta: Tensor | None = None,
    match_cutedsl_decode: bool = False,
    *,
    positional_rows: bool = False,
    max_seqlen: int | None = None,
) -> Tensor:
    """Run one token of every request, or the tokens of a speculative step, like SGLang's function of this name.

    Parameters
    ----------
    A_log, dt_bias : Tensor, (value_heads,)
        ``A_log`` is converted to float32, which costs a small kernel if it has another type.
    a, b : Tensor, (tokens, value_heads) or (batch, tokens, value_heads)
        Logits of the decay and of beta.
    softplus_beta, softplus_threshold : float
        1 and 20 only.
    q, k : Tensor, (batch, tokens, heads, K), bfloat16/float16
        With ``cu_seqlens``, all sequences in a batch of 1.
    v : Tensor, (batch, tokens, value_heads, V)
    initial_state_source : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16
        Pool of states, **updated in place** unless that is disabled.
    initial_state_indices : Tensor, (>= sequences,), int32/int64
        Slots; negative ones are padding.
    scale : float, optional
        Factor of the queries.  None: ``K ** -0.5``.
    use_qk_l2norm_in_kernel : bool
        Normalise queries and keys.
    cu_seqlens : Tensor, (sequences + 1,), int32/int64, optional
        Offsets of packed sequences of up to 64 tokens, and of up to as many as ``intermediate_states_buffer`` has
        steps.  On a GPU, where the host does not read them, a longer one is treated as padding.
    disable_state_update : bool
        Do not write the pool.
    intermediate_states_buffer : Tensor, (rows, steps, value_heads, V, K), type of the states, optional
        **Written** with the state after each token; steps past those of a request are left unchanged.
    intermediate_state_indices : Tensor, (>= sequences,), int32/int64, with that buffer only
        Row of each request, 0 or more.  The kernel writes rows in order, so copies of these rows are read and written.
    cache_steps : int, optional
        Number of steps of that buffer that are used.
    is_kda, lower_bound, retrieve_parent_token, cache_ring, replayssm_rawv, replayssm_rawk, replayssm_g, \
    replayssm_beta, match_cutedsl_decode
        Not supported: their defaults only.
    positional_rows : bool
        Not in SGLang.  True: request i has row i of the buffer, and ``intermediate_state_indices`` is ignored, which
        saves the copies.
    max_seqlen : int, 1 to 64
        Not in SGLang, and with ``cu_seqlens`` only.  The largest number of tokens of a request: the kernel for 1 is
        faster.  None: the steps of the buffer, or else all tokens, up to 64.

    Returns
    -------
    Tensor, of the shape of v
        Rows of padding, and of no request, are zero.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`, or a feature named above is asked for.  Nothing has been written.
    """
    features = {
        "is_kda": is_kda, "lower_bound": lower_bound is not None, "softplus_beta": softplus_beta != 1,
        "softplus_threshold": softplus_threshold != 20, "retrieve_parent_token": retrieve_parent_token is not None,
        "cache_ring": cache_ring, "match_cutedsl_decode": match_cutedsl_decode,
        **{name: value is not None for name, value in (
            ("replayssm_rawv", replayssm_rawv), ("replayssm_rawk", replayssm_rawk), ("replayssm_g", replayssm_g),
            ("replayssm_beta", replayssm_beta))},
    }  # fmt: skip
    _gated_delta.refuse(features)
    sequences = _gated_delta.count_sequences(q, cu_seqlens)
    buffer, rows = intermediate_states_buffer, None
    longest, fix = q.shape[1], "split the call"
    if buffer is not None:
        if checked_tensor("intermediate_states_buffer", buffer).dim() != 5:
            expected = "shape (rows, steps, value_heads, V, K)"
            raise ValueError(describe("intermediate_states_buffer", expected, tuple(buffer.shape)))
        longest, fix = buffer.shape[1], "give intermediate_states_buffer as many steps"
        if cache_steps is not None and cache_steps > longest:
            expected = f"up to {longest}, as intermediate_states_buffer has"
            raise ValueError(describe("cache_steps", expected, cache_steps))
        if not positional_rows:
            rows = _checked_rows(intermediate_state_indices, sequences, buffer.shape[0])
            buffer = buffer.index_select(0, rows)
    words = WORDS
    if cu_seqlens is not None and max_seqlen is None:
        max_seqlen, words = max(1, min(longest, _gated_delta.TOKENS)), WORDS | {"raise max_seqlen": fix}
    out = _gated_delta.run(
        words, q, k, v, initial_state_source, checked_tensor("initial_state_indices", initial_state_indices),
        _gated_delta.rates(A_log), _gated_delta.gate_rows("a", a, q), dt_bias, _gated_delta.gate_rows("b", b, q),
        scale, intermediate_states_buffer=buffer, disable_state_update=disable_state_update,
        use_qk_l2norm=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
    )  # fmt: skip
    if rows is not None and intermediate_states_buffer is not None and buffer is not None:
        intermediate_states_buffer.index_copy_(0, rows, buffer)
    return out


def _checked_rows(indices: Tensor | None, sequences: int, count: int) -> Tensor:
    """Return the rows of the sequences in a buffer of so many; raise if one on the CPU is out of range."""
    name = "intermediate_state_indices"
    rows = checked_tensor(name, indices)
    _gated_delta.check_indices(name, rows, sequences)
    rows = rows[:sequences].long()
    if not rows.is_cuda and bool(((rows < 0) | (rows >= count)).any()):
        raise ValueError(describe(name, f"rows from 0 to {count - 1}", rows.tolist()))
    return rows

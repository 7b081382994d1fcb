"""Functions with the signatures and conventions of ``flashinfer.gdn_decode`` (0.7.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.compat._arguments import checked_tensor
from cute_ssm.errors import UnsupportedSpecError, describe
from cute_ssm.ops.gated_delta_rule_mtp.operator import gated_delta_rule_mtp as _mtp
from cute_ssm.ops.gated_delta_rule_replay.operator import gated_delta_rule_replay as _replay
from cute_ssm.ops.materialize_gated_delta.operator import materialize_gated_delta as _materialize

BACKENDS = ("auto", "flashinfer", "cake_gdn")
COMMIT_BACKENDS = ("auto", "simt", "tcgen05")


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Tensor | None = None,
    cache_replayssm: bool = False,
    replayssm_rawv: Tensor | None = None,
    replayssm_rawk: Tensor | None = None,
    replayssm_g: Tensor | None = None,
    replayssm_beta: Tensor | None = None,
    *,
    accepted_steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run 1 to 64 tokens of the gated delta rule for every request, like FlashInfer's function of this name.

    Parameters
    ----------
    q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output, intermediate_states_buffer, \
    ssm_state_indices, disable_state_update, use_qk_l2norm
        As for `cute_ssm.gated_delta_rule_mtp`.
    output_state_indices : Tensor, (batch,), int32/int64, optional
        As there; on another device, or of another type than ``initial_state_indices``, it is converted, as in
        FlashInfer.
    cache_replayssm : bool
        Leave the states unchanged, and store the raw inputs of the tokens instead, for
        `gated_delta_rule_replayssm_commit`.  Requires ``disable_state_update=True``.
    replayssm_rawv : Tensor, (slots, value_heads, T, V), type of q
        **Written** with ``cache_replayssm``: the values, in the slots of the requests.
    replayssm_rawk : Tensor, (slots, heads, T, K), type of q
        **Written** with ``cache_replayssm``: the keys before normalisation.
    replayssm_g, replayssm_beta : Tensor, (slots, value_heads, T), float32
        **Written** with ``cache_replayssm``: logarithms of the decays, and update weights.
    accepted_steps : Tensor, (batch,), int32/int64, optional
        Not in FlashInfer; as for `cute_ssm.gated_delta_rule_mtp`.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    initial_state : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`, or ReplaySSM's arguments do not fit each other.

    Notes
    -----
    Differences from FlashInfer:

    * States may be bfloat16 or float16.
    * float16 inputs are not rounded to bfloat16; windows of ReplaySSM have the type of q.
    * Negative entries of ``ssm_state_indices`` are skipped.
    * An intermediate buffer may have more tokens per row than the call.
    * Every pool may be strided.
    * K and V may be any multiples of 16 up to 256, V also 512.
    * ReplaySSM runs on every GPU of this package, for 1 to 16 tokens.
    * Indices on the CPU are checked.
    """
    windows = {
        "replayssm_rawk": replayssm_rawk, "replayssm_rawv": replayssm_rawv, "replayssm_g": replayssm_g,
        "replayssm_beta": replayssm_beta,
    }  # fmt: skip
    if cache_replayssm:
        others = {
            "intermediate_states_buffer": intermediate_states_buffer, "ssm_state_indices": ssm_state_indices,
            "output_state_indices": output_state_indices, "accepted_steps": accepted_steps,
        }  # fmt: skip
        pool = checked_tensor("initial_state", initial_state)
        _check_verification(disable_state_update, others)
        rawk, rawv, g, beta = (checked_tensor(name, window) for name, window in windows.items())
        if q.dim() == 4 and v.dim() == 4 and pool.dim() == 4:  # the operator refuses any others
            slots, tokens, heads, value_heads = len(pool), q.shape[1], q.shape[2], v.shape[2]
            _check_window("replayssm_rawk", rawk, (slots, heads, tokens, q.shape[3]), q.dtype)
            _check_window("replayssm_rawv", rawv, (slots, value_heads, tokens, v.shape[3]), q.dtype)
            _check_window("replayssm_g", g, (slots, value_heads, tokens), torch.float32)
            _check_window("replayssm_beta", beta, (slots, value_heads, tokens), torch.float32)
        zeros = torch.zeros(pool.shape[:1], dtype=torch.int32, device=pool.device)  # cursors: nothing is pending
        return _replay(
            q, k, v, pool, initial_state_indices, rawk, rawv, g, beta, zeros, zeros, A_log, a, dt_bias, b, scale=scale,
            output=output, use_qk_l2norm=use_qk_l2norm, window=0,
        )  # fmt: skip
    for name, window in windows.items():
        if window is not None:
            raise ValueError(describe(name, "None without cache_replayssm", "a tensor", "pass cache_replayssm=True"))
    if isinstance(output_state_indices, Tensor) and isinstance(initial_state_indices, Tensor):
        output_state_indices = output_state_indices.to(initial_state_indices)
    return _mtp(
        q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output, intermediate_states_buffer,
        ssm_state_indices, disable_state_update, use_qk_l2norm, output_state_indices, accepted_steps=accepted_steps,
    )  # fmt: skip


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run 1 to 64 tokens on states [V, K], one for each request or a pool, like FlashInfer's function of this name.

    Parameters
    ----------
    q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm
        As for `cute_ssm.gated_delta_rule_mtp`.
    state : Tensor, (batch, value_heads, V, K), float32/bfloat16/float16, or None
        States of the requests, **updated in place**.  None with ``initial_state``.
    initial_state : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16, optional
        Pool of states, **updated in place**.
    initial_state_indices : Tensor, (batch,), int32/int64, with ``initial_state`` only
        Slots of the requests; a negative one is padding.
    output_state_indices : Tensor, (batch,), int32/int64, optional
        Slots that the new states are written to, with ``initial_state`` only.
    intermediate_states_buffer : Tensor, (>= batch, >= tokens, value_heads, V, K), type of the states, optional
        **Written**: the state after each token.
    disable_state_update : bool
        Do not write the new states.
    backend : {"auto", "flashinfer", "cake_gdn"}
        Accepted for compatibility.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    state : Tensor
        ``state`` or ``initial_state``.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.gated_delta_rule_mtp`, or the arguments of states do not fit each other.

    Notes
    -----
    Differences from FlashInfer:

    * Padding is never computed: its rows of a given ``output`` do not change, those of a new one are zero, and slot 0
      is a slot like others.  FlashInfer writes zeros for float32 states, and uses slot 0 for bfloat16 ones.
    * A buffer, and ``disable_state_update``, may be used with one token too.
    * Pools of two halves for Rubin (``ugpu_state_pool``) are refused, as is ``backend="rubin"``.
    """
    if backend not in BACKENDS:
        raise ValueError(describe("backend", " or ".join(BACKENDS), repr(backend), "there are no kernels for Rubin"))
    if (state is None) == (initial_state is None):
        got = "neither" if state is None else "both"
        raise ValueError(describe("state", "a tensor, or initial_state in its place", got))
    if initial_state is None:
        for name, slots in (
            ("initial_state_indices", initial_state_indices),
            ("output_state_indices", output_state_indices),
        ):
            if slots is not None:
                raise ValueError(describe(name, "None with state", "a tensor", "pass initial_state in place of state"))
        pool = checked_tensor("state", state)
        initial_state_indices = torch.arange(len(pool) if pool.dim() else 0, dtype=torch.int32, device=pool.device)
    else:
        pool = checked_tensor("initial_state", initial_state)
        if pool.dim() == 5:
            fix = "there are no kernels for Rubin"
            raise UnsupportedSpecError(describe("initial_state", "4 dimensions", "a pool of two halves", fix))
        initial_state_indices = checked_tensor("initial_state_indices", initial_state_indices)
    return gated_delta_rule_mtp(
        q, k, v, pool, initial_state_indices, A_log, a, dt_bias, b, scale, output, intermediate_states_buffer, None,
        disable_state_update, use_qk_l2norm, output_state_indices,
    )  # fmt: skip


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run 1 to 64 tokens on states [K, V], one for each request, like FlashInfer's function of this name.

    Parameters
    ----------
    q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm
        As for `cute_ssm.gated_delta_rule_mtp`.
    state : Tensor, (batch, value_heads, K, V), float32/bfloat16/float16
        **Updated in place.**
    backend : {"auto", "flashinfer", "cake_gdn"}
        Accepted for compatibility.

    Returns
    -------
    output : Tensor, (batch, tokens, value_heads, V)
    state : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `gated_delta_rule_decode_pretranspose`.

    Notes
    -----
    The kernels have the layout [V, K]: every call copies the states there and back, which takes twice their traffic.
    Keep states as [V, K] and call `gated_delta_rule_decode_pretranspose`.
    """
    if checked_tensor("state", state).dim() != 4:
        raise ValueError(describe("state", "shape (batch, value_heads, K, V)", tuple(state.shape)))
    copy = state.mT.contiguous()
    output, copy = gated_delta_rule_decode_pretranspose(
        q, k, v, copy, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, backend=backend
    )
    state.copy_(copy.mT)
    return output, state


def gated_delta_rule_replayssm_commit(
    checkpoint_state: Tensor,
    rawv_cache: Tensor,
    rawk_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    state_indices: Tensor,
    accept_lens: Tensor,
    *,
    track_state_indices: Tensor | None = None,
    track_steps: Tensor | None = None,
    use_qk_l2norm: bool = True,
    null_block_id: int = -1,
    backend: str = "auto",
) -> None:
    """Fold the accepted tokens of `gated_delta_rule_mtp` with ``cache_replayssm`` into the states of all layers.

    Parameters
    ----------
    checkpoint_state : Tensor, (layers, slots, value_heads, V, K), contiguous, float32/bfloat16/float16
        **Updated in place.**
    rawv_cache : Tensor, (layers, slots, value_heads, T, V), contiguous
    rawk_cache : Tensor, (layers, slots, heads, T, K), contiguous
    g_cache, beta_cache : Tensor, (layers, slots, value_heads, T), contiguous, float32
        What the verifying calls stored.
    state_indices : Tensor, (batch,), int32/int64
        Slots of the requests; those up to ``null_block_id`` are ignored.
    accept_lens : Tensor, (batch,), int32/int64
        Numbers of accepted tokens, 0 to T.
    track_state_indices : Tensor, (batch,), int32/int64, optional
        Slots of further checkpoints, distinct from all others; those up to ``null_block_id`` are ignored.
    track_steps : Tensor, (batch,), int32/int64, with ``track_state_indices`` only
        Number of the token, from 0, whose state is stored there, if that token is accepted.
    use_qk_l2norm : bool
        As in the verifying calls.
    null_block_id : int
        Largest slot that is ignored; at least -1.
    backend : {"auto", "simt", "tcgen05"}
        Accepted for compatibility.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        A shape, type or value is not as described above.

    Notes
    -----
    One launch for all layers, one more for further checkpoints, and a few small PyTorch kernels for the indices.
    """
    if backend not in COMMIT_BACKENDS:
        raise ValueError(describe("backend", " or ".join(COMMIT_BACKENDS), repr(backend)))
    if (track_state_indices is None) != (track_steps is None):
        name = "track_steps" if track_steps is None else "track_state_indices"
        raise ValueError(describe(name, "a tensor, as the other argument of further checkpoints is given", None))
    caches = {
        "checkpoint_state": checkpoint_state, "rawk_cache": rawk_cache, "rawv_cache": rawv_cache, "g_cache": g_cache,
        "beta_cache": beta_cache,
    }  # fmt: skip
    src, accepted = checked_tensor("state_indices", state_indices), checked_tensor("accept_lens", accept_lens)
    for name, tensor in caches.items():
        rank = 4 if name in ("g_cache", "beta_cache") else 5
        if checked_tensor(name, tensor).dim() != rank or not tensor.is_contiguous():
            raise ValueError(describe(name, f"{rank} dimensions, layers first, contiguous", tuple(tensor.shape)))
    layers, slots, value_heads, V, K = checkpoint_state.shape
    tokens = rawk_cache.shape[3]
    _check_window("rawk_cache", rawk_cache, (layers, slots, rawk_cache.shape[2], tokens, K), rawk_cache.dtype)
    _check_window("rawv_cache", rawv_cache, (layers, slots, value_heads, tokens, V), rawk_cache.dtype)
    _check_window("g_cache", g_cache, (layers, slots, value_heads, tokens), torch.float32)
    _check_window("beta_cache", beta_cache, (layers, slots, value_heads, tokens), torch.float32)
    state, k, v, g, beta = (tensor.flatten(0, 1) for tensor in caches.values())
    start = torch.zeros(layers * slots, dtype=torch.int32, device=checkpoint_state.device)
    pending = torch.full_like(start, tokens)
    base = torch.arange(0, layers * slots, slots, device=checkpoint_state.device)[:, None]

    def in_all_layers(indices: Tensor, used: Tensor) -> Tensor:
        return torch.where(used, base + indices, -1).flatten()

    def fold(dst: Tensor, used: Tensor, counts: Tensor) -> None:
        used = used & (src > null_block_id)
        _materialize(
            state, k, v, g, beta, start, pending, in_all_layers(src, used), in_all_layers(dst, used),
            num_tokens=torch.where(used, counts, 0).expand(layers, -1).flatten(), use_qk_l2norm=use_qk_l2norm,
        )  # fmt: skip

    if track_state_indices is not None and track_steps is not None:  # before the states that they start from change
        reached = (track_steps >= 0) & (track_steps < accepted) & (track_state_indices > null_block_id)
        fold(track_state_indices, reached, track_steps + 1)
    fold(src, accepted > 0, accepted)


def _check_window(name: str, window: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if window.shape != shape or window.dtype != dtype:
        got = f"{tuple(window.shape)}, {window.dtype}"
        raise ValueError(
            describe(name, f"shape {shape} of {dtype}", got, "the windows of all calls are one allocation")
        )


def _check_verification(disabled: bool | None, others: dict[str, Tensor | None]) -> None:
    if disabled is not True:
        expected, fix = "True with cache_replayssm", "states change by gated_delta_rule_replayssm_commit"
        raise ValueError(describe("disable_state_update", expected, disabled, fix))
    for name, value in others.items():
        if value is not None:
            raise ValueError(describe(name, "None with cache_replayssm", "a tensor", "states are not written"))

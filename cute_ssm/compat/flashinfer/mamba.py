"""Functions with the signatures and conventions of ``flashinfer.mamba``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_ssm.compat._arguments import checked_tensor
from cute_ssm.compat._padding import NOBODY, padding
from cute_ssm.errors import describe
from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu as _checkpointing
from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu_ring as _checkpointing_ring
from cute_ssm.ops.materialize_layers.operator import materialize_layers as _materialize_layers
from cute_ssm.ops.selective_state_update.operator import selective_state_update as _update

BACKENDS = ("auto", "flashinfer", "cake")
RING_ALGORITHMS = ("auto", "monolith", "two-kernel")


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
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    intermediate_state_scales: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    backend: str = "auto",
    *,
    write_padded_rows: bool = True,
) -> Tensor:
    """Advance states by their tokens, like FlashInfer's function of this name.

    Parameters
    ----------
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, pad_slot_id, disable_state_update
        As for `cute_ssm.selective_state_update`.
    state_batch_indices, dst_state_batch_indices : Tensor, (>= batch,) or (>= batch, n), int32/int64, optional
        As there; rows beyond the batch are ignored.
    state_scale : Tensor, (slots, nheads, dim) or (slots, nheads, dim, 1), float32
    out : Tensor, optional
        **Written**, and returned.
    intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales, philox_rounds
        As there.
    rand_seed : Tensor, one element of any shape, or (slots,), int64, optional
        As there.
    cache_steps : int
        With ``cu_seqlens``, the largest number of tokens of a sequence; with x of rank 4 and an intermediate buffer, at
        least T.  With x of rank 3 and no ``cu_seqlens``, a positive value inserts an axis T = 1 into x, dt, B, C, z and
        the result.
    algorithm, cu_seqlens, num_accepted_tokens
        As there.
    backend : {"auto", "flashinfer", "cake"}
        Accepted for compatibility.
    write_padded_rows : bool
        Not in FlashInfer.  Padding rows of ``out`` are written as FlashInfer does, with the outputs of a zero state:
        this takes a second launch, the memory of one state, and a few small PyTorch kernels.  Pass False if nothing
        reads padding rows.

    Returns
    -------
    Tensor
        ``out`` if given, else a new tensor of the shape of x, including an inserted T axis.  With
        ``write_padded_rows=False``, padding rows of a given ``out`` do not change, and those of a new tensor are zero.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    Differences from FlashInfer:

    * Without ``state_batch_indices`` no sequence is padding.
    * With an intermediate buffer, the last state is also written to ``state`` unless ``disable_state_update``, which
      applies with ``dst_state_batch_indices`` too; padding entries are skipped in every mode.
    * D may be None.
    * States of all dtypes but float32 may be rounded stochastically, including those with scales, and ``rand_seed`` may
      hold one seed per slot.
    """
    if backend not in BACKENDS:
        raise ValueError(describe("backend", " or ".join(BACKENDS), repr(backend)))
    checked_tensor("state", state)
    checked_tensor("x", x)
    if isinstance(cache_steps, int) and 0 < cache_steps < _steps(x) and intermediate_states_buffer is not None:
        raise ValueError(describe("cache_steps", f"at least T = {_steps(x)}", cache_steps))
    if isinstance(state_scale, Tensor) and state_scale.dim() == 4 and state_scale.shape[3] == 1:
        state_scale = state_scale.squeeze(3)
    if cache_steps >= 1 and cu_seqlens is None and x.dim() < 4:
        x, dt, B, C, z = (_with_steps(tensor) for tensor in (x, dt, B, C, z))
        if isinstance(out, Tensor) and out.dim() == 3:
            fix = "the result has an axis of T = 1 tokens with cache_steps; pass out.unsqueeze(1)"
            raise ValueError(describe("out", f"shape {tuple(x.shape)}", tuple(out.shape), fix))
    result = _update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, pad_slot_id, state_scale, out,
        disable_state_update, intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales,
        _one_seed(rand_seed), philox_rounds, cache_steps, algorithm, dst_state_batch_indices, cu_seqlens,
        num_accepted_tokens,
    )  # fmt: skip
    if write_padded_rows and state_batch_indices is not None:
        padded = padding(state, state_scale, state_batch_indices, num_accepted_tokens, pad_slot_id)
        _update(
            padded.state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, padded.slots, NOBODY, padded.scale, result,
            disable_state_update=True, cache_steps=cache_steps, algorithm=algorithm, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return result


def cake_selective_state_update(*args: Any, **kwargs: Any) -> Tensor:
    """Call `selective_state_update` with ``backend="cake"``, like FlashInfer's function of this name."""
    return selective_state_update(*args, backend="cake", **kwargs)  # type: ignore[misc]


def checkpointing_ssu(
    state: Tensor,
    x_cache: Tensor,
    B_cache: Tensor,
    dt_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    d_split: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    enable_pdl: bool | str = False,
    cb_scaled: Tensor | None = None,
    cumAdt_vec: Tensor | None = None,
    cb_old: Tensor | None = None,
    precompute_heads_per_cta: int = 0,
    algorithm: str = "auto",
) -> Tensor:
    """Verify speculative tokens with deferred state writes, like FlashInfer's function of this name (from 0.7).

    The history of each slot is a ring; `checkpointing_ssu_double_buffer` is FlashInfer 0.6's function.

    Parameters
    ----------
    state, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z, dt_bias
        As for `cute_ssm.checkpointing_ssu_ring`.
    dt_softplus, state_batch_indices, pad_slot_id, state_scale, philox_rounds, d_split, cu_seqlens, max_seqlen
        As there.
    rand_seed : Tensor, one element of any shape, or (slots,), int64, optional
        As there; ignored with a float32 state.
    enable_pdl : bool or "early_reads"
        As there; with True, the kernel waits for the preceding one before its first access.
    cb_scaled, cumAdt_vec, cb_old : Tensor, optional
        Scratch memory of FlashInfer's two kernels: pass all or none.  Not used.
    precompute_heads_per_cta : int
        Accepted for compatibility.
    algorithm : {"auto", "monolith", "two-kernel"}
        Accepted for compatibility; as in FlashInfer, "two-kernel" requires the scratch memory.

    Returns
    -------
    Tensor
        ``out``.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.checkpointing_ssu_ring`, or if scratch memory is incomplete.

    Notes
    -----
    The window is L - T, as in FlashInfer.  Call `cute_ssm.checkpointing_ssu_ring` for a smaller window.
    """
    if algorithm not in RING_ALGORITHMS:
        raise ValueError(describe("algorithm", " or ".join(RING_ALGORITHMS), repr(algorithm)))
    if isinstance(precompute_heads_per_cta, bool) or not isinstance(precompute_heads_per_cta, int):
        raise TypeError(describe("precompute_heads_per_cta", "an int", type(precompute_heads_per_cta).__name__))
    if precompute_heads_per_cta < 0:
        raise ValueError(describe("precompute_heads_per_cta", "0 or more", precompute_heads_per_cta))
    scratch = {"cb_scaled": cb_scaled, "cumAdt_vec": cumAdt_vec, "cb_old": cb_old}
    for name, tensor in scratch.items():
        if tensor is None and (algorithm == "two-kernel" or any(other is not None for other in scratch.values())):
            why = "with algorithm = 'two-kernel'" if algorithm == "two-kernel" else "with the other scratch tensors"
            raise ValueError(describe(name, f"a tensor {why}", None, f"pass all of {', '.join(scratch)}, or none"))
        if tensor is not None:
            checked_tensor(name, tensor)
    rand_seed = _seed(state, rand_seed)
    return _checkpointing_ring(
        state, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z, dt_bias,
        dt_softplus, state_batch_indices, pad_slot_id, state_scale, rand_seed, philox_rounds, d_split, cu_seqlens,
        max_seqlen, enable_pdl,
    )  # fmt: skip


def checkpointing_ssu_double_buffer(
    state: Tensor,
    old_x: Tensor,
    old_B: Tensor,
    old_dt: Tensor,
    old_cumAdt: Tensor,
    cache_buf_idx: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    state_scale: Tensor | None = None,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    d_split: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    enable_pdl: bool | str = False,
) -> Tensor:
    """Verify speculative tokens with deferred state writes, like ``checkpointing_ssu`` of FlashInfer 0.6.

    Parameters and result are those of `cute_ssm.checkpointing_ssu`.  As in FlashInfer, a seed with a float32 state is
    ignored.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.checkpointing_ssu`; FlashInfer raises AssertionError and RuntimeError.

    Notes
    -----
    Differences from FlashInfer:

    * A step that appends to a history continues the sums in ``old_cumAdt``.  FlashInfer restarts them but reads them
      as continued, so that its decays are wrong from the second such step on.
    * The window may have up to 64 rows instead of 16, and there may be more new tokens than rows.
    * float16 inputs are not read as bfloat16; bfloat16 states with a seed are rounded stochastically; int16 states, one
      seed per slot, and two buffers of ``old_x`` are accepted.
    * Unused rows of the history may hold NaN.
    * Without ``state_batch_indices`` no sequence is padding.
    * With ``enable_pdl=True`` the kernel accesses no memory before the preceding kernel has ended; FlashInfer's kernel
      reads states, slots, cursors, dt and z earlier.  ``enable_pdl="early_reads"`` is in between: see
      `cute_ssm.checkpointing_ssu`.
    """
    rand_seed = _seed(state, rand_seed)
    return _checkpointing(
        state, old_x, old_B, old_dt, old_cumAdt, cache_buf_idx, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z,
        dt_bias, dt_softplus, state_batch_indices, pad_slot_id, state_scale, rand_seed, philox_rounds, d_split,
        cu_seqlens, max_seqlen, enable_pdl,
    )  # fmt: skip


def allocate_checkpointing_ssu_scratch(
    batch_size: int,
    num_heads: int,
    num_predicted_tokens: int,
    max_window: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the scratch memory that FlashInfer's two kernels need, and this package's one does not use.

    Parameters
    ----------
    batch_size, num_heads, num_predicted_tokens, max_window : int
        Sizes of the calls; at least 1.
    dtype, device
        Type of x, and its device.

    Returns
    -------
    cb_scaled, cumAdt_vec, cb_old : Tensor
        With FlashInfer's shapes: (batch, heads, 32, T' / 2) of `dtype`, (batch, heads, T') of float32, and
        (batch, heads, 32, W' / 2) of `dtype`, with T rounded up to a multiple of 16, W to one of 8.

    Raises
    ------
    ValueError
        A size is below 1.
    """
    sizes = {
        "batch_size": batch_size, "num_heads": num_heads, "num_predicted_tokens": num_predicted_tokens,
        "max_window": max_window,
    }  # fmt: skip
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(describe(name, "at least 1", size))
    tokens, window = -(-num_predicted_tokens // 16) * 16, -(-max_window // 8) * 8

    def scratch(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(batch_size, num_heads, *shape, dtype=of, device=device)

    return (
        scratch(32, tokens // 2, of=dtype),
        scratch(tokens, of=torch.float32),
        scratch(32, window // 2, of=dtype),
    )


def replayssm_materialize(
    state_ptrs: Tensor,
    state_slot_strides: Tensor,
    x_cache_ptrs: Tensor,
    x_cache_slot_strides: Tensor,
    B_cache_ptrs: Tensor,
    B_cache_slot_strides: Tensor,
    dt_cache_ptrs: Tensor,
    dt_cache_slot_strides: Tensor,
    A_ptrs: Tensor,
    state_scale_ptrs: Tensor,
    state_scale_slot_strides: Tensor,
    src_slots: Tensor,
    dst_slots: Tensor,
    ring_start: Tensor,
    replay_prefix_len: Tensor,
    active_request_indices: Tensor,
    *,
    state_dtype: torch.dtype,
    input_dtype: torch.dtype,
    matrixA_dtype: torch.dtype,
    dim: int,
    dstate: int,
    num_heads: int,
    heads_per_group: int,
    max_window: int,
    ring_buffer_len: int,
    pad_slot_id: int = -1,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 0,
    dependency_inputs: list[Tensor] | None = None,
    dependency_outputs: list[Tensor] | None = None,
) -> None:
    """Fold a prefix of each replay ring into a state, and store it in another slot, in all layers by one launch.

    Parameters
    ----------
    state_ptrs, state_slot_strides, x_cache_ptrs, x_cache_slot_strides, B_cache_ptrs, B_cache_slot_strides, \
    dt_cache_ptrs, dt_cache_slot_strides, A_ptrs, state_scale_ptrs, state_scale_slot_strides
        As for `cute_ssm.serving.materialize_layers`.
    src_slots, dst_slots, ring_start, replay_prefix_len, active_request_indices
        As there.
    state_dtype, input_dtype, matrixA_dtype, dim, dstate, num_heads, heads_per_group, max_window, ring_buffer_len
        As there.
    pad_slot_id
        As there.
    rand_seed : Tensor, one element of any shape, int64, with ``philox_rounds`` only
        Round stochastically.  Each layer has a seed of its own, derived from this one as in FlashInfer.
    philox_rounds : int
        0: round to nearest even, and ignore ``rand_seed``.
    dependency_inputs, dependency_outputs : list of Tensor, optional
        Accepted for compatibility: a call breaks a graph of ``torch.compile``, which keeps the order.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.serving.materialize_layers`.

    Notes
    -----
    Differences from FlashInfer:

    * float16 inputs, windows of up to 64 tokens, and 8-bit states of all sizes are accepted, and so are a source and a
      destination that are the same slot.
    * Requests with a negative slot, or with a row or a number of tokens out of range, are skipped on a GPU, and errors
      on the CPU.
    * States of all dtypes but float32 may be rounded stochastically.  Which random bits an element takes is that of
      `cute_ssm.reference.rounding`.
    """
    for name, tensors in (("dependency_inputs", dependency_inputs), ("dependency_outputs", dependency_outputs)):
        for tensor in tensors or ():
            checked_tensor(name, tensor)
    seeds = None
    if philox_rounds and state_dtype is not torch.float32:
        seed = checked_tensor("rand_seed", rand_seed)
        if seed.numel() != 1 or seed.dtype is not torch.int64:
            raise ValueError(describe("rand_seed", "one element of int64", f"{tuple(seed.shape)}, {seed.dtype}"))
        seeds = _layer_seeds(seed.reshape(1), checked_tensor("src_slots", src_slots).shape[0])
    _materialize_layers(
        state_ptrs, state_slot_strides, x_cache_ptrs, x_cache_slot_strides, B_cache_ptrs, B_cache_slot_strides,
        dt_cache_ptrs, dt_cache_slot_strides, A_ptrs, state_scale_ptrs, state_scale_slot_strides, src_slots, dst_slots,
        ring_start, replay_prefix_len, active_request_indices, state_dtype=state_dtype, input_dtype=input_dtype,
        matrixA_dtype=matrixA_dtype, dim=dim, dstate=dstate, num_heads=num_heads, heads_per_group=heads_per_group,
        max_window=max_window, ring_buffer_len=ring_buffer_len, pad_slot_id=pad_slot_id, rand_seed=seeds,
        philox_rounds=0 if seeds is None else philox_rounds,
    )  # fmt: skip


def _layer_seeds(seed: Tensor, layers: int) -> Tensor:
    """Return FlashInfer's seeds of layers: SplitMix64 of the seed and the layer, in 64-bit integers that wrap."""

    def wrapped(value: int) -> int:
        return value - (1 << 64) if value >> 63 else value

    def mixed(z: Tensor, shift: int) -> Tensor:
        return z ^ (z >> shift & (1 << 64 - shift) - 1)  # a logical shift

    place = torch.arange(1, layers + 1, device=seed.device)
    z = seed ^ (place * wrapped(0x9E3779B97F4A7C15))
    z = mixed(z, 30) * wrapped(0xBF58476D1CE4E5B9)
    z = mixed(z, 27) * wrapped(0x94D049BB133111EB)
    return mixed(z, 31)


def _seed(state: Any, rand_seed: Any) -> Any:
    """Return the seed, or None if states are float32 and therefore not rounded."""
    return None if isinstance(state, Tensor) and state.dtype is torch.float32 else _one_seed(rand_seed)


def _one_seed(rand_seed: Any) -> Any:
    """Return a seed with one element, of any shape, with shape (1,)."""
    single = isinstance(rand_seed, Tensor) and rand_seed.dim() != 1 and rand_seed.numel() == 1
    return rand_seed.reshape(1) if single else rand_seed


def _steps(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 1


def _with_steps(tensor: Any) -> Any:
    """Insert the axis T = 1, and that of a left-out head or group: (batch, 1, heads or groups, columns)."""
    if isinstance(tensor, Tensor) and tensor.dim() == 2:
        tensor = tensor.unsqueeze(1)
    return tensor.unsqueeze(1) if isinstance(tensor, Tensor) and tensor.dim() == 3 else tensor

"""FlashInfer's ``flashinfer.mamba``, over this package's operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_ssm.compat._padding import NOBODY, padding
from cute_ssm.errors import describe
from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu as _checkpointing
from cute_ssm.ops.checkpointing_ssu.operator import checkpointing_ssu_ring as _checkpointing_ring
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
    write_padded_rows: bool = False,
) -> Tensor:
    """Advance states by their tokens, like FlashInfer's function of this name.

    Parameters
    ----------
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, pad_slot_id, disable_state_update
        As for `cute_ssm.selective_state_update`.
    state_batch_indices, dst_state_batch_indices : Tensor, (>= batch,) or (>= batch, n), int32/int64, optional
        As there; further rows are ignored.
    state_scale : Tensor, (slots, nheads, dim) or (slots, nheads, dim, 1), float32
    out : Tensor, optional
        **Written**, and returned.
    intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales, philox_rounds
        As there.
    rand_seed : Tensor, one element of any shape, or (slots,), int64, optional
        As there.
    cache_steps : int
        With ``cu_seqlens``, the most tokens of a sequence; with x of rank 4 and an intermediate buffer, at least T.
        With x of rank 3 and no ``cu_seqlens``, 1 or more inserts an axis T = 1 into x, dt, B, C, z and the result.
    algorithm, cu_seqlens, num_accepted_tokens
        As there.
    backend : {"auto", "flashinfer", "cake"}
        Accepted for compatibility.
    write_padded_rows : bool
        Not of FlashInfer.  True writes rows of ``out`` whose sequence is padding as FlashInfer does: the outputs of a
        state of zeros.  It costs a second launch, a state of zeros for it, and a few small kernels of PyTorch; rows of
        padding matter only to callers that read them.

    Returns
    -------
    Tensor
        ``out`` if given, else a new tensor of the shape of x, T axis included.  Rows whose sequence is padding are as
        they were in ``out``, or zero if it was not given, unless ``write_padded_rows``.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    Differences from FlashInfer:

    * Without ``state_batch_indices`` no sequence is padding.
    * Rows of padding are not written; FlashInfer writes the outputs of a state of zeros.  Pass
      ``write_padded_rows=True`` to have those.
    * With an intermediate buffer, the last state also goes to ``state`` unless ``disable_state_update``, and that
      argument holds with ``dst_state_batch_indices`` too; pad entries are checked in every mode.
    * D may be None, all types of states may be rounded stochastically, those with scales too, and ``rand_seed`` may
      hold a seed for every slot.
    """
    if backend not in BACKENDS:
        raise ValueError(describe("backend", " or ".join(BACKENDS), repr(backend)))
    for name, tensor in (("state", state), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(tensor).__name__))
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


def checkpointing_ssu(
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
    """Return outputs at new tokens over states that lag, like FlashInfer 0.6's function of this name.

    Parameters and result are those of `cute_ssm.checkpointing_ssu`, which takes what FlashInfer's function takes.  A
    seed with a float32 state is ignored, as there.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.checkpointing_ssu`; FlashInfer raises AssertionError and RuntimeError.

    Notes
    -----
    Differences from FlashInfer:

    * ``old_cumAdt`` is continued where a step appends to a history; FlashInfer stores sums that start anew there, and
      reads them as if they did not, so that its decays are wrong from the second such step on.
    * The window may have up to 64 rows instead of 16, and there may be more new tokens than rows.
    * float16 inputs are not read as if they were bfloat16; bfloat16 states with a seed are rounded stochastically;
      int16 states, one seed per slot, and two buffers of ``old_x`` are accepted.
    * Rows of the history that no token was written to may hold NaN.
    * Without ``state_batch_indices`` no sequence is padding.
    * ``enable_pdl=True`` accesses nothing before the kernel before has ended; FlashInfer's kernel reads states, slots,
      cursors, dt and z before.  ``enable_pdl="early_reads"`` is between the two: see `cute_ssm.checkpointing_ssu`.
    """
    rand_seed = _seed(state, rand_seed)
    return _checkpointing(
        state, old_x, old_B, old_dt, old_cumAdt, cache_buf_idx, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z,
        dt_bias, dt_softplus, state_batch_indices, pad_slot_id, state_scale, rand_seed, philox_rounds, d_split,
        cu_seqlens, max_seqlen, enable_pdl,
    )  # fmt: skip


def checkpointing_ssu_ring(
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
    """Do the same with a ring, like ``checkpointing_ssu`` of FlashInfer's development branch.

    Parameters
    ----------
    state, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z, dt_bias
        As for `cute_ssm.checkpointing_ssu_ring`.
    dt_softplus, state_batch_indices, pad_slot_id, state_scale, philox_rounds, d_split, cu_seqlens, max_seqlen
        As there.
    rand_seed : Tensor, one element of any shape, or (slots,), int64, optional
        As there; ignored with a float32 state.
    enable_pdl : bool or "early_reads"
        As there: True waits for the kernel before ahead of every access.
    cb_scaled, cumAdt_vec, cb_old : Tensor, optional
        Scratch memory of FlashInfer's two kernels: all or none.  Not used.
    precompute_heads_per_cta : int
        Accepted for compatibility.
    algorithm : {"auto", "monolith", "two-kernel"}
        Accepted for compatibility; "two-kernel" needs the scratch memory, as there.

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
    The window is L - T, as there; `cute_ssm.checkpointing_ssu_ring` takes longer rings too.
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
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(tensor).__name__))
    rand_seed = _seed(state, rand_seed)
    return _checkpointing_ring(
        state, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted_tokens, x, dt, A, B, C, out, D, z, dt_bias,
        dt_softplus, state_batch_indices, pad_slot_id, state_scale, rand_seed, philox_rounds, d_split, cu_seqlens,
        max_seqlen, enable_pdl,
    )  # fmt: skip


def _seed(state: Any, rand_seed: Any) -> Any:
    """Return the seed, or None where states are not rounded."""
    return None if isinstance(state, Tensor) and state.dtype is torch.float32 else _one_seed(rand_seed)


def _one_seed(rand_seed: Any) -> Any:
    """Return a seed of one element, of whatever shape, as (1,)."""
    single = isinstance(rand_seed, Tensor) and rand_seed.dim() != 1 and rand_seed.numel() == 1
    return rand_seed.reshape(1) if single else rand_seed


def _steps(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 1


def _with_steps(tensor: Any) -> Any:
    """Insert the axes that (batch, T = 1, heads or groups, columns) has more."""
    if isinstance(tensor, Tensor) and tensor.dim() == 2:
        tensor = tensor.unsqueeze(1)
    return tensor.unsqueeze(1) if isinstance(tensor, Tensor) and tensor.dim() == 3 else tensor

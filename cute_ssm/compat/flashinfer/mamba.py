"""FlashInfer's ``flashinfer.mamba``, over this package's operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops.selective_state_update import selective_state_update as _update

BACKENDS = ("auto", "flashinfer", "cake")


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
    intermediate_states_buffer, intermediate_state_indices, intermediate_state_scales, rand_seed, philox_rounds
        As there.
    cache_steps : int
        With ``cu_seqlens``, the most tokens of a sequence; with x of rank 4 and an intermediate buffer, at least T.
        With x of rank 3 and no ``cu_seqlens``, 1 or more inserts an axis T = 1 into x, dt, B, C, z and the result.
    algorithm, cu_seqlens, num_accepted_tokens
        As there.
    backend : {"auto", "flashinfer", "cake"}
        Accepted for compatibility.

    Returns
    -------
    Tensor
        ``out`` if given, else a new tensor of the shape of x, T axis included.

    Raises
    ------
    ValueError, TypeError, UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    Differences from FlashInfer:

    * Rows of ``out`` whose sequence is padding are left as they are, or zero if ``out`` was not given; FlashInfer
      computes them from a state of zeros.  Without ``state_batch_indices`` no sequence is padding.
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
    batch = cu_seqlens.shape[0] - 1 if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 else x.shape[0]
    if cache_steps >= 1 and cu_seqlens is None and x.dim() < 4:
        x, dt, B, C, z = (_with_steps(tensor) for tensor in (x, dt, B, C, z))
        if isinstance(out, Tensor) and out.dim() == 3:
            fix = "the result has an axis of T = 1 tokens with cache_steps; pass out.unsqueeze(1)"
            raise ValueError(describe("out", f"shape {tuple(x.shape)}", tuple(out.shape), fix))
    return _update(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus,
        _rows(state_batch_indices, batch),
        pad_slot_id,
        state_scale,
        out,
        disable_state_update,
        intermediate_states_buffer,
        intermediate_state_indices,
        intermediate_state_scales,
        rand_seed,
        philox_rounds,
        cache_steps,
        algorithm,
        _rows(dst_state_batch_indices, batch),
        cu_seqlens,
        num_accepted_tokens,
    )


def _steps(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 1


def _with_steps(tensor: Any) -> Any:
    """Insert the axes that (batch, T = 1, heads or groups, columns) has more."""
    if isinstance(tensor, Tensor) and tensor.dim() == 2:
        tensor = tensor.unsqueeze(1)
    return tensor.unsqueeze(1) if isinstance(tensor, Tensor) and tensor.dim() == 3 else tensor


def _rows(indices: Any, batch: int) -> Any:
    more = isinstance(indices, Tensor) and indices.dim() in (1, 2) and indices.shape[0] > batch
    return indices[:batch] if more else indices

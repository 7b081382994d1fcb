"""vLLM's ``selective_state_update`` and its tuned configs, over this package's operator."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cute_ssm import tuning
from cute_ssm.errors import describe
from cute_ssm.ops.selective_state_update import selective_state_update as _update
from cute_ssm.tuning import vllm_configs
from cute_ssm.tuning.vllm_configs import clear_ssm_config_caches as clear_ssm_config_caches
from cute_ssm.tuning.vllm_configs import get_ssm_config_file_name as get_ssm_config_file_name
from cute_ssm.tuning.vllm_configs import get_ssm_configs as get_ssm_configs
from cute_ssm.tuning.vllm_configs import override_ssm_config as override_ssm_config
from cute_ssm.tuning.vllm_configs import try_get_optimal_ssm_config as try_get_optimal_ssm_config

NULL_BLOCK_ID = 0
PHILOX_ROUNDS = 10  # that `cache_philox_rounds` = 0 stands for
_NOBODY = -1  # no slot of a scratch state

__all__ = [
    "NULL_BLOCK_ID",
    "clear_ssm_config_caches",
    "get_ssm_config_file_name",
    "get_ssm_configs",
    "override_ssm_config",
    "selective_state_update",
    "try_get_optimal_ssm_config",
]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    dst_state_batch_indices: Tensor | None = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_blackwell: bool = False,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
    *,
    rand_seed: Tensor | None = None,
    write_padded_rows: bool = True,
) -> None:
    """Advance states by their tokens, like vLLM's function of this name.

    `cute_ssm.selective_state_update` documents the recurrence, and the layouts and types of tensors.

    Parameters
    ----------
    state : Tensor, (slots[, nheads], dim, dstate), float32/bfloat16/float16
        Pool of states, **updated in place**.
    x, dt : Tensor, (tokens[, nheads], dim)
        One row per sequence, or packed rows with ``cu_seqlens``.
    A : Tensor, ([nheads, ]dim, dstate)
    B, C : Tensor, (tokens[, ngroups], dstate)
    D, dt_bias : Tensor, ([nheads, ]dim), or None
    z : Tensor, like x, optional
        Gate.
    dt_softplus : bool
        Apply softplus to dt + dt_bias.
    state_batch_indices : Tensor, (>= batch,) or (>= batch, n), int32/int64, optional
        Slot of each sequence.  Of a matrix, column 0, or with ``num_accepted_tokens`` the slots of its tokens.
    dst_state_batch_indices : Tensor, like state_batch_indices, optional
        Where new states go; by default where states were read.  Entries equal to ``null_block_id`` are not written.
    null_block_id : int
        A sequence whose slot this is reads a state of zeros and writes none.
    out : Tensor, like x
        **Written.**  Required.
    num_accepted_tokens : Tensor, (batch,), int32/int64, optional
        Speculative decoding.  Sequence b starts from the slot in column ``num_accepted_tokens[b] - 1`` (at least 0),
        and the state after its token t goes to column t of the destinations.
    cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
        Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; it may own none.
    is_blackwell : bool
        Accepted for compatibility; changes nothing.
    enable_stochastic_rounding : bool
        Round states stochastically, with a seed that is drawn on the device.  float16 states only.  As in vLLM, it does
        not apply with ``num_accepted_tokens``.
    cache_philox_rounds : int
        Rounds of the Philox generator; 0: 10.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Not of vLLM.  The seed of stochastic rounding, which saves drawing one in every layer.
    write_padded_rows : bool
        Not of vLLM.  False leaves rows of ``out`` whose sequence is padding as they are, which saves a few small
        kernels; they matter only to who reads them, for example to take a maximum over all rows.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described.  Nothing has been written.
    UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    Differences from vLLM: destinations equal to ``null_block_id`` are never written, which vLLM checks in speculative
    decoding only; stochastic rounding works on every GPU that this package supports; and softplus of very negative
    inputs is not rounded to 0.

    A file of tuned configs (`get_ssm_configs`) or `override_ssm_config` decides about tiles of this function's calls.
    Such calls check their arguments anew each time, which costs the host, and nothing when replayed in a CUDA graph.
    """
    if not isinstance(out, Tensor):
        raise TypeError(describe("out", "a torch.Tensor of the shape of x", type(out).__name__, "allocate it"))
    for name, tensor in (("state", state), ("x", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(tensor).__name__))
    if x.dim() not in (2, 3):
        fix = "pack the tokens and pass cu_seqlens"
        raise ValueError(describe("x", "shape (tokens, nheads, dim) or (tokens, dim)", tuple(x.shape), fix))
    batch = x.shape[0] if cu_seqlens is None else _batch(cu_seqlens)
    speculative = num_accepted_tokens is not None
    src = _indices("state_batch_indices", state_batch_indices, batch, speculative)
    dst = _indices("dst_state_batch_indices", dst_state_batch_indices, batch, speculative)
    if speculative and src is not None and dst is None:
        dst = src
    seed = _seed(state, enable_stochastic_rounding, cache_philox_rounds, rand_seed, speculative)

    def update(pool: Tensor, slots: Tensor | None, destinations: Tensor | None, pad: int, scratch: bool) -> None:
        _update(
            pool,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            dt_softplus,
            slots,
            pad,
            out=out,
            disable_state_update=scratch,
            rand_seed=None if scratch else seed,
            philox_rounds=cache_philox_rounds or PHILOX_ROUNDS,
            dst_state_batch_indices=destinations,
            cu_seqlens=cu_seqlens,
            num_accepted_tokens=None if scratch else num_accepted_tokens,
        )

    fields = None if torch.compiler.is_compiling() else _tuned(state, x, batch, speculative or cu_seqlens is not None)
    if fields is None:
        update(state, src, dst, null_block_id, scratch=False)
    else:
        with tuning.override(**fields):
            update(state, src, dst, null_block_id, scratch=False)
    if write_padded_rows and src is not None:
        zeros, first = state.new_zeros((1, *state.shape[1:])), _first_slots(src, num_accepted_tokens)
        update(zeros, torch.where(first == null_block_id, 0, _NOBODY).to(src.dtype), None, _NOBODY, scratch=True)


def _batch(cu_seqlens: Tensor) -> int:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(describe("cu_seqlens", "a torch.Tensor", type(cu_seqlens).__name__))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(describe("cu_seqlens", "shape (batch + 1,)", tuple(cu_seqlens.shape)))
    return cu_seqlens.shape[0] - 1


def _indices(name: str, indices: Tensor | None, batch: int, speculative: bool) -> Tensor | None:
    """Return the part of an index tensor that is used: a matrix for speculative decoding, else a vector."""
    if indices is None:
        return None
    if not isinstance(indices, Tensor):
        raise TypeError(describe(name, "a torch.Tensor", type(indices).__name__))
    if indices.dim() not in (1, 2) or indices.shape[0] < batch:
        raise ValueError(describe(name, f"shape (n,) or (n, columns), n >= batch = {batch}", tuple(indices.shape)))
    if indices.dim() == 2 and indices.shape[1] == 0:
        raise ValueError(describe(name, "at least one column", tuple(indices.shape)))
    if indices.shape[0] > batch:
        indices = indices[:batch]
    if speculative:
        return indices if indices.dim() == 2 else indices[:, None]
    return indices if indices.dim() == 1 else indices[:, 0]


def _seed(state: Tensor, enabled: bool, rounds: int, seed: Tensor | None, speculative: bool) -> Tensor | None:
    """Return the seed of the call: given or drawn, or None for rounding to nearest."""
    if not enabled:
        if seed is not None:
            raise ValueError(describe("rand_seed", "None without enable_stochastic_rounding", "a tensor"))
        return None
    if state.dtype != torch.float16:
        fix = "call cute_ssm.selective_state_update, which rounds other types stochastically too"
        raise TypeError(describe("state", "dtype float16 with enable_stochastic_rounding", state.dtype, fix))
    if rounds < 0:
        raise ValueError(describe("cache_philox_rounds", "0 or more", rounds))
    if speculative:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=state.device)
    return seed


@functools.lru_cache(maxsize=64)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _tuned(state: Tensor, x: Tensor, batch: int, packed: bool) -> dict[str, int] | None:
    """Return the fields of the config that a file or an override asks for, if one does."""
    if state.dim() < 3:
        return None
    dim, dstate = state.shape[-2:]
    heads = state.shape[1] if state.dim() == 4 else 1
    dtype = str(state.dtype)
    config = vllm_configs.tuned_config(dim, dstate, batch * heads, dtype, _device_name(x.device))
    return None if config is None else vllm_configs.as_override(dim, dstate, dtype, packed, config)


def _first_slots(src: Tensor, accepted: Tensor | None) -> Tensor:
    """Slot that each sequence reads."""
    if accepted is None:
        return src
    column = (accepted.long() - 1).clamp(0, src.shape[1] - 1)
    return src.gather(1, column[:, None])[:, 0]

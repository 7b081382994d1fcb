"""vLLM's functions of Mamba layers and its tuned configs, with this package's operators.

Signatures and conventions are those of vLLM 0.33.

Files of tuned configs are named as `get_ssm_config_file_name` returns, and are searched for in the folder
``VLLM_TUNED_CONFIG_FOLDER``, then in `_CONFIGS_DIR`, where this package has none.  Without such a file, and without
`override_ssm_config`, this package selects its own configs.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cute_ssm import env, tuning
from cute_ssm.compat._arguments import checked_tensor, rename
from cute_ssm.compat._padding import NOBODY, padding
from cute_ssm.compat._types import of_one_type
from cute_ssm.compat.vllm import configs as vllm_configs
from cute_ssm.errors import describe
from cute_ssm.ops._arguments import PHILOX_ROUNDS, check_rounding, draw_seed
from cute_ssm.ops.replay_decode.operator import selective_state_update_replayssm_output_only
from cute_ssm.ops.selective_scan.operator import selective_scan_fn
from cute_ssm.ops.selective_state_update.operator import selective_state_update as _update

NULL_BLOCK_ID = 0
WORDS = {
    "raise cache_steps, and give dst_state_batch_indices and intermediate_states_buffer as many steps": (
        "give dst_state_batch_indices as many columns"
    ),
    "pad_slot_id": "null_block_id",
    "philox_rounds": "cache_philox_rounds",
}  # of the operator's errors, and vLLM's

__all__ = [
    "NULL_BLOCK_ID",
    "clear_ssm_config_caches",
    "get_ssm_config_file_name",
    "get_ssm_configs",
    "get_ssm_device_name",
    "override_ssm_config",
    "selective_scan_fn",
    "selective_state_update",
    "selective_state_update_replayssm_output_only",
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

    `cute_ssm.selective_state_update` documents the recurrence, and the layouts of tensors.  Here x, B, C, z and ``out``
    may have different types.

    Parameters
    ----------
    state : Tensor, (slots[, nheads], dim, dstate), float32/bfloat16/float16
        Pool of states, **updated in place**.
    x, dt : Tensor, (tokens[, nheads], dim), float32/bfloat16/float16
        One row per sequence, or packed rows with ``cu_seqlens``.
    A : Tensor, ([nheads, ]dim, dstate)
    B, C : Tensor, (tokens[, ngroups], dstate), float32/bfloat16/float16
    D, dt_bias : Tensor, ([nheads, ]dim), or None
    z : Tensor, (tokens[, nheads], dim), float32/bfloat16/float16, optional
        Gate.
    dt_softplus : bool
        Apply softplus to dt + dt_bias.
    state_batch_indices : Tensor, (>= batch,) or (>= batch, n), int32/int64, optional
        Slot of each sequence.  Of a matrix, column 0, or with ``num_accepted_tokens`` the slots of its tokens.
    dst_state_batch_indices : Tensor, like state_batch_indices, optional
        Slots that receive new states.  Default: the slots that were read.  Entries equal to ``null_block_id`` are not
        written.
    null_block_id : int
        A sequence with this slot reads a zero state and writes none.
    out : Tensor, (tokens[, nheads], dim), float32/bfloat16/float16
        **Written.**  Required.
    num_accepted_tokens : Tensor, (batch,), int32/int64, optional
        Speculative decoding.  Sequence b starts from the slot in column ``num_accepted_tokens[b] - 1`` (at least 0),
        and the state after its token t is written to the slot in column t of the destinations.
    cu_seqlens : Tensor, (batch + 1,), int32/int64, optional
        Sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; it may own none.
    is_blackwell : bool
        Accepted for compatibility; has no effect.
    enable_stochastic_rounding : bool
        Round states stochastically, with a seed drawn on the device.  float16 states only.  As in vLLM, it has no
        effect with ``num_accepted_tokens``.
    cache_philox_rounds : int
        Rounds of the Philox generator; 0: 10.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Not in vLLM.  The seed of stochastic rounding; without it, every layer draws one.
    write_padded_rows : bool
        Not in vLLM.  False does not write padding rows of ``out``, which saves a few small kernels.  Only callers that
        read padding rows need them, for example to take a maximum over all rows.

    Raises
    ------
    ValueError, TypeError
        An argument is not as described.  Nothing has been written.
    UnsupportedSpecError, UnsupportedArchError
        As for `cute_ssm.selective_state_update`.

    Notes
    -----
    Differences from vLLM: destinations equal to ``null_block_id`` are never written, while vLLM checks this in
    speculative decoding only; stochastic rounding works on every supported GPU; and softplus of very negative inputs is
    not rounded to 0.

    If x, B, C, z and ``out`` have different types, those that are not float32 are converted to it, and ``out`` back:
    nothing but ``out`` is rounded, as in vLLM.  Each conversion is a small PyTorch kernel; with one type for all, as
    in vLLM's layers, there is none.

    A file of tuned configs (`get_ssm_configs`) or `override_ssm_config` selects the tiles of calls of this function.
    Such calls validate their arguments every time, which costs host time, but none when replayed in a CUDA graph.
    """
    if not isinstance(out, Tensor):
        raise TypeError(describe("out", "a torch.Tensor of the shape of x", type(out).__name__, "allocate it"))
    checked_tensor("state", state)
    checked_tensor("x", x)
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
    result = out
    x, B, C, z, out = of_one_type(x, B, C, z, out)

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
    try:
        if fields is None:
            update(state, src, dst, null_block_id, scratch=False)
        else:
            with tuning.override(**fields):
                update(state, src, dst, null_block_id, scratch=False)
    except (ValueError, TypeError) as error:
        rename(error, WORDS)
        raise
    if write_padded_rows and src is not None:
        padded = padding(state, None, src, num_accepted_tokens, null_block_id)
        update(padded.state, padded.slots, None, NOBODY, scratch=True)
    if out is not result:
        result.copy_(out)


def _batch(cu_seqlens: Tensor) -> int:
    if checked_tensor("cu_seqlens", cu_seqlens).dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(describe("cu_seqlens", "shape (batch + 1,)", tuple(cu_seqlens.shape)))
    return cu_seqlens.shape[0] - 1


def _indices(name: str, indices: Tensor | None, batch: int, speculative: bool) -> Tensor | None:
    """Return the used part of an index tensor: a matrix for speculative decoding, else a vector."""
    if indices is None:
        return None
    if checked_tensor(name, indices).dim() not in (1, 2) or indices.shape[0] < batch:
        raise ValueError(describe(name, f"shape (n,) or (n, columns), n >= batch = {batch}", tuple(indices.shape)))
    if indices.dim() == 2 and indices.shape[1] == 0:
        raise ValueError(describe(name, "at least one column", tuple(indices.shape)))
    if indices.shape[0] > batch:
        indices = indices[:batch]
    if speculative:
        return indices if indices.dim() == 2 else indices[:, None]
    return indices if indices.dim() == 1 else indices[:, 0]


def _seed(state: Tensor, enabled: bool, rounds: int, seed: Tensor | None, speculative: bool) -> Tensor | None:
    """Return the given or a drawn seed, or None to round to nearest."""
    fix = "call cute_ssm.selective_state_update to round other types stochastically"
    check_rounding(state, enabled, rounds, seed, fix)
    if not enabled or speculative:
        return None
    return draw_seed(state.device) if seed is None else seed


def _tuned(state: Tensor, x: Tensor, batch: int, packed: bool) -> dict[str, int] | None:
    """Return the fields of the config of a file or an override, or None if there is neither."""
    if state.dim() < 3:
        return None
    dim, dstate = state.shape[-2:]
    heads = state.shape[1] if state.dim() == 4 else 1
    dtype = str(state.dtype).removeprefix("torch.")
    if _ssm_config_override is None and not get_ssm_configs(dim, dstate, dtype):
        return None
    config = try_get_optimal_ssm_config(dim, dstate, batch, heads, dtype, False)
    return vllm_configs.as_override(dim, dstate, dtype, packed, config)


# ---------------------------------------------------------------------------------------------------------- configs
_CONFIGS_DIR = os.path.join(os.path.dirname(os.path.realpath(__file__)), "configs", "selective_state_update")
_ssm_config_override: tuple[int, int] | None = None


def get_ssm_config_file_name(headdim: int, dstate: int, cache_dtype: str, device_name: str) -> str:
    """Return the name of the file of tuned configs for states of shape (headdim, dstate).

    Parameters
    ----------
    headdim, dstate : int
    cache_dtype : str
        Dtype of the states, e.g. ``"float32"``.
    device_name : str
        As returned by `get_ssm_device_name`.
    """
    return f"headdim={headdim},dstate={dstate},device_name={device_name},cache_dtype={cache_dtype}.json"


def _canonical_cache_dtype(cache_dtype: str) -> str:
    """Return the dtype in the names of files: states of bfloat16 use those of float16."""
    return "float16" if cache_dtype == "bfloat16" else cache_dtype


def get_ssm_device_name() -> str:
    """Return the name of the first GPU (else ``"cpu"``) as in vLLM's file names: underscores for spaces and slashes."""
    return re.sub(r"[\s/]+", "_", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu")


@functools.cache
def get_ssm_configs(headdim: int, dstate: int, cache_dtype: str) -> dict[int, dict[str, int]] | None:
    """Return the tuned configs for the current GPU from a file, by effective batch, or None if there is no file.

    Results are cached, so that each search is logged once; ``get_ssm_configs.cache_clear()`` or
    `clear_ssm_config_caches` makes the next call search again.

    Parameters
    ----------
    headdim, dstate : int
    cache_dtype : str
        Dtype of the states; bfloat16 uses the file of float16.

    Returns
    -------
    dict or None
        In the order of the file.  Empty if the file has no config, which selects this package's own.
    """
    dtype = _canonical_cache_dtype(str(cache_dtype).removeprefix("torch."))
    name = get_ssm_config_file_name(headdim, dstate, dtype, get_ssm_device_name())
    own = env.vllm_tuned_config_folder()
    for folder in ([own] if own is not None else []) + [Path(_CONFIGS_DIR)]:
        table = vllm_configs.read(folder / name)
        if table is not None:
            env.logger().info("selective_state_update uses the tuned configs of %s", folder / name)
            return table
    env.logger().info("no file of tuned configs for selective_state_update: %s", name)
    return None


def try_get_optimal_ssm_config(
    headdim: int, dstate: int, batch: int, nheads: int, cache_dtype: str, is_blackwell: bool
) -> tuple[int, int]:
    """Return (BLOCK_SIZE_M, num_warps) of the override, else of the file, else vLLM's fallback.

    From a file, the config with the nearest effective batch (sequences times heads) is taken; of two equally near, the
    first.

    Parameters
    ----------
    headdim, dstate, cache_dtype
        As for `get_ssm_configs`.
    batch, nheads : int
        Number of sequences, and of heads.
    is_blackwell : bool
        Used by the fallback only.
    """
    if _ssm_config_override is not None:
        return _ssm_config_override
    return _try_get_optimal_ssm_config_cached(headdim, dstate, batch, nheads, cache_dtype, is_blackwell)


@functools.cache
def _try_get_optimal_ssm_config_cached(
    headdim: int, dstate: int, batch: int, nheads: int, cache_dtype: str, is_blackwell: bool
) -> tuple[int, int]:
    """`try_get_optimal_ssm_config` without an override."""
    table = get_ssm_configs(headdim, dstate, cache_dtype)
    if not table:
        return _get_default_ssm_launch_config(dstate, is_blackwell)
    entry = table[min(table, key=lambda key: abs(key - batch * nheads))]
    return entry["BLOCK_SIZE_M"], entry["num_warps"]


def _get_default_ssm_launch_config(dstate: int, is_blackwell: bool) -> tuple[int, int]:
    """Return vLLM's config for launches without a tuned one."""
    for columns, config in ((16, (32, 4)), (32, (16, 4)), (64, (8, 4))):
        if dstate <= columns:
            return config
    if is_blackwell:
        return 32, 8
    return (4, 4) if dstate <= 128 else (4, 8)


@contextmanager
def override_ssm_config(config: tuple[int, int] | None) -> Iterator[None]:
    """Use (BLOCK_SIZE_M, num_warps) instead of any file inside the context; None selects the files again.

    Applies to `selective_state_update` of this module.  Contexts nest.  Not thread-safe.

    Raises
    ------
    ValueError
        The config is not a pair of positive integers.
    """
    global _ssm_config_override
    checked = None if config is None else vllm_configs.check_pair(config)
    before, _ssm_config_override = _ssm_config_override, checked
    try:
        yield
    finally:
        _ssm_config_override = before


def clear_ssm_config_caches() -> None:
    """Clear the caches of files and of selected configs.  Not in vLLM, which clears each cache separately."""
    get_ssm_configs.cache_clear()
    _try_get_optimal_ssm_config_cached.cache_clear()

"""`StatePool.materialize` for each recurrence: checks, and one call per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops._gradients import refuse_tangents
from cute_ssm.ops.materialize.arguments import check_A
from cute_ssm.ops.materialize.operator import materialize
from cute_ssm.ops.materialize_gated_delta.operator import materialize_gated_delta
from cute_ssm.serving._pool_checks import check_equal
from cute_ssm.serving.storage import PoolStorage

NO_PAD = -1  # matches no slot


def check_fits(pool: PoolStorage, target: PoolStorage) -> None:
    """Raise if another pool cannot hold the states of this one."""
    for name in ("kind", "layers"):
        check_equal(name, getattr(pool, name), getattr(target, name))
    check_equal("device", pool.state.device, target.state.device)
    check_equal("shape of a state", pool.state.shape[2:], target.state.shape[2:])
    convs = [
        None if c is None else (c.dtype, c.shape[2], one._conv_width)
        for one, c in ((pool, pool.conv_state), (target, target.conv_state))
    ]
    check_equal("conv_state (dtype, channels, width)", *convs)


def check_decays(pool: PoolStorage, A: object) -> Sequence[Tensor]:
    """Return A of every layer, none for gated delta nets; raise if it does not match the layers."""
    if pool.kind == "gated_delta":
        if A is not None:
            expected = "None for gated delta nets, whose decays are in the history"
            raise ValueError(describe("A", expected, type(A).__name__))
        return ()
    expected = f"one tensor for each of {pool.layers} layers"
    if A is None:
        raise ValueError(describe("A", expected, None))
    if not isinstance(A, (Sequence, Tensor)) or (isinstance(A, Tensor) and not A.dim()):
        raise TypeError(describe("A", expected, type(A).__name__))
    if len(A) != pool.layers:
        raise ValueError(describe("A", expected, len(A)))
    decays = [A[layer] for layer in range(pool.layers)]
    for layer, tensor in enumerate(decays):
        name = f"A[{layer}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(describe(name, "a torch.Tensor", type(tensor).__name__))
        if tensor.device != pool.state.device:
            expected = f"a tensor on {pool.state.device} like the pool"
            fix = f"move it with {name}.to({str(pool.state.device)!r})"
            raise ValueError(describe(name, expected, f"one on {tensor.device}", fix))
        check_A(name, tensor, pool.state.shape[2:])
    if torch.is_grad_enabled():
        refuse_tangents("materialize", [f"A[{layer}]" for layer in range(pool.layers)], decays)
    return decays


def fold_mamba2(
    pool: PoolStorage,
    A: Sequence[Tensor],
    read: Tensor,
    written: Tensor,
    target: PoolStorage,
    num_tokens: Tensor | None,
    philox_rounds: int,
    saturate: bool,
) -> None:
    names = ("x_cache", "B_cache", "dt_cache") if pool.ring_start is not None else ("old_x", "old_B", "old_dt")
    seeds = None if target.state.dtype is torch.float32 else pool.rand_seed
    for layer in range(pool.layers):
        x, B, dt = (pool.history[name][layer] for name in names)
        scale, new_scale = (
            None if one.state_scale is None else one.state_scale[layer] for one in (pool, target)
        )  # fmt: skip
        materialize(
            pool.state[layer], x, B, dt, A[layer], pool.prev_num_accepted_tokens, read, written,
            cache_buf_idx=pool.cache_buf_idx, ring_start=pool.ring_start, num_tokens=num_tokens,
            out=None if target is pool else target.state[layer], state_scale=scale,
            out_scale=None if target is pool else new_scale,
            pad_slot_id=pool.pad_slot_id if target is pool else NO_PAD,
            rand_seed=None if seeds is None else seeds[layer], philox_rounds=philox_rounds,
            saturate=saturate,
        )  # fmt: skip


def fold_gated_delta(
    pool: PoolStorage,
    read: Tensor,
    written: Tensor,
    target: PoolStorage,
    num_tokens: Tensor | None,
    use_qk_l2norm: bool,
    saturate: bool,
) -> None:
    for layer in range(pool.layers):
        materialize_gated_delta(
            **pool._arguments[layer], state_batch_indices=read, dst_state_batch_indices=written,
            num_tokens=num_tokens, out=None if target is pool else target.state[layer],
            use_qk_l2norm=use_qk_l2norm, saturate=saturate,
        )  # fmt: skip

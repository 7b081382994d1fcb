"""`materialize_gated_delta`: the states of gated delta nets after pending tokens, written to slots of their own."""

from __future__ import annotations

import functools

from torch import Tensor

from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_rows, not_tensors
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops._gated_delta import config
from cute_ssm.ops._gated_delta.spec import WINDOW_BUCKETS
from cute_ssm.ops.materialize_gated_delta import arguments, reference
from cute_ssm.ops.materialize_gated_delta.arguments import TABLE, Arguments


def materialize_gated_delta(
    initial_state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    state_batch_indices: Tensor,
    dst_state_batch_indices: Tensor,
    *,
    num_tokens: Tensor | None = None,
    out: Tensor | None = None,
    use_qk_l2norm: bool = True,
    window: int | None = None,
    saturate: bool = False,
) -> Tensor:
    """Write the true states of slots, with their pending tokens folded in, to other slots or to another pool.

    This is `materialize` for the states of `gated_delta_rule_replay`: one launch for all rows of one layer, for prefix
    caching, preemption and migration.  Cursors and rings are left unchanged: set the cursors of a destination to zero
    before its next step, as `StatePool.materialize` does.

    Parameters
    ----------
    initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens
        As for `gated_delta_rule_replay`; only read.  Rows of the rings after the folded tokens are not read.
    state_batch_indices, dst_state_batch_indices : Tensor, (batch,), int32/int64
        Slots that are read, and slots of ``out`` that are written.  The latter are distinct, and none is read by
        another row.  A row with the same slot twice is folded in place; a row with a negative slot is skipped.
    num_tokens : Tensor, (batch,), int32/int64, optional
        Number of pending tokens to fold, starting with the oldest.  None: all.
    out : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16, optional
        Pool that is **written**, with any number of slots and the layout of ``initial_state``.  None:
        ``initial_state``.
    use_qk_l2norm : bool
        As in the steps.
    window : int, optional
        Largest number of pending tokens, 1 to 64, as in the steps.  None: the rows of the rings, at most 64.
    saturate : bool
        Clamp new float16 states to +-65504 where they would be infinite; NaN stays NaN, and states that are copied are
        not changed.  Raises for results of other types.

    Returns
    -------
    Tensor
        The pool that was written.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or value is not as described above.  Nothing has been written.
    UnsupportedSpecError, UnsupportedArchError
        The call is legal, but this version has no kernel for its sizes, or the tensors are on a GPU that the kernels
        are not compiled for.
    GradientError
        Grad mode is on, and an argument requires grad.

    Notes
    -----
    The state has the bits that a step of `gated_delta_rule_replay` which flushes would store: computed in float32, and
    rounded once to nearest even.  With ``num_tokens`` 0, and if both pools have the same type, its bytes are copied.

    The host never reads the contents of tensors on a GPU.  There, rows with a slot, cursor or number out of range are
    skipped.
    """
    try:
        if not isinstance(k_cache, Tensor):
            raise not_tensors(k_cache=k_cache)
        if window is None:
            window = min(k_cache.shape[2] if k_cache.dim() > 2 else 1, WINDOW_BUCKETS[-1])
        _REGISTERED.route(initial_state)(
            initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens, out,
            state_batch_indices, dst_state_batch_indices, num_tokens, use_qk_l2norm, window, saturate,
        )  # fmt: skip
        return initial_state if out is None else out
    except NotTensorError:
        return again(materialize_gated_delta, locals(), *TABLE.written)


_path = CallPath()


def _run(
    state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    pending: Tensor,
    out: Tensor | None,
    src: Tensor,
    dst: Tensor,
    counts: Tensor | None,
    use_qk_l2norm: bool,
    window: int,
    saturate: bool = False,
) -> None:
    target = state if out is None else out
    if isinstance(src, Tensor) and src.dim() == 1:
        dst, counts = first_rows(src.shape[0], dst, counts)
    key: tuple[object, ...] | None
    try:
        key = (
            state.shape, target.shape, k_cache.shape, v_cache.shape, state.dtype, target.dtype, k_cache.dtype,
            src.dtype, dst.dtype, None if counts is None else counts.dtype, use_qk_l2norm, window, state.device,
            src.shape[0], state.stride(), target.stride(), k_cache.stride(), v_cache.stride(), saturate,
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
    operands = (
        state, k_cache, v_cache, g_cache, beta_cache, ring_start, pending, target, src, dst, counts, window,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(*operands[:-1], use_qk_l2norm, window, saturate)
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[object, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    units = call.state_batch_indices.shape[0] * call.initial_state.shape[1]
    moves = functools.cache(lambda: arguments.moves(call))

    def check_contents() -> None:
        moves()

    return Checked(
        spec,
        operands=operands,
        units=units,
        choose=lambda arch, sm_count: config.choose_untuned(spec, units, sm_count),
        check_contents=check_contents,
        reference=lambda: reference.run(call, moves()),
    )


_REGISTERED = _library.register(TABLE.schema("serving_materialize_gated_delta"), _run)

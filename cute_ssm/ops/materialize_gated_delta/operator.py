"""`materialize_gated_delta`: the states of gated delta nets after pending tokens, written to slots of their own."""

from __future__ import annotations

import functools

from torch import Tensor

from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_rows, not_tensors
from cute_ssm.ops._calls import CallPath, Checked
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
    """Write the true state of slots, with their pending tokens folded in, to other slots or to another pool.

    What `materialize` is for `checkpointing_ssu`, for `gated_delta_rule_replay`: one launch for all rows of one layer,
    for prefix caching, preemption and migration.  Cursors and rings stay as they are: set the cursors of a
    destination to zero before its next step (`StatePool.materialize` does).

    Parameters
    ----------
    initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens
        As for `gated_delta_rule_replay`; read.  Rows of the rings behind the tokens that are folded are not.
    state_batch_indices, dst_state_batch_indices : Tensor, (batch,), int32/int64
        Slots that are read, and those of ``out`` that are written: distinct, and none that another row reads.  They
        may be the same: then pending tokens are folded in place.  A row with a negative one is skipped.
    num_tokens : Tensor, (batch,), int32/int64, optional
        How many pending tokens to fold, from the oldest on: 0 to all.  None: all.
    out : Tensor, (slots, value_heads, V, K), float32/bfloat16/float16, optional
        Pool that is **written**, of any number of slots, laid out like ``initial_state``; None: ``initial_state``.
    use_qk_l2norm : bool
        As the steps have it.
    window : int, optional
        Most pending tokens, 1 to 64, as the steps have it.  None: the rows of the rings, or 64.
    saturate : bool
        Of new float16 states, make +-65504 what would round to an infinity.  NaN stays NaN, and what is copied stays as
        it is.  An error if the result is of another type.

    Returns
    -------
    Tensor
        The pool that was written.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or value is not as described above.  Nothing has been written.  What tensors on
        a GPU hold is not looked at: there, rows with a slot, cursor or number out of range are skipped.
    UnsupportedSpecError, UnsupportedArchError
        Sizes, or a GPU, that the kernel is not made for.
    GradientError
        As for all operators.

    Notes
    -----
    The state is that of a step of `gated_delta_rule_replay` that flushes, bit for bit, computed in float32 and rounded
    once to nearest even.  With ``num_tokens`` 0, and if both pools have the same type, it is copied byte for byte.
    """
    if not isinstance(k_cache, Tensor):
        raise not_tensors(k_cache=k_cache)
    if window is None:
        window = min(k_cache.shape[2] if k_cache.dim() > 2 else 1, WINDOW_BUCKETS[-1])
    _REGISTERED.route(initial_state)(
        initial_state, k_cache, v_cache, g_cache, beta_cache, ring_start, prev_num_accepted_tokens, out,
        state_batch_indices, dst_state_batch_indices, num_tokens, use_qk_l2norm, window, saturate,
    )  # fmt: skip
    return initial_state if out is None else out


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

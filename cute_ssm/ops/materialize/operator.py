"""`materialize`: the states that pending tokens lead to, written to slots of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_rows
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops.materialize import arguments, reference
from cute_ssm.ops.materialize.arguments import TABLE, Arguments
from cute_ssm.ops.materialize.config import choose_materialize


def materialize(
    state: Tensor,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    A: Tensor,
    prev_num_accepted_tokens: Tensor,
    state_batch_indices: Tensor,
    dst_state_batch_indices: Tensor,
    *,
    cache_buf_idx: Tensor | None = None,
    ring_start: Tensor | None = None,
    num_tokens: Tensor | None = None,
    out: Tensor | None = None,
    state_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    pad_slot_id: int = -1,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    saturate: bool = False,
) -> Tensor:
    """Fold the pending tokens of slots into their states, and store the results in other slots or in another pool.

    Use it for prefix caching, offloading and migration: a slot of `checkpointing_ssu` holds an older state and the
    inputs of the tokens since.  One launch processes all rows of one layer.  Cursors and history are not modified: set
    the cursors of a destination to zero before its next step, as `StatePool.materialize` does.

    Parameters
    ----------
    state : Tensor, (slots, nheads, dim, dstate), float32/bfloat16/float16/int16/int8/float8_e4m3fn
        Pool that is read.  dim and dstate are multiples of 8 up to 256.  Rows are contiguous; the address and other
        strides are multiples of 16 bytes.
    x_history : Tensor, (slots, W, nheads, dim), (slots, 2, W, nheads, dim) or (slots, nheads, L, dim), bfloat16/float16
    B_history : Tensor, (slots, 2, W, ngroups, dstate) or (slots, ngroups, L, dstate), type of x_history
        ``old_x`` and ``old_B``, or ``x_cache`` and ``B_cache``.  Stride 1 in the last dimension; the address and other
        strides are multiples of 16 bytes.
    dt_history : Tensor, (slots, 2, nheads, W) or (slots, nheads, L), float32
        ``old_dt`` or ``dt_cache``; W is at most 64, L at most 128.  Stride 1 in the last dimension.
    A : Tensor, (nheads, dim, dstate), float32/bfloat16/float16
        One value per head, by stride 0 in the last two dimensions.
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Number of pending tokens of each slot, at most 64.
    state_batch_indices, dst_state_batch_indices : Tensor, (batch,), int32/int64
        Slots that are read, and slots of ``out`` that are written.  The latter are distinct, and no other row reads
        them.  A row whose slots are the same folds its pending tokens in place.
    cache_buf_idx : Tensor, (slots,), int32
        Active buffer of each slot.  Pass this or ``ring_start``.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token of each slot.
    num_tokens : Tensor, (batch,), int32/int64, optional
        Number of pending tokens to fold, from the oldest on: 0 to all.  None: all.
    out : Tensor, (slots, nheads, dim, dstate), any of the types of ``state``, optional
        Pool that is **written**, with any number of slots and the layout of ``state``.  None: ``state``.
    state_scale : Tensor, (slots, nheads, dim), float32, for int16/int8/float8_e4m3fn states only
        Stride 1 in the last dimension; **written** if ``out`` is None.
    out_scale : Tensor, (slots, nheads, dim), float32, if ``out`` is given and quantised
        **Written.**
    pad_slot_id : int
        Rows that read or write this slot are skipped.
    rand_seed : Tensor, (1,) or (slots,), int64, optional
        Round stochastically, with this seed or that of the slot that is read.  None if the result is float32.
    philox_rounds : int
        Number of rounds of the Philox generator.
    saturate : bool
        Store new float16 states that would round to infinities as +-65504.  NaN stays NaN, and copied states do not
        change.  Must be False if the result is of another type.

    Returns
    -------
    Tensor
        The pool that was written.

    Raises
    ------
    ValueError, TypeError
        A shape, type, stride, device or value is not as described above.  Nothing has been written.  The host never
        reads the contents of tensors on a GPU: there, rows with a slot, cursor or number out of range are skipped.
    UnsupportedSpecError, UnsupportedArchError
        The kernel does not support the sizes, or the GPU.
    GradientError
        As for all operators.

    Notes
    -----
    A state does not depend on any value of a later token: rows of the history that are not folded may hold NaN.

    With ``num_tokens`` 0, and if both pools have the same type, state and scales are copied byte for byte.  Otherwise
    the state is computed in float32 and rounded once.  `cute_ssm.reference.rounding` documents which random bits an
    element takes; the token step is the index of the last folded token among the pending ones.
    """
    if cache_buf_idx is not None and ring_start is not None:
        raise ValueError(describe("ring_start", "None with cache_buf_idx", "both", "a history has one of them"))
    cursor = cache_buf_idx if ring_start is None else ring_start
    if cursor is None:
        raise ValueError(describe("cache_buf_idx", "a tensor, or ring_start instead", "neither"))
    if out is None and out_scale is not None:
        raise ValueError(describe("out_scale", "None without out", "a tensor", "state_scale is written then"))
    try:
        _REGISTERED.route(state)(
            state, state_scale, x_history, B_history, dt_history, cursor, prev_num_accepted_tokens, A, out, out_scale,
            state_batch_indices, dst_state_batch_indices, num_tokens, rand_seed, ring_start is not None, pad_slot_id,
            philox_rounds, saturate,
        )  # fmt: skip
        return state if out is None else out
    except NotTensorError:
        return again(materialize, locals(), *TABLE.written)


_path = CallPath()


def _run(
    state: Tensor,
    state_scale: Tensor | None,
    x_history: Tensor,
    B_history: Tensor,
    dt_history: Tensor,
    cursor: Tensor,
    prev_num_accepted_tokens: Tensor,
    A: Tensor,
    out: Tensor | None,
    out_scale: Tensor | None,
    src: Tensor,
    dst: Tensor,
    num_tokens: Tensor | None,
    rand_seed: Tensor | None,
    ring: bool,
    pad_slot_id: int,
    philox_rounds: int,
    saturate: bool = False,
) -> None:
    if out is None:
        out, out_scale = state, state_scale
    if isinstance(src, Tensor) and src.dim() == 1:
        dst, num_tokens = first_rows(src.shape[0], dst, num_tokens)
    key: tuple[object, ...] | None
    try:
        key = (
            state.shape, out.shape, x_history.shape, B_history.shape, state.dtype, out.dtype, x_history.dtype, A.dtype,
            src.dtype, dst.dtype, None if num_tokens is None else num_tokens.dtype, ring, state.device, src.numel() > 0,
            None if rand_seed is None else (rand_seed.shape, philox_rounds), out_scale is None, state_scale is None,
            saturate,
        )  # fmt: skip
    except AttributeError:  # something is no tensor, which the checks will name
        key = None
    operands = (
        state, state_scale, x_history, B_history, dt_history, cursor, prev_num_accepted_tokens, A, out, out_scale,
        src, dst, num_tokens, rand_seed, pad_slot_id,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(*operands[:-1], ring, pad_slot_id, philox_rounds, saturate)
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[Any, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    return Checked(
        spec,
        operands,
        units=call.state_batch_indices.shape[0] * call.state.shape[1],
        choose=lambda arch, sm_count: choose_materialize(),
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference.materialize(
            reference.Pool(call.state, call.state_scale),
            arguments.history_of(call),
            call.A[:, 0, 0],
            reference.Pool(arguments.out_of(call), call.out_scale),
            arguments.moves_of(call),
            call.rand_seed,
            spec.philox_rounds,
            call.saturate,
        ),
    )


_REGISTERED = _library.register(TABLE.schema("serving_materialize"), _run)

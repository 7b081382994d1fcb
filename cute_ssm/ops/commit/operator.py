"""`commit`: advance the cursors of a batch after a step of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.ops import _library
from cute_ssm.ops._arguments import first_of_batch
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._cursors.arguments import NO_PAD, cursor_and_scalars
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops.commit import arguments, reference
from cute_ssm.ops.commit.arguments import TABLE, Arguments
from cute_ssm.ops.commit.config import choose_commit


def commit(
    prev_num_accepted_tokens: Tensor,
    num_accepted_tokens: Tensor,
    *,
    window: int,
    cache_buf_idx: Tensor | None = None,
    ring_start: Tensor | None = None,
    ring_length: int | None = None,
    tokens: int | None = None,
    cu_seqlens: Tensor | None = None,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    rand_seed: Tensor | None = None,
    unallocated: Tensor | None = None,
) -> None:
    """Advance the cursors of a batch after a step of the model, by the numbers of accepted tokens.

    Call it once per step, for all layers: it takes one launch, does not wait, and allocates nothing.  Use it with
    `checkpointing_ssu` (``cache_buf_idx``), and with `checkpointing_ssu_ring` and `gated_delta_rule_replay`
    (``ring_start``).  A step with n new tokens of a slot that has p pending tokens writes the state if p + n > window.
    If it did, p becomes the number of accepted tokens, and the buffer flips, or the start of the ring advances by the
    old p.  Otherwise p grows by the number of accepted tokens.

    Parameters
    ----------
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Number of pending tokens of each slot, **updated in place**.
    num_accepted_tokens : Tensor, (batch,), int32/int64
        How many of its new tokens each row accepts: 0 to min(n, window).  A row with a negative number does not change.
    window : int
        Largest number of pending tokens.
    cache_buf_idx : Tensor, (slots,), int32
        Active buffer of each slot, **updated in place**.  Pass this or ``ring_start``.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token in the ring of each slot, **updated in place**.
    ring_length : int
        Rows of a ring, at least ``window`` and the new tokens; with ``ring_start`` only.
    tokens : int
        Number of new tokens of every row.  Pass this or ``cu_seqlens``.
    cu_seqlens : Tensor, (batch + 1,), int32/int64
        Row b had ``cu_seqlens[b + 1] - cu_seqlens[b]`` new tokens; a row without new tokens does not change.
    state_batch_indices : Tensor, (batch,), int32/int64, optional
        Slot of each row; distinct, except for padding.  None: row b uses slot b.
    pad_slot_id : int
        A row with this slot is padding and does not change.  Without ``state_batch_indices`` no row is padding.
    rand_seed : Tensor, (layers, slots), int64, optional
        Seeds of stochastic rounding; those of committed rows **advance by one** in every layer.  Stride 1 in the last
        dimension.
    unallocated : Tensor, (slots,), bool, optional
        True for slots that are not allocated.  A row that would advance one raises on the CPU, and does not change on
        a GPU.

    Raises
    ------
    ValueError, TypeError
        A shape, type, device or value is not as described above.  Nothing has been written.  The host never reads the
        contents of tensors on a GPU: there, rows with a slot, cursor or number out of range do not change.
    UnsupportedArchError
        The tensors are on a GPU without kernels for it.
    """
    cursor, scalars = cursor_and_scalars(
        window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id
    )
    try:
        if rand_seed is not None and isinstance(rand_seed, Tensor) and rand_seed.dim() == 1:
            rand_seed = rand_seed[None]
        if state_batch_indices is None:
            scalars = scalars._replace(pad_slot_id=NO_PAD)
        _REGISTERED.route(prev_num_accepted_tokens)(
            prev_num_accepted_tokens, cursor, num_accepted_tokens, state_batch_indices, cu_seqlens, rand_seed,
            unallocated, ring_start is not None, *scalars,
        )  # fmt: skip
    except NotTensorError:
        again(commit, locals(), *TABLE.written, "cache_buf_idx", "ring_start")


_path = CallPath()


def _run(
    prev_num_accepted_tokens: Tensor,
    cursor: Tensor,
    num_accepted_tokens: Tensor,
    src: Tensor | None,
    cu_seqlens: Tensor | None,
    rand_seed: Tensor | None,
    unallocated: Tensor | None,
    ring: bool,
    pad_slot_id: int,
    tokens: int,
    window: int,
    num_cursors: int,
) -> None:
    num_accepted_tokens, src = first_of_batch(num_accepted_tokens, cu_seqlens, num_accepted_tokens, src)
    key: tuple[object, ...] | None
    try:
        batch = num_accepted_tokens.shape[0]
        key = (
            ring, num_accepted_tokens.dtype, None if src is None else src.dtype,
            None if cu_seqlens is None else cu_seqlens.dtype, None if rand_seed is None else rand_seed.dtype,
            None if unallocated is None else unallocated.dtype, prev_num_accepted_tokens.device,
            batch > 0, src is not None or prev_num_accepted_tokens.shape[0] >= batch,
            cu_seqlens is None or cu_seqlens.shape[0] == batch + 1,
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
    mask = unallocated
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)  # as the kernel reads it
    operands = (
        prev_num_accepted_tokens, cursor, num_accepted_tokens, src, cu_seqlens, rand_seed, mask,
        pad_slot_id, tokens, window, num_cursors,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(
        prev_num_accepted_tokens, cursor, num_accepted_tokens, src, cu_seqlens, rand_seed, unallocated,
        ring, pad_slot_id, tokens, window, num_cursors,
    )  # fmt: skip
    _path.run(key, _checked(call, operands))


def _checked(call: Arguments, operands: tuple[object, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    return Checked(
        spec,
        operands,
        units=call.num_accepted_tokens.shape[0],
        choose=lambda arch, sm_count: choose_commit(),
        check_contents=lambda: arguments.check_contents(call),
        reference=lambda: reference.commit(arguments.rows_of(call), call.num_accepted_tokens, call.rand_seed),
    )


_REGISTERED = _library.register(TABLE.schema("serving_commit"), _run)

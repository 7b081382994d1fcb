"""`build_work_items`: list the rows of a batch, first those whose next step writes the state."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm.errors import describe
from cute_ssm.ops import _library
from cute_ssm.ops._arguments import check_tensors, first_of_batch
from cute_ssm.ops._calls import CallPath, Checked
from cute_ssm.ops._cursors.arguments import cursor_and_scalars
from cute_ssm.ops._cursors.config import FEW_ROWS
from cute_ssm.ops._dlpack import NotTensorError, again
from cute_ssm.ops.build_work_items import arguments, reference
from cute_ssm.ops.build_work_items.arguments import TABLE, Arguments
from cute_ssm.ops.build_work_items.config import choose_work_items

INT32 = torch.iinfo(torch.int32)


def build_work_items(
    prev_num_accepted_tokens: Tensor,
    *,
    window: int,
    cache_buf_idx: Tensor | None = None,
    ring_start: Tensor | None = None,
    ring_length: int | None = None,
    tokens: int | None = None,
    cu_seqlens: Tensor | None = None,
    state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    batch: int | None = None,
    work_items: Tensor | None = None,
    num_writes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """List the rows of a batch, first those whose next step writes the state.

    Call it once per step, for all layers: it takes one launch, does not wait, and allocates nothing if ``work_items``
    and ``num_writes`` are given.

    Parameters
    ----------
    prev_num_accepted_tokens : Tensor, (slots,), int32
        Number of pending tokens of each slot.
    window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, state_batch_indices
        As for `commit`; none is modified.
    pad_slot_id : int
        A row with this slot is padding.  Fits 32 bits; without ``state_batch_indices``, a slot that no row uses.
    batch : int
        Number of rows, at most that of slots.  Needed if ``state_batch_indices``, ``cu_seqlens`` and ``work_items`` are
        all None.
    work_items : Tensor, (batch, 4), int32, optional
        **Written**: position in the batch, slot, pending tokens, and active buffer or start of the ring of each row.
        Rows that write come first; both groups are in the order of the batch.  Padding and rows without new tokens are
        in the second group, as (position, ``pad_slot_id``, 0, 0).  Contiguous, at a multiple of 16 bytes.
    num_writes : Tensor, (1,), int32, optional
        **Written**: the number of rows that write.

    Returns
    -------
    work_items, num_writes : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedArchError
        As for `commit`.  On a GPU, rows with a slot or cursor out of range are listed as padding.
    """
    cursor, scalars = cursor_and_scalars(
        window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id
    )
    if not INT32.min <= pad_slot_id <= INT32.max:
        raise ValueError(describe("pad_slot_id", "a number of 32 bits", pad_slot_id, "items of the list are int32"))
    try:
        if work_items is None or num_writes is None:
            check_tensors({"prev_num_accepted_tokens": prev_num_accepted_tokens}, ())
        device = getattr(prev_num_accepted_tokens, "device", None)
        if work_items is None:
            rows = _batch(batch, state_batch_indices, cu_seqlens)
            work_items = torch.empty(rows, 4, dtype=torch.int32, device=device)
        elif batch is not None and isinstance(work_items, Tensor) and work_items.shape[:1] < (batch,):
            raise ValueError(describe("work_items", f"at least batch = {batch} rows", tuple(work_items.shape)))
        listed = work_items if batch is None or not isinstance(work_items, Tensor) else work_items[:batch]
        if num_writes is None:
            num_writes = torch.empty(1, dtype=torch.int32, device=device)
        if state_batch_indices is None and isinstance(listed, Tensor) and 0 <= pad_slot_id < len(listed):
            raise ValueError(
                describe("pad_slot_id", "a slot that no row uses", pad_slot_id, "pass state_batch_indices")
            )
        _REGISTERED.route(prev_num_accepted_tokens)(
            prev_num_accepted_tokens, cursor, state_batch_indices, cu_seqlens, listed, num_writes,
            ring_start is not None, *scalars,
        )  # fmt: skip
        return work_items, num_writes
    except NotTensorError:
        return again(build_work_items, locals(), *TABLE.written)


def _batch(batch: int | None, src: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Return the number of rows of a call without ``work_items``."""
    if batch is not None:
        return batch
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim():
        return len(cu_seqlens) - 1
    if isinstance(src, Tensor) and src.dim():
        return len(src)
    check_tensors({"state_batch_indices": src, "cu_seqlens": cu_seqlens}, ("state_batch_indices", "cu_seqlens"))
    raise ValueError(describe("batch", "a number of rows", None, "no other argument determines it"))


_path = CallPath()


def _run(
    prev_num_accepted_tokens: Tensor,
    cursor: Tensor,
    src: Tensor | None,
    cu_seqlens: Tensor | None,
    work_items: Tensor,
    num_writes: Tensor,
    ring: bool,
    pad_slot_id: int,
    tokens: int,
    window: int,
    num_cursors: int,
) -> None:
    work_items, src = first_of_batch(work_items, cu_seqlens, work_items, src)
    key: tuple[object, ...] | None
    try:
        batch = work_items.shape[0]
        key = (
            ring, None if src is None else src.dtype, None if cu_seqlens is None else cu_seqlens.dtype,
            work_items.dtype, num_writes.dtype, prev_num_accepted_tokens.device, batch > 0, batch <= FEW_ROWS,
            src is not None or prev_num_accepted_tokens.shape[0] >= batch,
            cu_seqlens is None or cu_seqlens.shape[0] == batch + 1,
        )  # fmt: skip
    except (AttributeError, IndexError):  # something is no tensor, or has no axes, which the checks will name
        key = None
    operands = (
        prev_num_accepted_tokens, cursor, src, cu_seqlens, work_items, num_writes,
        pad_slot_id, tokens, window, num_cursors,
    )  # fmt: skip
    if _path.run_plan(key, operands):
        return
    call = Arguments(*operands[:6], ring, *operands[6:])
    checked = _checked(call, operands)
    if checked.units:
        _path.run(key, checked)
    else:
        num_writes.zero_()


def _checked(call: Arguments, operands: tuple[object, ...]) -> Checked:
    """Check the arguments of a call, and say how it runs."""
    spec = arguments.check(call)
    batch = call.work_items.shape[0]

    def run_reference() -> None:
        items, count = reference.work_items(arguments.rows_of(call), call.pad_slot_id)
        call.work_items.copy_(items)
        call.num_writes.fill_(count)

    return Checked(
        spec,
        operands,
        units=batch,
        choose=lambda arch, sm_count: choose_work_items(batch),
        check_contents=lambda: arguments.check_contents(call),
        reference=run_reference,
    )


_REGISTERED = _library.register(TABLE.schema("serving_build_work_items"), _run)

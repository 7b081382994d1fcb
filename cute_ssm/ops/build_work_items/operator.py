"""`build_work_items`: the rows of a batch whose next step writes the state."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._cursors.arguments import Rows, batch_of, is_eager, places_of, plan_key, run_plan
from cute_ssm.ops._cursors.config import FEW_ROWS
from cute_ssm.ops.build_work_items import reference
from cute_ssm.ops.build_work_items.config import choose_work_items
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec

INT32 = torch.iinfo(torch.int32)
LIST_BYTES = 16  # of a work item, which one access writes


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
    """List the rows of a batch, those first whose step will write the state: ``work_items`` and ``num_writes``.

    Once per step, for all layers: one launch, no wait, and no allocation if both results are given.

    Parameters
    ----------
    prev_num_accepted_tokens : Tensor, (slots,), int32
        PNAT of each slot.
    window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, state_batch_indices
        As for `commit`; nothing is updated.
    pad_slot_id : int
        A row with this slot is padding; fits 32 bits.  Without ``state_batch_indices``, a slot that no row uses.
    batch : int
        Rows, if neither ``state_batch_indices`` nor ``cu_seqlens`` nor ``work_items`` tells: at most the slots.
    work_items : Tensor, (batch, 4), int32, optional
        **Written**: position in the batch, slot, PNAT, active buffer or start of the ring.  Rows that write come
        first, and both kinds are in the order of the batch.  Rows that are padding or without tokens are listed with
        those that do not write, as (position, ``pad_slot_id``, 0, 0).  Contiguous, at a multiple of 16 bytes.
    num_writes : Tensor, (1,), int32, optional
        **Written**: how many rows write.

    Returns
    -------
    work_items, num_writes : Tensor

    Raises
    ------
    ValueError, TypeError, UnsupportedArchError
        As `commit` does.  On a GPU, rows with a slot or cursor out of range are listed like padding.
    """
    place, sizes = places_of(window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id)
    if not INT32.min <= pad_slot_id <= INT32.max:
        raise ValueError(describe("pad_slot_id", "a number of 32 bits", pad_slot_id, "items of the list are int32"))
    pnat = prev_num_accepted_tokens
    if work_items is None or num_writes is None:
        arguments.check_tensors({"prev_num_accepted_tokens": pnat}, ())
    if work_items is None:
        rows = batch_of(batch, state_batch_indices, cu_seqlens)
        work_items = torch.empty(rows, 4, dtype=torch.int32, device=pnat.device)
    elif batch is not None and isinstance(work_items, Tensor) and work_items.shape[:1] < (batch,):
        raise ValueError(describe("work_items", f"at least batch = {batch} rows", tuple(work_items.shape)))
    listed = work_items if batch is None or not isinstance(work_items, Tensor) else work_items[:batch]
    if num_writes is None:
        num_writes = torch.empty(1, dtype=torch.int32, device=pnat.device)
    if state_batch_indices is None and isinstance(listed, Tensor) and 0 <= pad_slot_id < len(listed):
        raise ValueError(describe("pad_slot_id", "a slot that no row uses", pad_slot_id, "pass state_batch_indices"))
    run = _eager if is_eager(pnat) else _overload
    run(
        pnat, place, state_batch_indices, cu_seqlens, listed, num_writes, ring_start is not None, *sizes
    )  # fmt: skip
    return work_items, num_writes


# Steady state: all that a kernel is chosen by, and what its own entry does not check before it launches.  The entry
# checks types, strides, alignment, and the equality of sizes; if it refuses, the arguments are examined one by one.
_path = CallPath()


def _run(
    pnat: Tensor,
    place: Tensor,
    src: Tensor | None,
    cu_seqlens: Tensor | None,
    work_items: Tensor,
    num_writes: Tensor,
    ring: bool,
    pad_slot_id: int,
    tokens: int,
    window: int,
    places: int,
) -> None:
    work_items, src = arguments.first_of_batch(work_items, cu_seqlens, work_items, src)
    rows = Rows(pnat, place, src, cu_seqlens, ring, pad_slot_id, tokens, window, places)
    operands = (pnat, place, src, cu_seqlens, work_items, num_writes, *rows.scalars())
    key = plan_key(WorkItemsSpec, rows, work_items, num_writes)
    if key is not None:
        key += (work_items.shape[0] <= FEW_ROWS,)
    if run_plan(_path.plans, key, operands):
        return
    named = {**rows.named(), "work_items": work_items, "num_writes": num_writes}
    arguments.check_tensors(named, ("state_batch_indices", "cu_seqlens"))
    arguments.check_dtype("work_items", work_items, (torch.int32,))
    if work_items.dim() != 2 or work_items.shape[1] != 4:
        raise ValueError(describe("work_items", "shape (batch, 4)", tuple(work_items.shape)))
    if not work_items.is_contiguous() or work_items.data_ptr() % LIST_BYTES:
        got = f"address {work_items.data_ptr():#x} and strides {work_items.stride()}"
        expected = f"contiguous rows at a multiple of {LIST_BYTES} bytes"
        raise ValueError(describe("work_items", expected, got, arguments.allocation(work_items)))
    arguments.check_dtype("num_writes", num_writes, (torch.int32,))
    arguments.check_shape("num_writes", num_writes, (1,), "(1,)")
    batch = rows.batch(work_items)
    arguments.check_shape("work_items", work_items, (batch, 4), "(batch, 4)")
    rows.check(batch)
    if not batch:
        num_writes.zero_()
        return
    spec, config = WorkItemsSpec(**rows.spec()), choose_work_items(batch)
    if pnat.is_cuda:
        plan = runtime.get(spec, config, runtime.target(pnat.device))
        _path.plans.remember(key, plan)
        plan(*operands)
        return
    cursors = rows.cursors(batch)
    emulator = runtime.emulator()
    if emulator is None:
        runtime.by_reference(spec, operands)
        items, count = reference.work_items(cursors, pad_slot_id)
        work_items.copy_(items)
        num_writes.fill_(count)
    else:
        runtime.emulated(spec, config, archs.by_name(emulator.arch))(*operands)


_eager, _overload, _ = _library.register(
    "serving_build_work_items(Tensor prev_num_accepted_tokens, Tensor place, Tensor? state_batch_indices, "
    "Tensor? cu_seqlens, Tensor(a!) work_items, Tensor(b!) num_writes, bool ring, int pad_slot_id, int tokens, "
    "int window, int places) -> ()",
    _run,
    lambda *_: None,
)

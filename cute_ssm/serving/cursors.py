"""`commit` and `build_work_items`: the cursors of a batch after a step of the model, and before the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._plans import REFUSALS, Plans
from cute_ssm.reference import serving as reference
from cute_ssm.serving._pool_checks import check_allocated
from cute_ssm.spec import CommitSpec, WorkItemsSpec
from cute_ssm.tuning import overridden
from cute_ssm.tuning import serving as tuning

INTEGERS = (torch.int32, torch.int64)
INT32 = torch.iinfo(torch.int32)
LIST_BYTES = 16  # of a work item, which one access writes
NO_PAD = -1  # no row's number


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

    Once per step, for all layers: one launch, no wait, no allocation.  It serves `checkpointing_ssu` (with
    ``cache_buf_idx``), and `checkpointing_ssu_ring` and `gated_delta_rule_replay` (with ``ring_start``).  With PNAT
    the pending tokens of a row's slot and n its new tokens, the step wrote the state if PNAT + n > window; then PNAT
    becomes the number of accepted tokens, and the buffer flips, or the start of the ring moves on by the old PNAT.
    Otherwise PNAT grows by the number of accepted tokens.

    Parameters
    ----------
    prev_num_accepted_tokens : Tensor, (slots,), int32
        PNAT of each slot, **updated in place**.
    num_accepted_tokens : Tensor, (batch,), int32/int64
        How many of its new tokens each row keeps: 0 to min(n, window).  A negative number leaves the row as it is.
    window : int
        Largest PNAT.
    cache_buf_idx : Tensor, (slots,), int32
        Active buffer of each slot, **updated in place**.  This or ``ring_start``.
    ring_start : Tensor, (slots,), int32
        Row of the oldest pending token in the ring of each slot, **updated in place**.
    ring_length : int
        Rows of a ring, at least ``window``; with ``ring_start`` only.
    tokens : int
        New tokens of every row.  This or ``cu_seqlens``.
    cu_seqlens : Tensor, (batch + 1,), int32/int64
        Row b had ``cu_seqlens[b + 1] - cu_seqlens[b]`` new tokens; a row without any stays as it is.
    state_batch_indices : Tensor, (batch,), int32/int64, optional
        Slot of each row, different ones but for padding.  None: row b uses slot b.
    pad_slot_id : int
        A row with this slot is padding: nothing of it is read or written.  Without ``state_batch_indices`` no row is.
    rand_seed : Tensor, (layers, slots), int64, optional
        Seeds of stochastic rounding, those of committed rows **advanced by one** in every layer; stride 1 in the last
        dimension.
    unallocated : Tensor, (slots,), bool, optional
        True for slots that no sequence has: a row that would advance one is refused on the CPU, and stays as it is on
        a GPU.

    Raises
    ------
    ValueError, TypeError
        A shape, type, device or value is not as described above.  Nothing has been written.  What tensors on a GPU
        hold is not looked at: there, rows with a slot, cursor or number out of range stay as they are.
    UnsupportedArchError
        The tensors are on a GPU that the kernels are not compiled for.
    """
    place, sizes = _places(window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id)
    if rand_seed is not None and isinstance(rand_seed, Tensor) and rand_seed.dim() == 1:
        rand_seed = rand_seed[None]
    if state_batch_indices is None:
        sizes = (NO_PAD, *sizes[1:])
    run = _commit_eager if _eager(prev_num_accepted_tokens) else _commit_overload
    run(
        prev_num_accepted_tokens, place, num_accepted_tokens, state_batch_indices, cu_seqlens, rand_seed, unallocated,
        ring_start is not None, *sizes,
    )  # fmt: skip


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
    place, sizes = _places(window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id)
    if not INT32.min <= pad_slot_id <= INT32.max:
        raise ValueError(describe("pad_slot_id", "a number of 32 bits", pad_slot_id, "items of the list are int32"))
    pnat = prev_num_accepted_tokens
    if work_items is None or num_writes is None:
        arguments.check_tensors({"prev_num_accepted_tokens": pnat}, ())
    if work_items is None:
        rows = _batch(batch, state_batch_indices, cu_seqlens)
        work_items = torch.empty(rows, 4, dtype=torch.int32, device=pnat.device)
    elif batch is not None and isinstance(work_items, Tensor) and work_items.shape[:1] < (batch,):
        raise ValueError(describe("work_items", f"at least batch = {batch} rows", tuple(work_items.shape)))
    listed = work_items if batch is None or not isinstance(work_items, Tensor) else work_items[:batch]
    if num_writes is None:
        num_writes = torch.empty(1, dtype=torch.int32, device=pnat.device)
    if state_batch_indices is None and isinstance(listed, Tensor) and 0 <= pad_slot_id < len(listed):
        raise ValueError(describe("pad_slot_id", "a slot that no row uses", pad_slot_id, "pass state_batch_indices"))
    run = _build_eager if _eager(pnat) else _build_overload
    run(
        pnat, place, state_batch_indices, cu_seqlens, listed, num_writes, ring_start is not None, *sizes
    )  # fmt: skip
    return work_items, num_writes


# ---------------------------------------------------------------------------------------------------------- arguments
def _eager(tensor: object) -> bool:
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _places(
    window: int,
    cache_buf_idx: Tensor | None,
    ring_start: Tensor | None,
    ring_length: int | None,
    tokens: int | None,
    cu_seqlens: Tensor | None,
    pad_slot_id: int,
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return the second cursor, and (pad slot, tokens of a row, window, values of that cursor)."""
    if cache_buf_idx is not None and ring_start is not None:
        raise ValueError(describe("ring_start", "None beside cache_buf_idx", "both", "a history is one or the other"))
    place = cache_buf_idx if ring_start is None else ring_start
    if place is None:
        raise ValueError(describe("cache_buf_idx", "a tensor, or ring_start instead", "neither"))
    if window < 1:
        raise ValueError(describe("window", "at least 1", window))
    if (tokens is None) == (cu_seqlens is None):
        got: object = "neither" if tokens is None else "both"
        raise ValueError(describe("tokens", "a number, or cu_seqlens instead", got))
    if tokens is not None and not 1 <= tokens <= tuning.MOST_TOKENS:
        raise ValueError(describe("tokens", f"at least 1, at most {tuning.MOST_TOKENS}", tokens))
    if ring_start is None:
        if ring_length is not None:
            raise ValueError(describe("ring_length", "None without ring_start", ring_length))
        return place, (pad_slot_id, tokens or 0, window, 2)
    least = window + (tokens or 1)
    if ring_length is None or ring_length < least:
        got = "None" if ring_length is None else ring_length
        fix = "the rows of a ring hold the window and the new tokens"
        raise ValueError(describe("ring_length", f"at least {least}", got, fix))
    return place, (pad_slot_id, tokens or 0, window, ring_length)


def _batch(batch: int | None, src: Tensor | None, cu_seqlens: Tensor | None) -> int:
    if batch is not None:
        return batch
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim():
        return len(cu_seqlens) - 1
    if isinstance(src, Tensor) and src.dim():
        return len(src)
    raise ValueError(describe("batch", "a number of rows", None, "nothing else tells it"))


class _Rows(NamedTuple):
    """What both functions read."""

    pnat: Tensor
    place: Tensor
    src: Tensor | None
    cu_seqlens: Tensor | None
    ring: bool
    pad_slot_id: int
    tokens: int
    window: int
    places: int

    @property
    def place_name(self) -> str:
        return "ring_start" if self.ring else "cache_buf_idx"

    def named(self) -> dict[str, Any]:
        return {
            "prev_num_accepted_tokens": self.pnat,
            self.place_name: self.place,
            "state_batch_indices": self.src,
            "cu_seqlens": self.cu_seqlens,
        }

    def batch(self, listed: Tensor) -> int:
        """Rows, as many as ``cu_seqlens`` or else `listed` counts."""
        packed = self.cu_seqlens
        return listed.shape[0] if packed is None or packed.dim() != 1 or not len(packed) else len(packed) - 1

    def check(self, batch: int) -> None:
        """Raise unless shapes and types fit a batch."""
        arguments.check_dtype("prev_num_accepted_tokens", self.pnat, (torch.int32,))
        if self.pnat.dim() != 1:
            raise ValueError(describe("prev_num_accepted_tokens", "shape (slots,)", tuple(self.pnat.shape)))
        slots = self.pnat.shape[0]
        arguments.check_dtype(self.place_name, self.place, (torch.int32,))
        arguments.check_shape(self.place_name, self.place, (slots,), "(slots,)")
        if self.src is not None:
            arguments.check_dtype("state_batch_indices", self.src, INTEGERS)
            arguments.check_shape("state_batch_indices", self.src, (batch,), "(batch,)")
        elif slots < batch:
            fix = "pass state_batch_indices to say which slot each row uses"
            raise ValueError(describe("prev_num_accepted_tokens", f"at least batch = {batch} slots", slots, fix))
        if self.cu_seqlens is not None:
            arguments.check_dtype("cu_seqlens", self.cu_seqlens, INTEGERS)
            arguments.check_shape("cu_seqlens", self.cu_seqlens, (batch + 1,), "(batch + 1,)")

    def spec(self) -> dict[str, Any]:
        def name_of(tensor: Tensor | None) -> str | None:
            return None if tensor is None else arguments.DTYPE_NAMES[tensor.dtype]

        return {"ring": self.ring, "src_dtype": name_of(self.src), "cu_dtype": name_of(self.cu_seqlens)}

    def cursors(self, batch: int) -> reference.Cursors:
        """The rows of tensors on the CPU; raise if what they hold does not fit."""
        slots = torch.arange(batch) if self.src is None else self.src.long()
        counts = torch.full((batch,), self.tokens) if self.cu_seqlens is None else self.cu_seqlens.long().diff()
        if self.cu_seqlens is not None and (bool((counts < 0).any()) or bool((self.cu_seqlens < 0).any())):
            raise ValueError(describe("cu_seqlens", "rising offsets from 0 on", self.cu_seqlens.tolist()))
        if bool((counts > tuning.MOST_TOKENS).any()):
            expected = f"at most {tuning.MOST_TOKENS} tokens of a row"
            raise ValueError(describe("cu_seqlens", expected, int(counts.max())))
        live = (slots != self.pad_slot_id) & (counts > 0)
        arguments.check_slots("state_batch_indices", slots, live, self.pnat.shape[0], self.pad_slot_id)
        used = slots[live]
        for name, values, most in (
            ("prev_num_accepted_tokens", self.pnat, self.window),
            (self.place_name, self.place, self.places - 1),
        ):
            bad = used[(values[used] < 0) | (values[used] > most)]
            if len(bad):
                got = f"{int(values[bad[0]])} in slot {int(bad[0])}"
                raise ValueError(describe(name, f"values from 0 to {most}", got))
        if self.ring and self.cu_seqlens is not None and len(counts) and self.window + int(counts.max()) > self.places:
            expected = f"at most {self.places - self.window} tokens of a row, the ring's length but for the window"
            raise ValueError(describe("cu_seqlens", expected, int(counts.max())))
        fields = (self.pnat, self.place, self.places, self.ring, self.window)
        return reference.Cursors(*fields, slots=slots, counts=counts, live=live)

    def scalars(self) -> tuple[int, int, int, int]:
        return self.pad_slot_id, self.tokens, self.window, self.places


# Steady state: all that a kernel is chosen by, and what its own entry does not check before it launches.  The entry
# checks types, strides, alignment, and the equality of sizes; if it refuses, the arguments are examined one by one.
_plans: Plans[Callable[..., None]] = Plans()


def _key(kind: type, rows: _Rows, listed: Tensor, *others: Tensor | None) -> tuple[object, ...] | None:
    """Key of a plan for rows that `listed` counts; None if something is no tensor, which the checks will name."""
    src, cu_seqlens = rows.src, rows.cu_seqlens
    try:
        batch = listed.shape[0]
        types = tuple(None if t is None else t.dtype for t in (src, cu_seqlens, listed, *others))
        enough = src is not None or rows.pnat.shape[0] >= batch
        fits = cu_seqlens is None or cu_seqlens.shape[0] == batch + 1
        known = batch > 0 and enough and fits and rows.pnat.is_cuda and not overridden()
        return (kind, rows.ring, types, rows.pnat.device) if known else None
    except (AttributeError, IndexError):
        return None


def _run_plan(key: tuple[object, ...] | None, arguments: tuple[Any, ...]) -> bool:
    """Run as an earlier call like this one, if there was one and the kernel's entry accepts the arguments."""
    plan = _plans.get(key)
    if plan is None:
        return False
    try:
        plan(*arguments)
    except REFUSALS:
        return False
    return True


def _commit(
    pnat: Tensor,
    place: Tensor,
    accepted: Tensor,
    src: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    unallocated: Tensor | None,
    ring: bool,
    pad_slot_id: int,
    tokens: int,
    window: int,
    places: int,
) -> None:
    accepted, src = arguments.first_of_batch(accepted, cu_seqlens, accepted, src)
    rows = _Rows(pnat, place, src, cu_seqlens, ring, pad_slot_id, tokens, window, places)
    mask = unallocated
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)  # as the kernel reads it
    operands = (pnat, place, accepted, src, cu_seqlens, seeds, mask, *rows.scalars())
    key = _key(CommitSpec, rows, accepted, seeds, unallocated)
    if _run_plan(key, operands):
        return
    named = {**rows.named(), "num_accepted_tokens": accepted, "rand_seed": seeds, "unallocated": unallocated}
    arguments.check_tensors(named, ("state_batch_indices", "cu_seqlens", "rand_seed", "unallocated"))
    arguments.check_dtype("num_accepted_tokens", accepted, INTEGERS)
    if accepted.dim() != 1:
        raise ValueError(describe("num_accepted_tokens", "shape (batch,)", tuple(accepted.shape)))
    batch = rows.batch(accepted)
    rows.check(batch)
    arguments.check_shape("num_accepted_tokens", accepted, (batch,), "(batch,)")
    for name in ("prev_num_accepted_tokens", rows.place_name):
        arguments.check_writable(name, named[name])
    if seeds is not None:
        arguments.check_dtype("rand_seed", seeds, (torch.int64,))
        if seeds.dim() != 2 or seeds.shape[1] != pnat.shape[0]:
            expected = f"shape (layers, slots) = (layers, {pnat.shape[0]})"
            raise ValueError(describe("rand_seed", expected, tuple(seeds.shape)))
        arguments.check_last_contiguous("rand_seed", seeds)
        arguments.check_writable("rand_seed", seeds)
    if unallocated is not None:
        arguments.check_dtype("unallocated", unallocated, (torch.bool,))
        arguments.check_shape("unallocated", unallocated, (pnat.shape[0],), "(slots,)")
    spec = CommitSpec(
        **rows.spec(), accepted_dtype=arguments.DTYPE_NAMES[accepted.dtype], seeds=seeds is not None,
        unallocated=unallocated is not None,
    )  # fmt: skip
    if pnat.is_cuda:
        if batch:
            plan = runtime.get(spec, tuning.choose_commit(), runtime.target(pnat.device))
            _plans.remember(key, plan)
            plan(*operands)
        return
    cursors = rows.cursors(batch)
    _check_accepted(accepted, cursors, unallocated, pad_slot_id)
    emulator = runtime.emulator()
    if emulator is None:
        runtime.by_reference(spec, operands)
        reference.commit(cursors, accepted, seeds)
    elif batch:
        arch = archs.by_name(emulator.arch)
        runtime.emulated(spec, tuning.choose_commit(), arch)(*operands)


def _check_accepted(accepted: Tensor, cursors: reference.Cursors, unallocated: Tensor | None, pad_slot_id: int) -> None:
    """Raise on numbers that no step can have accepted, and on slots that no row or two rows may advance."""
    if unallocated is not None:
        advanced = cursors.live & (accepted >= 0)
        check_allocated("state_batch_indices", cursors.slots, unallocated, advanced, pad_slot_id)
    most = cursors.counts.clamp(max=cursors.window)
    bad = (cursors.live & (accepted > most)).nonzero()[:, 0].tolist()
    if bad:
        expected = f"at most {int(most[bad[0]])} of the row's tokens"
        raise ValueError(describe("num_accepted_tokens", expected, f"{int(accepted[bad[0]])} at position {bad[0]}"))
    slots = cursors.slots[cursors.live].sort().values
    twice = slots[1:][slots[1:] == slots[:-1]]
    if len(twice):
        got = f"{int(twice[0])} more than once"
        raise ValueError(describe("state_batch_indices", "a slot of its own for each row", got))


def _build(
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
    rows = _Rows(pnat, place, src, cu_seqlens, ring, pad_slot_id, tokens, window, places)
    operands = (pnat, place, src, cu_seqlens, work_items, num_writes, *rows.scalars())
    key = _key(WorkItemsSpec, rows, work_items, num_writes)
    if key is not None:
        key += (work_items.shape[0] <= tuning.FEW_ROWS,)
    if _run_plan(key, operands):
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
    spec, config = WorkItemsSpec(**rows.spec()), tuning.choose_work_items(batch)
    if pnat.is_cuda:
        plan = runtime.get(spec, config, runtime.target(pnat.device))
        _plans.remember(key, plan)
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


_commit_eager, _commit_overload = _library.register(
    "serving_commit(Tensor(a!) prev_num_accepted_tokens, Tensor(b!) place, Tensor num_accepted_tokens, "
    "Tensor? state_batch_indices, Tensor? cu_seqlens, Tensor(c!)? rand_seed, Tensor? unallocated, bool ring, "
    "int pad_slot_id, int tokens, int window, int places) -> ()",
    _commit,
    lambda *_: None,
)
_build_eager, _build_overload = _library.register(
    "serving_build_work_items(Tensor prev_num_accepted_tokens, Tensor place, Tensor? state_batch_indices, "
    "Tensor? cu_seqlens, Tensor(a!) work_items, Tensor(b!) num_writes, bool ring, int pad_slot_id, int tokens, "
    "int window, int places) -> ()",
    _build,
    lambda *_: None,
)

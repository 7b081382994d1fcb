"""`commit`: the cursors of a batch after a step of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import describe
from cute_ssm.ops import _arguments as arguments
from cute_ssm.ops import _library
from cute_ssm.ops._calls import CallPath
from cute_ssm.ops._cursors.arguments import INTEGERS, NO_PAD, Rows, is_eager, places_of, plan_key, run_plan
from cute_ssm.ops.commit import reference
from cute_ssm.ops.commit.config import choose_commit
from cute_ssm.ops.commit.spec import CommitSpec
from cute_ssm.reference.cursors import Cursors


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
    place, sizes = places_of(window, cache_buf_idx, ring_start, ring_length, tokens, cu_seqlens, pad_slot_id)
    if rand_seed is not None and isinstance(rand_seed, Tensor) and rand_seed.dim() == 1:
        rand_seed = rand_seed[None]
    if state_batch_indices is None:
        sizes = (NO_PAD, *sizes[1:])
    run = _eager if is_eager(prev_num_accepted_tokens) else _overload
    run(
        prev_num_accepted_tokens, place, num_accepted_tokens, state_batch_indices, cu_seqlens, rand_seed, unallocated,
        ring_start is not None, *sizes,
    )  # fmt: skip


# Steady state: all that a kernel is chosen by, and what its own entry does not check before it launches.  The entry
# checks types, strides, alignment, and the equality of sizes; if it refuses, the arguments are examined one by one.
_path = CallPath()


def _run(
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
    rows = Rows(pnat, place, src, cu_seqlens, ring, pad_slot_id, tokens, window, places)
    mask = unallocated
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)  # as the kernel reads it
    operands = (pnat, place, accepted, src, cu_seqlens, seeds, mask, *rows.scalars())
    key = plan_key(CommitSpec, rows, accepted, seeds, unallocated)
    if run_plan(_path.plans, key, operands):
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
            plan = runtime.get(spec, choose_commit(), runtime.target(pnat.device))
            _path.plans.remember(key, plan)
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
        runtime.emulated(spec, choose_commit(), arch)(*operands)


def _check_accepted(accepted: Tensor, cursors: Cursors, unallocated: Tensor | None, pad_slot_id: int) -> None:
    """Raise on numbers that no step can have accepted, and on slots that no row or two rows may advance."""
    if unallocated is not None:
        advanced = cursors.active & (accepted >= 0)
        arguments.check_allocated("state_batch_indices", cursors.slots, unallocated, advanced, pad_slot_id)
    most = cursors.num_tokens.clamp(max=cursors.window)
    bad = (cursors.active & (accepted > most)).nonzero()[:, 0].tolist()
    if bad:
        expected = f"at most {int(most[bad[0]])} of the row's tokens"
        raise ValueError(describe("num_accepted_tokens", expected, f"{int(accepted[bad[0]])} at position {bad[0]}"))
    slots = cursors.slots[cursors.active].sort().values
    twice = slots[1:][slots[1:] == slots[:-1]]
    if len(twice):
        got = f"{int(twice[0])} more than once"
        raise ValueError(describe("state_batch_indices", "a slot of its own for each row", got))


_eager, _overload, _ = _library.register(
    "serving_commit(Tensor(a!) prev_num_accepted_tokens, Tensor(b!) place, Tensor num_accepted_tokens, "
    "Tensor? state_batch_indices, Tensor? cu_seqlens, Tensor(c!)? rand_seed, Tensor? unallocated, bool ring, "
    "int pad_slot_id, int tokens, int window, int places) -> ()",
    _run,
    lambda *_: None,
)

"""Slots, cursors, counts and offsets out of range in kernels of `cute_ssm.serving`, as they meet them on a GPU.

The host's checks of contents are off.  A row of the batch that holds such a number stays as it is, byte for byte, and
all others are right; see `out_of_range`.
"""

from __future__ import annotations

import cursor_cases as cursors
import kernel_backends
import materialize_cases as materialize
import materialize_gated_cases as gated
import out_of_range
import pytest
import torch
from bits import same_memory
from memory import copy
from out_of_range import check, outside

from cute_ssm import serving

SLOW = pytest.mark.slow
ROWS = 40


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    out_of_range.unchecked(monkeypatch)


def run(operator):
    def one(call):
        with kernel_backends.kernel(checks=False):
            return operator(**call)

    return one


def cursor_call(ring, varlen=True, indices=torch.int64):
    """Arguments of both functions for rows that all have tokens and slots, and where each of their slots is."""
    case = cursors.Case(batch=ROWS, ring=ring, varlen=varlen, indices=indices)
    call, _ = cursors.arguments(case)
    slots = torch.randperm(ROWS + case.spare, generator=torch.Generator().manual_seed(1))[:ROWS]
    call["state_batch_indices"] = slots.to(indices)
    name = "ring_start" if ring else "cache_buf_idx"
    places = call["ring_length"] if ring else 2
    call["prev_num_accepted_tokens"][slots] = (torch.arange(ROWS) * 5 % (case.window + 1)).int()
    call[name][slots] = (torch.arange(ROWS) * 7 % places).int()
    if varlen:
        call["cu_seqlens"] = (torch.arange(ROWS + 1) * 3).to(indices)
    return call, name, places


CURSORS = [(True, True), (False, True), (True, False)]


@pytest.mark.parametrize("ring,varlen", [CURSORS[0], CURSORS[1], pytest.param(*CURSORS[2], marks=SLOW)])
@pytest.mark.parametrize("indices", [torch.int64, pytest.param(torch.int32, marks=SLOW)])
def test_rows_of_a_commit(ring, varlen, indices):
    call, place, places = cursor_call(ring, varlen, indices)
    tokens = 3 if varlen else call["tokens"]
    slots, window = call["state_batch_indices"].tolist(), call["window"]
    call["num_accepted_tokens"] = (torch.arange(ROWS) % (tokens + 1)).to(indices)
    call["rand_seed"] = torch.arange(2 * len(call[place])).view(2, -1) + 100
    commit = run(serving.commit)

    def owned(slot):
        return [("prev_num_accepted_tokens", slot), (place, slot), ("rand_seed", (slice(None), slot))]

    values = outside(len(call[place]), indices, slots[0])
    check(commit, call, "state_batch_indices", dict(enumerate(values)), lambda b: owned(slots[b]))
    check(commit, call, "num_accepted_tokens", dict(enumerate(outside(tokens + 1, indices))), lambda b: owned(slots[b]))
    for name, bound in (("prev_num_accepted_tokens", window + 1), (place, places)):
        check(commit, call, name, dict(zip(slots, outside(bound, torch.int32))), owned)
    few = {**copy(call), "window": 2}  # fewer than a row has tokens
    few["prev_num_accepted_tokens"].clamp_(max=2)
    few["num_accepted_tokens"].clamp_(max=2)
    check(commit, few, "num_accepted_tokens", {0: 3, 2: tokens}, lambda b: owned(slots[b]))
    if varlen:
        spoil_offsets(commit, call, lambda b: owned(slots[b]))


def spoil_offsets(operator, call, owned):
    """Offsets that are negative, falling, or more than any step's tokens apart; two rows each."""
    first = call["cu_seqlens"].tolist()
    total, dtype = first[-1], call["cu_seqlens"].dtype
    for start in (0, 6):
        rows = range(1, ROWS - 1, 4)
        numbers = [[v for v in outside(total, dtype, first[at]) if v not in (total, total + 1)] for at in rows]
        changes = {at: values[i] for i, (at, values) in enumerate(zip(rows, numbers), start) if i < len(values)}
        if changes:
            check(operator, call, "cu_seqlens", changes, lambda at: (*owned(at - 1), *owned(at)))


def test_a_commit_of_windows_and_rings_near_the_end_of_32_bits():
    """Sums of cursors that do not fit 32 bits are not formed."""
    most = 2**31 - 1
    pnat = torch.tensor([5, most - 3, most - 9, 0], dtype=torch.int32)
    start = torch.tensor([most - 2, most - 1, most - 2, 0], dtype=torch.int32)
    call = {"prev_num_accepted_tokens": pnat, "ring_start": start, "window": most - 8, "ring_length": most, "tokens": 8}
    call |= {"num_accepted_tokens": torch.tensor([3, 3, 3, 3]), "state_batch_indices": torch.arange(4)}
    run(serving.commit)(call)
    assert pnat.tolist() == [8, most - 3, 3, 3], "slot 1 has more than the window, slot 2 writes"
    assert start.tolist() == [most - 2, most - 1, most - 11, 0]
    pnat, buffer = torch.tensor([most - 5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = {"prev_num_accepted_tokens": pnat, "cache_buf_idx": buffer, "window": most, "tokens": 8}
    run(serving.commit)({**call, "num_accepted_tokens": torch.tensor([3])})
    assert (pnat.tolist(), buffer.tolist()) == ([3], [1])


def test_a_commit_of_more_tokens_than_a_window_holds_changes_nothing():
    """A step may have more tokens than that, of which no more may be accepted."""
    pnat, buffer = torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    call = {"prev_num_accepted_tokens": pnat, "cache_buf_idx": buffer, "window": 4, "tokens": 20}
    run(serving.commit)({**call, "num_accepted_tokens": torch.tensor([4, 5, 20, 0])})
    assert (pnat.tolist(), buffer.tolist()) == ([4, 2, 3, 0], [1, 0, 0, 1])


@pytest.mark.parametrize("ring,varlen", [CURSORS[0], pytest.param(*CURSORS[1], marks=SLOW)])
@pytest.mark.parametrize("indices", [torch.int64, pytest.param(torch.int32, marks=SLOW)])
def test_rows_of_a_list_of_work(ring, varlen, indices):
    """They are listed like padding."""
    call, place, places = cursor_call(ring, varlen, indices)
    slots, build = call["state_batch_indices"].tolist(), run(serving.build_work_items)

    def listed(changed, rows):
        padded = copy(call)
        for row in rows:
            padded["state_batch_indices"][row] = call["pad_slot_id"]
        for want, got in zip(build(padded), build(changed)):
            same_memory(got, want, f"rows {rows}")

    for name, bound, dtype in (
        ("state_batch_indices", len(call[place]), indices),
        ("prev_num_accepted_tokens", call["window"] + 1, torch.int32),
        (place, places, torch.int32),
    ):
        by_slot, changed = name != "state_batch_indices", copy(call)
        values = outside(bound, dtype, slots[0])
        for row, value in enumerate(values):
            changed[name][slots[row] if by_slot else row] = value
        listed(changed, range(len(values)))
    for value in (-1, -(2**31), 2**31 - 1, *((2**32 + 9, -(2**63), 2**63 - 1) if indices is torch.int64 else ())):
        changed = copy(call)
        changed["cu_seqlens"][3] = value
        listed(changed, (2, 3))


@pytest.mark.parametrize(
    "fields", [{"state": "i8", "history": "ring"}, pytest.param({"state": "f16", "rows": 20}, marks=SLOW)], ids=str
)
def test_rows_of_a_materialisation(fields):
    case = materialize.Case(dstate=64, indices=torch.int64, place=True, **fields)
    made = materialize.random(case, 0)
    call = made["call"]
    src, cursor = call["state_batch_indices"], "ring_start" if case.history == "ring" else "cache_buf_idx"
    good = [b for b in range(len(src)) if src[b] != case.pad]
    slots, places = src.tolist(), case.rows if case.history == "ring" else 2
    names = [name for name in ("state", "state_scale") if call.get(name) is not None]
    fold = run(serving.materialize)

    def owned(slot):
        return [(name, slot) for name in names]

    def rounds(values):
        """All values, a few rows at a time; the last two rows are left as they are."""
        some = good[:-2]
        return [dict(zip(some, values[i : i + len(some)])) for i in range(0, len(values), len(some))]

    pending = call["prev_num_accepted_tokens"]
    for name, bound in (("state_batch_indices", len(pending)), ("dst_state_batch_indices", len(pending))):
        for changes in rounds(outside(bound, torch.int64, slots[good[0]])):
            check(fold, call, name, changes, lambda b: owned(slots[b]))
    for changes in rounds([v for v in outside(0, torch.int64, 1) if not 0 <= v < 3] + [65]):
        check(fold, call, "num_tokens", changes, lambda b: owned(slots[b]))
    for name, bound in (("prev_num_accepted_tokens", min(case.rows, 64) + 1), (cursor, places)):
        for changes in rounds(outside(bound, torch.int32)):
            check(fold, call, name, {slots[b]: value for b, value in changes.items()}, owned)


def test_destinations_are_compared_with_the_pool_that_is_written():
    """Which may have fewer slots than that which is read."""
    made = materialize.random(materialize.Case(dstate=64, dim=16, out="bf16", indices=torch.int64), 0)
    call = made["call"]
    written, read = len(call["out"]), len(call["state"])
    assert written < read
    src, dst = call["state_batch_indices"].tolist(), call["dst_state_batch_indices"].tolist()
    good = [b for b in range(len(src)) if -1 not in (src[b], dst[b])]
    changes = dict(zip(good, range(written, read)))
    check(run(serving.materialize), call, "dst_state_batch_indices", changes, lambda b: [("out", dst[b])])


@pytest.mark.parametrize("indices", [torch.int64, pytest.param(torch.int32, marks=SLOW)])
def test_rows_of_a_materialisation_of_gated_delta_nets(indices):
    case = gated.Case(place=True, pads=(), pending=(5, 16, 2, 13, 8), counts=(5, 9, 1, 1, 3), indices=indices)
    call = gated.arguments(case)
    slots, length = call["state_batch_indices"].tolist(), call["k_cache"].shape[2]
    fold = run(serving.materialize_gated_delta)

    def owned(slot):
        return [("initial_state", slot)]

    def rounds(values):
        return [dict(enumerate(values[i : i + 3])) for i in range(0, len(values), 3)]

    for name in ("state_batch_indices", "dst_state_batch_indices"):
        for changes in rounds(outside(len(call["initial_state"]), indices, slots[0])):
            check(fold, call, name, changes, lambda row: owned(slots[row]))
    for changes in rounds([value for value in outside(17, indices, 1) if not 0 <= value < 3]):
        check(fold, call, "num_tokens", changes, lambda row: owned(slots[row]))
    for name, bound in (("prev_num_accepted_tokens", case.window + 1), ("ring_start", length)):
        for changes in rounds(outside(bound, torch.int32)):
            check(fold, call, name, {slots[row]: value for row, value in changes.items()}, owned)

"""Indices, cursors, counts and offsets out of range, with the host's checks of contents off, as on a GPU.

One row of the batch holds one such number each.  The row's states, histories and outputs stay as they are, byte for
byte, where the number says what is read; where it says what is written, that alone is not.  All other rows are right,
bit for bit, and the emulator finds no access outside a tensor.
"""

from __future__ import annotations

import dataclasses
import functools

import checkpointing_cases
import gdn_cases
import kernel_backends
import out_of_range
import pytest
import replay_cases
import scan_cases
import token_cases
import torch
from out_of_range import Sweep, outside, swap

import cute_ssm
from cute_ssm.ops.checkpointing_ssu.config import PAIR
from cute_ssm.ops.selective_scan import operator as selective_scan

ROWS = 13  # of a batch: more than there are numbers in `outside`
ARCHES = ("sm_90a", pytest.param("sm_100a", marks=pytest.mark.slow))
SLOW = pytest.mark.slow
PLAN = selective_scan.plan_on_cpu


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    out_of_range.unchecked(monkeypatch)


@pytest.fixture(params=ARCHES)
def run(request):
    """Run an operator of this package on a call in the emulator."""

    def of(operator):
        def one(call):
            with kernel_backends.kernel(request.param, checks=False):
                return operator(**call)

        return one

    return of


def at(values, first=0, step=1):
    """Values by position: row `first` gets the first one, and the next every `step` rows."""
    return {first + i * step: value for i, value in enumerate(values)}


def fill(call, name, seed=0):
    """Random values for a whole pool, and scales if it has some."""
    g = torch.Generator().manual_seed(seed)
    tensor = call[name]
    tensor.copy_((8 * torch.randn(tensor.shape, generator=g)).to(tensor.dtype))
    scale = name.replace("state", "state_scale") if name == "state" else None
    if scale in call:
        call[scale].copy_(torch.rand(call[scale].shape, generator=g))


# ---------------------------------------------------------------------------------------------- selective_state_update
def step_owned(call, packed=False):
    """Parts of a sequence: its destination, with scales, and its outputs."""

    def of(b, out=True):
        target = call.get("dst_state_batch_indices", call.get("state_batch_indices"))[b]
        slots = [s for s in target.reshape(-1).tolist() if s >= 0]
        yield from ((name, slots) for name in ("state", "state_scale") if name in call)
        if "intermediate_state_indices" in call:
            line = int(call["intermediate_state_indices"][b])
            names = ("intermediate_states_buffer", "intermediate_state_scales")
            yield from ((name, line) for name in names if name in call)
        if out:
            cu = call.get("cu_seqlens")
            yield "out", b if cu is None else slice(int(cu[b]), int(cu[b + 1]))

    return of


def step_call(**changes):
    case = {"nheads": 1, "indices": torch.int64, "pads": (), "lengths": (1,) * ROWS, "state": "i8", **changes}
    call = token_cases.arguments(token_cases.Tokens(**case))
    fill(call, "state")
    last = call["state"].shape[0] - 1
    if call["state_batch_indices"].dim() == 1:  # the first and the last slot are used, by the last two rows
        for row, slot in ((-1, 0), (-2, last)):
            names = [n for n in ("state_batch_indices", "dst_state_batch_indices") if n in call]
            swap(call, ("state", "state_scale"), names, int(call["state_batch_indices"][row]), slot)
    return call


ONE = {
    "quantised": {"destination": "vector"},
    "in_place": {"state": "f16"},
    "int32": {"destination": "vector", "indices": torch.int32, "state": "f32"},
    "stochastic": {"state": "f16", "rounds": 2, "seed_per_slot": True},
    "products": {"lengths": (3,) * ROWS, "state": "bf16", "destination": "vector"},
    "loop": {"lengths": (3,) * ROWS, "layout": "dense", "destination": "vector", "state": "f8"},
}


@pytest.mark.parametrize("form", [name if name == "quantised" else pytest.param(name, marks=SLOW) for name in ONE])
def test_slots_of_a_selective_state_update(form, run):
    call = step_call(**ONE[form])
    slots, dtype = call["state"].shape[0], call["state_batch_indices"].dtype
    first = int(call["state_batch_indices"][0])
    update, owned = Sweep(run(cute_ssm.selective_state_update), call), step_owned(call)
    update.check("state_batch_indices", at(outside(slots, dtype, first)), owned)
    if "dst_state_batch_indices" in call:  # outputs do not depend on where the state goes
        first = int(call["dst_state_batch_indices"][0])
        values = at(outside(slots, dtype, first))
        update.check("dst_state_batch_indices", values, functools.partial(owned, out=False))


def test_outputs_of_slots_out_of_range_are_zero_where_the_operator_allocates_them(run):
    call = step_call(destination="vector", give_out=False)
    assert call.get("out") is None
    values = outside(call["state"].shape[0], torch.int64)
    call["state_batch_indices"][: len(values)] = torch.tensor(values)
    out = run(cute_ssm.selective_state_update)(call)
    assert not out[: len(values)].any()
    assert out[len(values) :].any()


def sequences_call(**changes):
    """Sequences with two columns of destinations that start from one of three states."""
    case = {"lengths": (2,) * ROWS, "packed": True, "accepted": True, "destination": "matrix", "state": "f16"}
    call = step_call(**{**case, **changes})
    call["num_accepted_tokens"] = torch.ones(len(call["state_batch_indices"]), dtype=torch.int64)
    return call


@pytest.mark.parametrize(
    "form", [{}, pytest.param({"state": "i8"}, marks=SLOW), pytest.param({"rounds": 3}, marks=SLOW)]
)
def test_columns_offsets_and_destinations_of_sequences(form, run):
    call = sequences_call(**form)
    slots, columns = call["state"].shape[0], call["state_batch_indices"].shape[1]
    update, owned = Sweep(run(cute_ssm.selective_state_update), call), step_owned(call)
    beyond = [v for v in outside(columns + 1, torch.int64, 1) if v > 0]
    update.check("num_accepted_tokens", at(beyond), owned)
    below = [v for v in outside(columns + 1, torch.int64, 1) if v <= 0]
    update.check("num_accepted_tokens", at([*below, 0]), lambda b: ())  # column 0, as documented
    src = {(b, 0): v for b, v in at(outside(slots, torch.int64, int(call["state_batch_indices"][0, 0]))).items()}
    update.check("state_batch_indices", src, lambda at: owned(at[0]))
    dst = {
        (b, b % 2): v for b, v in at(outside(slots, torch.int64, int(call["dst_state_batch_indices"][0, 0]))).items()
    }

    def destination(at):
        slot = int(call["dst_state_batch_indices"][at])
        return [(name, slot) for name in ("state", "state_scale") if name in call and slot >= 0]

    update.check("dst_state_batch_indices", dst, destination)
    offsets(update, "cu_seqlens", len(call["x"]), owned)


def offsets(sweep, name, total, owned):
    """Offsets out of range spoil the sequences on both sides of them; half of the numbers at a time."""
    starts = sweep.call[name].tolist()
    for some in (slice(0, 6), slice(6, None)):
        places = range(1, len(starts) - 1, 2)
        values = [outside(total + 1, torch.int64, starts[place]) for place in places]
        changes = {place: numbers[i] for place, numbers, i in zip(places, values, range(11)[some])}
        sweep.check(name, changes, lambda place: (*owned(place - 1), *owned(place)))


@pytest.mark.parametrize("state", ["i8", pytest.param("bf16", marks=SLOW)])
def test_rows_of_intermediate_states(state, run):
    call = step_call(lengths=(2,) * ROWS, destination="intermediates", state=state)
    lines = call["intermediate_states_buffer"].shape[0]
    first = int(call["intermediate_state_indices"][0])

    def owned(b):
        line = int(call["intermediate_state_indices"][b])
        names = ("intermediate_states_buffer", "intermediate_state_scales")
        return [(name, line) for name in names if name in call]

    values = at(outside(lines, torch.int64, first))
    Sweep(run(cute_ssm.selective_state_update), call).check("intermediate_state_indices", values, owned)


# --------------------------------------------------------------------------------------------------- checkpointing_ssu
HISTORY = {
    "double": ("old_x", "old_B", "old_dt", "old_cumAdt"),
    "double_x": ("old_x", "old_B", "old_dt", "old_cumAdt"),
    "ring": ("x_cache", "B_cache", "dt_cache"),
}


def checkpointing(case):
    return cute_ssm.checkpointing_ssu_ring if case.ring else cute_ssm.checkpointing_ssu


def slot_parts(case, call, slot):
    names = (*HISTORY[case.history], "state", "state_scale")
    return [(name, slot) for name in names if name in call]


def checkpointing_case(**changes):
    return checkpointing_cases.Case(**{"batch": ROWS, "nheads": 1, "pads": (), "indices": torch.int64, **changes})


CHECKPOINTING = [
    {"history": "ring", "state": "bf16", "tokens": 3},
    {"state": "i8", "tokens": 2},
    {"history": "double_x", "state": "f16", "rounds": 2, "seed_per_slot": True},
    {"history": "ring", "state": "f8", "slack": 3, "indices": torch.int32, "nheads": 4},
    {"history": "ring", "state": "f32", "tokens": 12, "window": 20},
]


@pytest.mark.parametrize("form", [CHECKPOINTING[0], *(pytest.param(c, marks=SLOW) for c in CHECKPOINTING[1:])], ids=str)
def test_slots_and_cursors_of_a_checkpointed_step(form, run):
    case = checkpointing_case(**form)
    call = checkpointing_cases.arguments(case)
    step, indices = Sweep(run(checkpointing(case)), call), call["state_batch_indices"]
    slots = indices.tolist()
    values = outside(call["state"].shape[0], indices.dtype, slots[0])
    step.check("state_batch_indices", at(values), lambda b: [*slot_parts(case, call, slots[b]), ("out", b)])

    def owned(slot):
        return [*slot_parts(case, call, slot), ("out", slots.index(slot))]

    cursor = case.names[4]
    end = case.rows if case.ring else 2
    for name, bound in ((cursor, end), ("prev_num_accepted_tokens", case.window + 1)):
        step.check(name, dict(zip(slots, outside(bound, torch.int32))), owned)
        for good in (0, bound - 1):
            edge = {**call, name: torch.where(call[name] == checkpointing_cases.UNUSED, call[name], good)}
            Sweep(step.run, edge).check(name, {slots[0]: -1, slots[2]: bound}, owned)


@pytest.mark.parametrize("form", [{}, pytest.param({"history": "ring"}, marks=SLOW)], ids=str)
def test_offsets_of_packed_checkpointed_steps(form, run):
    case = checkpointing_case(lengths=(2,) * ROWS, tokens=3, state="f16", **form)
    call = checkpointing_cases.arguments(case)
    slots, cu = call["state_batch_indices"].tolist(), call["cu_seqlens"]

    def owned(b):
        return [*slot_parts(case, call, slots[b]), ("out", (0, slice(int(cu[b]), int(cu[b + 1]))))]

    offsets(Sweep(run(checkpointing(case)), call), "cu_seqlens", call["x"].shape[1], owned)


@pytest.mark.parametrize("form", [{}, pytest.param({"history": "ring", "state": "i8"}, marks=SLOW)], ids=str)
def test_work_items_of_a_checkpointed_step(form, run):
    case = checkpointing_case(items=True, accepted=(0, 13, 5, 16), **form)
    call = checkpointing_cases.arguments(case)
    items, step = call["work_items"].tolist(), Sweep(run(checkpointing(case)), call)

    def owned(at):
        b, slot, _, _ = items[at[0]]
        return [*slot_parts(case, call, slot), ("out", b)]

    bounds = (case.batch, call["state"].shape[0], case.window + 1, case.rows if case.ring else 2)
    for column, bound in enumerate(bounds):
        values = {(row, column): value for row, value in at(outside(bound, torch.int32), step=1).items()}
        step.check("work_items", values, owned)


def test_number_of_writes_out_of_range(run):
    """It counts as 0, or as the whole batch: rows on its wrong side are left alone."""
    case = checkpointing_case(batch=5, items=True, accepted=(0, 16))
    call = checkpointing_cases.arguments(case)
    items, writes, every = call["work_items"].tolist(), int(call["num_writes"]), range(case.batch)
    assert 0 < writes < case.batch

    def owned(rows, _):
        return [
            part for b, slot, _, _ in (items[i] for i in rows) for part in (*slot_parts(case, call, slot), ("out", b))
        ]

    with cute_ssm.tuning.override(form=PAIR):
        step = Sweep(run(checkpointing(case)), call)
        for value in outside(case.batch + 1, torch.int32):
            rows = every[:writes] if value < 0 else every[writes:]
            step.check("num_writes", {0: value}, functools.partial(owned, rows))


# ---------------------------------------------------------------------------------------------------- gated delta rule
GATED = {
    "tokens": {"tokens": 3},
    "products_of_one": {"tokens": 8, "state": "bf16", "out": "bf16"},
    "sequential": {"tokens": 1},
    "int32": {"tokens": 4, "indices": torch.int32, "V": 128, "ratio": 2},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "form", [name if name in ("tokens", "sequential") else pytest.param(name, marks=SLOW) for name in GATED]
)
def test_slots_and_counts_of_the_gated_delta_rule(form, run):
    fields = {"batch": ROWS, "ratio": 1, "K": 64, "pads": (), "indices": torch.int64, **GATED[form]}
    case = gdn_cases.Case(**{**fields, "mode": "accepted_split"})
    call = gdn_cases.arguments(case)
    rule, slots = Sweep(run(cute_ssm.gated_delta_rule_mtp), call), call["initial_state"].shape[0]
    sources, targets = (call[f"{name}_state_indices"] for name in ("initial", "output"))

    def owned(i, out=True):
        target = int(targets[i])
        return [*([("initial_state", target)] if target >= 0 else []), *([("output", i)] if out else [])]

    values = at(outside(slots, case.indices, int(sources[0])))
    rule.check("initial_state_indices", values, owned)
    values = at(outside(slots, case.indices, int(targets[0])))
    rule.check("output_state_indices", values, functools.partial(owned, out=False))
    values = at(outside(case.tokens + 1, case.indices, int(call["accepted_steps"][0])))
    rule.check("accepted_steps", values, owned)
    for mode in ("scatter", "buffer_update"):
        spoil_other_destinations(dataclasses.replace(case, mode=mode), rule.run)


def spoil_other_destinations(case, run):
    call = gdn_cases.arguments(case)
    rule = Sweep(run, call)
    slots, sources = call["initial_state"].shape[0], call["initial_state_indices"].tolist()

    def owned(i):
        parts = [("output", i)]
        if case.mode == "buffer_update":
            return [*parts, ("intermediate_states_buffer", i), ("initial_state", sources[i])]
        return [*parts, *(("initial_state", int(s)) for s in call["ssm_state_indices"][i] if s >= 0)]

    rule.check("initial_state_indices", at(outside(slots, case.indices, sources[0])), owned)
    if case.mode == "scatter":
        targets = call["ssm_state_indices"]
        values = at(outside(slots, case.indices, int(targets[0, 0])))
        values = {(i, i % case.tokens): value for i, value in values.items()}
        slot = {place: int(targets[place]) for place in values}
        rule.check("ssm_state_indices", values, lambda at: [("initial_state", slot[at])] if slot[at] >= 0 else [])


@pytest.mark.parametrize("form", [{}, pytest.param({"tokens": 20, "mode": "buffer_update"}, marks=SLOW)], ids=str)
def test_offsets_of_packed_requests(form, run):
    """Of a request whose offsets are out of range, or too far apart, nothing is read or written."""
    fields = {"tokens": 3, "K": 16, "V": 16, "ratio": 1, "pads": (), "indices": torch.int64, "mode": "accepted", **form}
    case = gdn_cases.Case(batch=ROWS, lengths=(2,) * ROWS, **fields)
    call = gdn_cases.arguments(case)
    slots, starts = call["initial_state_indices"].tolist(), call["cu_seqlens"].tolist()

    def owned(i):
        buffer = [("intermediate_states_buffer", i)] if "intermediate_states_buffer" in call else []
        return [("initial_state", slots[i]), ("output", (0, slice(starts[i], starts[i + 1]))), *buffer]

    rule = Sweep(run(cute_ssm.gated_delta_rule_mtp), call)
    offsets(rule, "cu_seqlens", call["q"].shape[1], owned)
    far = case.tokens // 2 * 2  # with two more, a request exceeds max_seqlen, and the next one has no tokens left
    longer = {i: starts[i] + far for i in range(1, ROWS - far // 2, 4)}
    rule.check("cu_seqlens", longer, lambda i: [*owned(i - 1), *owned(i)])


REPLAY = [{}, {"tokens": 5, "state": "bf16", "out": "bf16", "K": 128, "indices": torch.int32}]


@pytest.mark.parametrize("form", [REPLAY[0], pytest.param(REPLAY[1], marks=SLOW)], ids=str)
def test_slots_and_cursors_of_the_gated_delta_rule_replay(form, run):
    fields = {"batch": ROWS, "ratio": 1, "K": 64, "pads": (), "indices": torch.int64, "window": 8, "tokens": 2}
    case = replay_cases.Case(pending=(5, 8, 0, 7), **{**fields, **form})
    call = replay_cases.arguments(case)
    replay, slots = Sweep(run(cute_ssm.gated_delta_rule_replay), call), call["initial_state_indices"].tolist()

    def parts(slot):
        return [(name, slot) for name in ("initial_state", *replay_cases.RINGS)] + [("output", slots.index(slot))]

    values = at(outside(call["initial_state"].shape[0], case.indices, slots[0]))
    replay.check("initial_state_indices", values, lambda i: parts(slots[i]))
    for name, bound in (("ring_start", call["k_cache"].shape[2]), ("prev_num_accepted_tokens", case.window + 1)):
        replay.check(name, dict(zip(slots, outside(bound, torch.int32))), parts)


# ------------------------------------------------------------------------------------------------------ selective_scan
@pytest.mark.parametrize("form", [{}, pytest.param({"io": "f16", "dim": 8}, marks=SLOW)], ids=str)
@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=SLOW)])
def test_slots_and_offsets_of_a_scan(form, splits, run):
    length = 5 if splits == 1 else 24
    fields = {"lengths": (length,) * ROWS, "varlen": True, "indices": torch.int64, "nulls": (), "in_place": False}
    call = scan_cases.arguments(scan_cases.Case(**{"dim": 8, **fields, **form}))
    call["query_start_loc"] = starts = call["query_start_loc"].long()
    slots = call["cache_indices"].tolist()

    def owned(b):
        return [("ssm_states", slots[b]), ("out", (slice(None), slice(int(starts[b]), int(starts[b + 1]))))]

    with cute_ssm.tuning.override(splits=splits):
        scan = Sweep(run(cute_ssm.selective_scan), call)
        values = at(outside(call["ssm_states"].shape[0], torch.int64, slots[0]))
        scan.check("cache_indices", values, owned)
        offsets(scan, "query_start_loc", call["u"].shape[-1], owned)


@pytest.mark.parametrize("chunks", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("indices", [torch.int64, pytest.param(torch.int32, marks=SLOW)])
def test_blocks_and_chunks_of_a_scan(chunks, indices, run):
    """Every sequence has two chunks, the first of which ends a block."""
    size = 8
    case = scan_cases.Case(
        lengths=(11,) * ROWS, varlen=True, dim=8, indices=indices, nulls=(), in_place=False, block_size=size,
        computed=(3, 8) * (ROWS // 2) + (3,), chunks=chunks,
    )  # fmt: skip
    call = scan_cases.arguments(case)
    scan, table, starts = Sweep(run(cute_ssm.selective_scan), call), call["cache_indices"], call["query_start_loc"]

    def owned(b):
        return [("ssm_states", table[b].tolist()), ("out", (slice(None), slice(int(starts[b]), int(starts[b + 1]))))]

    for name in ("block_idx_first_scheduled_token", "block_idx_last_scheduled_token", "initial_state_idx"):
        scan.check(name, at(outside(table.shape[1], indices, int(call[name][0]))), owned)
    initial, last = call["initial_state_idx"].tolist(), call["block_idx_last_scheduled_token"].tolist()
    values = at(outside(len(call["ssm_states"]), indices, int(table[0, initial[0]])))
    scan.check("cache_indices", {(b, initial[b]): v for b, v in values.items()}, lambda at: owned(at[0]))
    places = {b: (b, last[b]) for b in values if last[b] != initial[b]}
    assert places
    # where the last state goes is not what the scan starts from: outputs and other states are right
    scan.check(
        "cache_indices", {place: values[b] for b, place in places.items()},
        lambda at: [("ssm_states", int(table[at]))],
    )  # fmt: skip
    if not chunks:
        return
    count = len(call["cu_chunk_seqlen"]) - 1
    ends, last = call["cu_chunk_seqlen"].tolist(), call["last_chunk_indices"].tolist()
    inner = [first + 1 for first in (0, *(n + 1 for n in last[:-1]))]  # the end of each sequence's first chunk
    values = [*outside(call["u"].shape[-1] + 1, indices, ends[inner[0]]), ends[inner[-1] - 1]]
    scan.check("cu_chunk_seqlen", dict(zip(inner, values)), lambda at: owned(inner.index(at)))
    values = [[v for v in outside(count, indices, last[b]) if v != -1] for b in range(0, ROWS - 1, 2)]
    changes = {2 * i: numbers[i] for i, numbers in enumerate(values)}
    scan.check("last_chunk_indices", changes, lambda b: (*owned(b), *owned(b + 1)))


@pytest.mark.parametrize("tokens", [8, 2**31 - 1])
def test_blocks_of_as_many_tokens_as_32_bits_hold(tokens, backend):
    """The first of three chunks completes a block, and the second is in the next one."""
    case = scan_cases.Case(
        lengths=(11,), varlen=True, dim=8, nulls=(), in_place=False, block_size=8, computed=(8,), chunks=True
    )
    call = scan_cases.arguments(case)
    call["cu_chunk_seqlen"] = torch.tensor([0, 3, 5, 11], dtype=torch.int32)
    call |= {"block_size": tokens, "last_chunk_indices": torch.tensor([2], dtype=torch.int32)}
    for name, column in (("first_scheduled_token", 0), ("last_scheduled_token", 2)):
        call[f"block_idx_{name}"] = torch.tensor([column], dtype=torch.int32)
    call["ssm_states"][call["cache_indices"][0, 1:]] = float("nan")
    wanted = out_of_range.copy(call)
    saved = [int(slot) for slot in call["cache_indices"][0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "plan_on_cpu", PLAN)
        cute_ssm.selective_scan(**wanted)
    with backend(checks=False):
        cute_ssm.selective_scan(**call)
    assert torch.allclose(call["ssm_states"][saved], wanted["ssm_states"][saved], rtol=1e-5, atol=1e-6)

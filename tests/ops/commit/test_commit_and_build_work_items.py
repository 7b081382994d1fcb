"""`serving.commit` and `build_work_items`: against plain loops, on reference and emulator; every bad argument."""

from __future__ import annotations

import pytest
import torch
from bits import each_same_bits
from cursor_cases import CASES, GARBAGE, Case, arguments, verify
from kernel_backends import both

from cute_ssm import arch as archs
from cute_ssm import runtime, serving, tuning
from cute_ssm.ops.build_work_items.spec import WorkItemsSpec
from cute_ssm.ops.commit.spec import CommitSpec


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    for seed in range(3):
        verify(case, seed)


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case, backend):
    with backend() as session:
        verify(case)
    assert len(session.launches) == 2


@pytest.mark.thin(5)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("batch", [31, 32, 33, 127, 128, 129, 1000, 1024, 1025, 2100])
def test_emulated_sizes(batch, arch, backend):
    with backend(arch):
        verify(Case(batch=batch, ring=batch % 2 == 0), batch)


@pytest.mark.wide
def test_a_large_batch(backend):
    with backend():
        verify(Case(batch=8192))


@pytest.mark.parametrize("warps", [1, 2, 32])
def test_bits_do_not_depend_on_the_config(warps, backend):
    with backend(schedule=warps), tuning.override(warps=warps):
        verify(Case(batch=200))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "spec",
    [
        CommitSpec(True, "int64", "int32", "int32", True),
        CommitSpec(False, None, None, "int64", False),
        WorkItemsSpec(True, "int64", "int32"),
        WorkItemsSpec(False, None, None),
    ],
    ids=lambda spec: spec.text(),
)
def test_nothing_spills(spec, arch):
    compiled = runtime.emulated(spec, None, archs.by_name(arch))
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


def test_results_are_written_where_they_are_wanted():
    call, _ = arguments(Case(batch=10))
    items, count = torch.full((10, 4), GARBAGE, dtype=torch.int32), torch.full((1,), GARBAGE, dtype=torch.int32)
    got = serving.build_work_items(**call, work_items=items, num_writes=count)
    assert got[0] is items and got[1] is count and not (items == GARBAGE).any() and count.item() >= 0


@both
def test_an_empty_batch(backend):
    call, _ = arguments(Case(batch=0))
    with backend():
        items, count = serving.build_work_items(**call)
        serving.commit(num_accepted_tokens=torch.zeros(0, dtype=torch.int32), **call)
    assert items.shape == (0, 4) and count.tolist() == [0]


def test_without_indices_no_row_is_padding():
    pnat, start = torch.zeros(2, 3, dtype=torch.int32)
    call = {"ring_start": start, "ring_length": 22, "window": 16, "tokens": 6, "pad_slot_id": 1}
    serving.commit(pnat, torch.tensor([1, 2, 3]), **call)
    assert pnat.tolist() == [1, 2, 3]


def test_a_step_of_one_slot_in_words():
    """Window 16, six tokens a step: appended until 12 are pending, which are folded while six more are added."""
    pnat, buffer = torch.tensor([0], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    seen = []
    for accepted in (6, 6, 3, 1, 5, 2):
        call = {"window": 16, "tokens": 6, "cache_buf_idx": buffer}
        serving.commit(pnat, torch.tensor([accepted]), **call)
        seen.append((pnat.item(), buffer.item()))
    assert seen == [(6, 0), (12, 0), (3, 1), (4, 1), (9, 1), (11, 1)]


BAD = {
    "prev_num_accepted_tokens: expected dtype int32": {"prev_num_accepted_tokens": torch.zeros(45)},
    "prev_num_accepted_tokens: expected shape": {"prev_num_accepted_tokens": torch.zeros(45, 1, dtype=torch.int32)},
    "prev_num_accepted_tokens: expected values from 0 to 16": {
        "prev_num_accepted_tokens": torch.full((45,), 17, dtype=torch.int32)
    },
    "cache_buf_idx: expected values from 0 to 1": {"cache_buf_idx": torch.full((45,), 2, dtype=torch.int32)},
    "cache_buf_idx: expected shape": {"cache_buf_idx": torch.zeros(44, dtype=torch.int32)},
    "cache_buf_idx: expected dtype": {"cache_buf_idx": torch.zeros(45, dtype=torch.int64)},
    "cache_buf_idx: expected a tensor, or ring_start": {"cache_buf_idx": None},
    "cache_buf_idx: expected a torch.Tensor": {"cache_buf_idx": 1},
    "ring_start: expected None with": {"ring_start": torch.zeros(45, dtype=torch.int32)},
    "ring_length: expected None without": {"ring_length": 22},
    "ring_length: expected at least 22, got 21": {
        "cache_buf_idx": None, "ring_start": torch.zeros(45, dtype=torch.int32), "ring_length": 21,
    },
    "ring_length: expected at least 22, got None": {
        "cache_buf_idx": None, "ring_start": torch.zeros(45, dtype=torch.int32),
    },
    "ring_start: expected values from 0 to 21": {
        "cache_buf_idx": None, "ring_start": torch.full((45,), 22, dtype=torch.int32), "ring_length": 22,
    },
    "window: expected at least 1": {"window": 0},
    "tokens: expected at least 1": {"tokens": 0},
    "tokens: expected a number, or cu_seqlens instead, got neither": {"tokens": None},
    "tokens: expected a number, or cu_seqlens instead, got both": {"cu_seqlens": torch.arange(41)},
    "cu_seqlens: expected non-decreasing": {"tokens": None, "cu_seqlens": torch.arange(41).flip(0)},
    "cu_seqlens: expected shape": {"tokens": None, "cu_seqlens": torch.arange(41)[None]},
    "expected shape (batch,) = (41,), got (40,)": {"tokens": None, "cu_seqlens": torch.arange(42)},
    "cu_seqlens: expected dtype": {"tokens": None, "cu_seqlens": torch.arange(41.0)},
    "cu_seqlens: expected at most 6 tokens": {
        "tokens": None, "cu_seqlens": torch.arange(0, 7 * 41, 7), "cache_buf_idx": None, "ring_length": 22,
        "ring_start": torch.zeros(45, dtype=torch.int32),
    },
    "state_batch_indices: expected indices in": {"state_batch_indices": torch.arange(6, 46)},
    "state_batch_indices: expected dtype": {"state_batch_indices": torch.arange(40.0)},
    "state_batch_indices: expected shape": {"state_batch_indices": torch.arange(40)[None]},
}  # fmt: skip
BAD_COMMITS = {
    "prev_num_accepted_tokens: expected elements": {
        "prev_num_accepted_tokens": torch.zeros(1, dtype=torch.int32).expand(45)
    },
    "state_batch_indices: expected a slot of its own": {"state_batch_indices": torch.zeros(40, dtype=torch.int32)},
    "num_accepted_tokens: expected at most 6": {"num_accepted_tokens": torch.full((40,), 7)},
    "num_accepted_tokens: expected at most 2": {"window": 2, "num_accepted_tokens": torch.full((40,), 3)},
    "num_accepted_tokens: expected dtype": {"num_accepted_tokens": torch.zeros(40)},
    "num_accepted_tokens: expected shape": {"num_accepted_tokens": torch.zeros(40, 1, dtype=torch.int32)},
    "num_accepted_tokens: expected a torch.Tensor": {"num_accepted_tokens": [1] * 40},
    "rand_seed: expected dtype": {"rand_seed": torch.zeros(2, 45)},
    "rand_seed: expected shape": {"rand_seed": torch.zeros(2, 44, dtype=torch.int64)},
    "rand_seed: expected stride 1": {"rand_seed": torch.zeros(45, 2, dtype=torch.int64).T},
    "rand_seed: expected elements": {"rand_seed": torch.zeros(1, 45, dtype=torch.int64).expand(2, 45)},
    "at least batch = 40 slots, got 39": {
        "state_batch_indices": None, "prev_num_accepted_tokens": torch.zeros(39, dtype=torch.int32),
        "cache_buf_idx": torch.zeros(39, dtype=torch.int32),
    },
}  # fmt: skip
BAD_LISTS = {
    "pad_slot_id: expected a number of 32 bits": {"pad_slot_id": 2**31},
    "pad_slot_id: expected a slot that no row uses": {"pad_slot_id": 39, "state_batch_indices": None, "batch": 40},
    "batch: expected a number of rows": {"state_batch_indices": None},
    "work_items: expected dtype": {"work_items": torch.zeros(40, 4)},
    "work_items: expected shape": {"work_items": torch.zeros(40, 3, dtype=torch.int32)},
    "work_items: expected contiguous": {"work_items": torch.zeros(40, 8, dtype=torch.int32)[:, :4]},
    "work_items: expected at least batch = 41 rows": {"batch": 41, "work_items": torch.zeros(40, 4, dtype=torch.int32)},
    "num_writes: expected shape": {"num_writes": torch.zeros(2, dtype=torch.int32)},
    "num_writes: expected dtype": {"num_writes": torch.zeros(1, dtype=torch.int64)},
    "state_batch_indices: expected shape (batch,) = (41,)": {"work_items": torch.zeros(41, 4, dtype=torch.int32)},
}


def base():
    return {
        "prev_num_accepted_tokens": torch.zeros(45, dtype=torch.int32),
        "cache_buf_idx": torch.zeros(45, dtype=torch.int32),
        "state_batch_indices": torch.arange(40),
        "window": 16,
        "tokens": 6,
    }


def check_refused(function, call, message):
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    assert message in str(caught.value)
    each_same_bits(call, before)


@pytest.mark.parametrize("message", [*BAD, *BAD_COMMITS])
def test_bad_arguments_of_commit(message):
    change = {**BAD, **BAD_COMMITS}[message]
    check_refused(
        serving.commit, {**base(), "num_accepted_tokens": torch.ones(40, dtype=torch.int32), **change}, message
    )


@pytest.mark.parametrize("message", [*BAD, *BAD_LISTS])
def test_bad_arguments_of_build_work_items(message):
    check_refused(serving.build_work_items, {**base(), **{**BAD, **BAD_LISTS}[message]}, message)


def test_registered_with_pytorch():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(pnat, buffer, accepted, slots):
        items, count = serving.build_work_items(
            pnat, cache_buf_idx=buffer, window=16, tokens=6, state_batch_indices=slots
        )
        serving.commit(pnat, accepted, cache_buf_idx=buffer, window=16, tokens=6, state_batch_indices=slots)
        return items, count

    pnat, buffer = torch.tensor([14, 3], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
    items, count = step(pnat, buffer, torch.tensor([2, 4]), torch.tensor([1, 0]))
    assert items.tolist() == [[1, 0, 14, 1], [0, 1, 3, 1]] and count.tolist() == [1]
    assert pnat.tolist() == [4, 5] and buffer.tolist() == [0, 1]

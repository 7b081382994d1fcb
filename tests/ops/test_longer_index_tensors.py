"""Index and count tensors with more rows than the batch, as CUDA graphs keep them: the first rows count."""

from __future__ import annotations

import dataclasses
import sys
from copy import deepcopy
from pathlib import Path

import checkpointing_cases
import gdn_cases
import pytest
import replay_cases
import scan_cases
import token_cases
import torch
from step_cases import copy

import cute_ssm
from cute_ssm import serving
from cute_ssm.ops import _arguments
from cute_ssm.ops.checkpointing_ssu import operator as checkpointing
from cute_ssm.ops.gated_delta_rule_mtp import operator as gated_delta
from cute_ssm.ops.gated_delta_rule_replay import operator as replay
from cute_ssm.ops.selective_state_update import operator as step

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from test_serving_cursors import Case as Cursors
from test_serving_cursors import arguments as cursor_arguments
from test_serving_materialize import Case as Materialize
from test_serving_materialize import random as materialize_arguments

GARBAGE = 2**31 - 1
CHECKPOINTING = checkpointing_cases.Case(accepted=(7, 5, 14))
COLUMNS = token_cases.Tokens(accepted=True, destination="matrix", packed=True, lengths=(3, 1, 2))
SAVED = token_cases.Tokens(destination="intermediates")
BLOCKS = scan_cases.Case(lengths=(9, 4), varlen=True, nulls=(), block_size=4, computed=(0, 8), in_place=False)


def gated(mode):
    return gdn_cases.arguments(gdn_cases.Case(mode=mode, batch=3))


def commit(ring=False, **fields):
    call, counts = cursor_arguments(Cursors(batch=6, ring=ring, **fields))
    return {**call, "num_accepted_tokens": counts.int()}


def listed(**fields):
    call = cursor_arguments(Cursors(batch=6, **fields))[0]
    return {**call, "work_items": torch.zeros(6, 4, dtype=torch.int32), "num_writes": torch.zeros(1).int()}


def of_pool(method):
    """A method of a pool, called with the pool among its arguments."""

    def call(pool, **arguments):
        return getattr(pool, method)(**arguments)

    return call


def pool_call(packed=False, **more):
    """Arguments of a pool's methods, the slots of the batch among them, and its cursors, which a commit writes."""
    pool = serving.StatePool.gated_delta(1, 5, heads=1, value_heads=1, K=64, V=64, window=8, tokens=3)
    slots = torch.tensor([pool.allocate(), -1, pool.allocate()])
    call = {"pool": pool, "state_batch_indices": slots}
    if packed:
        call["cu_seqlens"] = torch.tensor([0, 3, 3, 5])
    return call | {name: value.clone() for name, value in more.items()}


# operator, arguments, and which of them have a row for each sequence
CALLS = {
    "step": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(token_cases.Tokens(destination="vector")),
        ("state_batch_indices", "dst_state_batch_indices"),
    ),
    "step, matrices": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(COLUMNS),
        ("state_batch_indices", "dst_state_batch_indices", "num_accepted_tokens"),
    ),
    "step, saved": (
        cute_ssm.selective_state_update,
        lambda: token_cases.arguments(SAVED),
        ("intermediate_state_indices",),
    ),
    "checkpointing": (
        cute_ssm.checkpointing_ssu,
        lambda: checkpointing_cases.arguments(CHECKPOINTING),
        ("state_batch_indices",),
    ),
    "checkpointing, list": (
        cute_ssm.checkpointing_ssu_ring,
        lambda: checkpointing_cases.arguments(dataclasses.replace(CHECKPOINTING, history="ring", items=True)),
        ("work_items", "state_batch_indices"),
    ),
    "gated delta": (
        cute_ssm.gated_delta_rule_mtp,
        lambda: gated("accepted_split"),
        ("initial_state_indices", "output_state_indices", "accepted_steps"),
    ),
    "gated delta, scattered": (cute_ssm.gated_delta_rule_mtp, lambda: gated("scatter"), ("ssm_state_indices",)),
    "replay": (
        cute_ssm.gated_delta_rule_replay,
        lambda: replay_cases.arguments(replay_cases.Case()),
        ("initial_state_indices",),
    ),
    "scan": (
        cute_ssm.selective_scan,
        lambda: scan_cases.arguments(scan_cases.Case(in_place=False)),
        ("cache_indices", "has_initial_state"),
    ),
    "scan, blocks": (
        cute_ssm.selective_scan,
        lambda: scan_cases.arguments(BLOCKS),
        ("cache_indices", "has_initial_state", "last_chunk_indices", "block_idx_first_scheduled_token",
         "block_idx_last_scheduled_token", "initial_state_idx"),
    ),
    "commit": (serving.commit, commit, ("state_batch_indices",)),
    "commit, packed": (
        serving.commit, lambda: commit(varlen=True, ring=True), ("state_batch_indices", "num_accepted_tokens")
    ),
    "work items": (serving.build_work_items, listed, ("state_batch_indices",)),
    "work items, packed": (
        serving.build_work_items, lambda: listed(varlen=True), ("state_batch_indices", "work_items")
    ),
    "commit of a pool": (
        of_pool("commit"), lambda: pool_call(num_accepted_tokens=torch.tensor([2, 0, 1])), ("num_accepted_tokens",)
    ),
    "commit of a pool, packed": (
        of_pool("commit"), lambda: pool_call(True, num_accepted_tokens=torch.tensor([2, 0, 1])),
        ("num_accepted_tokens", "state_batch_indices"),
    ),
    "work items of a pool": (
        of_pool("build_work_items"),
        lambda: pool_call(work_items=torch.zeros(3, 4).int(), num_writes=torch.zeros(1).int()),
        ("work_items",),
    ),
    "work items of a pool, packed": (
        of_pool("build_work_items"),
        lambda: pool_call(True, work_items=torch.zeros(3, 4).int(), num_writes=torch.zeros(1).int()),
        ("work_items", "state_batch_indices"),
    ),
    "materialize": (
        serving.materialize,
        lambda: materialize_arguments(Materialize(), 0)["call"],
        ("dst_state_batch_indices", "num_tokens"),
    ),
}  # fmt: skip
EACH = [(call, name) for call, (_, _, names) in CALLS.items() for name in names]


def longer(tensor):
    more = torch.full((4, *tensor.shape[1:]), GARBAGE).to(tensor.dtype)
    return torch.cat([tensor, more])


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("call", CALLS)
def test_rows_after_those_of_the_batch_are_not_looked_at(call):
    operator, make, names = CALLS[call]
    exact = make()
    long = copy(exact) | {name: longer(exact[name]) for name in names}
    if "pool" in exact:
        long["pool"] = deepcopy(exact["pool"])
    before = copy(long)
    operator(**exact)
    operator(**long)
    for name, value in exact.items():
        if not isinstance(value, torch.Tensor):
            continue
        got = long[name]
        if name in names:
            assert same(got[len(value) :], before[name][len(value) :])
            got = got[: len(value)]
        assert same(got, value), name
    if "pool" in exact:
        assert same(long["pool"]._cursors, exact["pool"]._cursors)


@pytest.mark.parametrize(("call", "name"), EACH, ids=str)
def test_shorter_ones_are_refused_by_name(call, name):
    operator, make, _ = CALLS[call]
    exact = make()
    with pytest.raises(ValueError, match=f"^({name}|cu_seqlens): expected"):
        operator(**exact | {name: exact[name][:1]})


@pytest.mark.parametrize(
    ("module", "call"), [(step, "step, matrices"), (checkpointing, "checkpointing"), (gated_delta, "gated delta"),
                         (replay, "replay")]
)  # fmt: skip
def test_steady_state_passes_views_of_the_first_rows(module, call, monkeypatch):
    """A plan of the batch's length is found, and its kernel gets the memory of the longer tensors."""
    operator, make, names = CALLS[call]
    exact, seen, launched = make(), [], []

    class Keys(dict):
        def get(self, key, default=None):
            seen.append(key)

    class Plan(tuple):
        launch = input_bytes = 16
        sm_count = 132

        def __call__(self, *tensors):
            launched.append([t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)])

    Plan.launch = Plan.__call__
    monkeypatch.setattr(module._path, "plans", Keys())
    operator(**copy(exact))
    plan = (Plan(), (7, 528)) if module is step else Plan((Plan(), 7, 528))
    monkeypatch.setattr(module._path, "plans", {seen[0]: plan})
    long = exact | {name: longer(exact[name]) for name in names}
    operator(**long)
    assert all(long[name].data_ptr() in launched[0] for name in names)


def test_a_matrix_may_have_columns_for_more_tokens():
    exact = gated("scatter")
    wide = copy(exact)
    wide["ssm_state_indices"] = torch.cat([exact["ssm_state_indices"], torch.full((3, 2), GARBAGE)], 1)
    cute_ssm.gated_delta_rule_mtp(**exact)
    cute_ssm.gated_delta_rule_mtp(**wide)
    assert same(exact["initial_state"], wide["initial_state"])


def test_counts_of_padding_are_not_looked_at():
    """Padding may have any count; a row that is none may not."""
    call = token_cases.arguments(dataclasses.replace(COLUMNS, pads=(1,)))
    twin = copy(call)
    twin["num_accepted_tokens"][1] = GARBAGE
    cute_ssm.selective_state_update(**call)
    cute_ssm.selective_state_update(**twin)
    assert same(call["state"], twin["state"]) and same(call["out"], twin["out"])
    twin["num_accepted_tokens"][0] = GARBAGE
    with pytest.raises(ValueError, match=r"num_accepted_tokens: expected at most 4, .* got 2147483647 at position 0"):
        cute_ssm.selective_state_update(**twin)
    call = gated("accepted_split")
    call["initial_state_indices"][1] = -1
    twin = copy(call)
    twin["accepted_steps"][1] = twin["output_state_indices"][1] = GARBAGE
    cute_ssm.gated_delta_rule_mtp(**call)
    cute_ssm.gated_delta_rule_mtp(**twin)
    assert same(call["initial_state"], twin["initial_state"]) and same(call["output"], twin["output"])


def test_first_rows_makes_no_view_of_what_is_long_enough():
    exact, matrix = torch.zeros(3), torch.zeros(5, 2)
    got = _arguments.first_rows(3, exact, None, matrix)
    assert got[0] is exact and got[1] is None
    assert got[2].shape == (3, 2) and got[2].data_ptr() == matrix.data_ptr()

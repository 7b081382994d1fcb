"""Index and count tensors with more rows than the batch, as CUDA graphs keep them: the first rows count."""

from __future__ import annotations

import dataclasses
from copy import deepcopy

import pytest
import token_cases
import torch
from bits import same_bits
from index_calls import CALLS, COLUMNS, gated
from memory import copy

import cute_ssm
from cute_ssm.ops import _arguments
from cute_ssm.ops.checkpointing_ssu import operator as checkpointing
from cute_ssm.ops.gated_delta_rule_mtp import operator as gated_delta
from cute_ssm.ops.gated_delta_rule_replay import operator as replay
from cute_ssm.ops.selective_state_update import operator as step

GARBAGE = 2**31 - 1


EACH = [(call, name) for call, (_, _, names) in CALLS.items() for name in names]


def longer(tensor):
    more = torch.full((4, *tensor.shape[1:]), GARBAGE).to(tensor.dtype)
    return torch.cat([tensor, more])


@pytest.mark.parametrize("call", CALLS)
def test_rows_beyond_the_batch_are_not_read(call):
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
            same_bits(got[len(value) :], before[name][len(value) :], name)
            got = got[: len(value)]
        same_bits(got, value, name)
    if "pool" in exact:
        same_bits(long["pool"]._cursors, exact["pool"]._cursors)


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
    plan = (Plan(), (7, 528))
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
    same_bits(exact["initial_state"], wide["initial_state"])


def test_counts_of_padding_are_not_looked_at():
    """Padding may have any count; a row that is none may not."""
    call = token_cases.arguments(dataclasses.replace(COLUMNS, pads=(1,)))
    twin = copy(call)
    twin["num_accepted_tokens"][1] = GARBAGE
    cute_ssm.selective_state_update(**call)
    cute_ssm.selective_state_update(**twin)
    same_bits(call["state"], twin["state"])
    same_bits(call["out"], twin["out"])
    twin["num_accepted_tokens"][0] = GARBAGE
    with pytest.raises(ValueError, match=r"num_accepted_tokens: expected at most 4, .* got 2147483647 at position 0"):
        cute_ssm.selective_state_update(**twin)
    call = gated("accepted_split")
    call["initial_state_indices"][1] = -1
    twin = copy(call)
    twin["accepted_steps"][1] = twin["output_state_indices"][1] = GARBAGE
    cute_ssm.gated_delta_rule_mtp(**call)
    cute_ssm.gated_delta_rule_mtp(**twin)
    same_bits(call["initial_state"], twin["initial_state"])
    same_bits(call["output"], twin["output"])


def test_first_rows_makes_no_view_of_what_is_long_enough():
    exact, matrix = torch.zeros(3), torch.zeros(5, 2)
    got = _arguments.first_rows(3, exact, None, matrix)
    assert got[0] is exact and got[1] is None
    assert got[2].shape == (3, 2) and got[2].data_ptr() == matrix.data_ptr()

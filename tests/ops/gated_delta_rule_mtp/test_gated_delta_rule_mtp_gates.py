"""Logits of decays and steps (a, b) that are NaN: nothing before their token sees them, all from it on is NaN."""

from __future__ import annotations

import gdn_cases
import kernel_backends
import pytest
import replay_cases
from bits import equal
from memory import copy

import cute_ssm
from cute_ssm import tuning

NAN = float("nan")
SLOW = pytest.mark.slow


def by_kernel(operator, call):
    call = copy(call)
    with kernel_backends.kernel(initcheck=False):
        out, state = operator(**call)
    return out, state


def check(operator, call, name, token, accepted=None):
    """NaN at a token of the first request; `accepted` of its tokens are in the state that is written, or all."""
    before = by_kernel(operator, call)
    slots = call["initial_state_indices"].tolist()
    spoilt = copy(call)
    spoilt[name][0, token] = NAN
    out, state = by_kernel(operator, spoilt)
    want, _ = operator(**copy(spoilt))
    equal(out.isnan(), want.isnan(), "NaN is where the reference has it")
    assert not out[0, :token].isnan().any()
    assert out[0, token:].isnan().all()
    equal(out[0, :token], before[0][0, :token], "outputs before the token")
    equal(out[1:], before[0][1:], "other requests")
    equal(state[slots[1:]], before[1][slots[1:]])
    passed = accepted is None or accepted > token
    if passed:
        assert state[slots[0]].isnan().all()
    else:
        equal(state[slots[0]], before[1][slots[0]], "the state of tokens before it")


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    "tokens", [1, 4, pytest.param(2, marks=SLOW), pytest.param(8, marks=SLOW), pytest.param(16, marks=SLOW)]
)
def test_gates_of_a_later_token(tokens, name):
    case = gdn_cases.Case(batch=2, tokens=tokens, K=64, heads=1, ratio=1, pads=(), mode="accepted")
    call = gdn_cases.arguments(case)
    for token, accepted in {(tokens // 2, tokens // 2), (tokens // 2, tokens), (tokens - 1, tokens - 1)}:
        call["accepted_steps"][0] = accepted
        check(cute_ssm.gated_delta_rule_mtp, call, name, token, accepted)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["a", "b"])
def test_gates_of_two_tokens_one_after_the_other(name):
    case = gdn_cases.Case(batch=2, tokens=2, K=64, heads=1, ratio=1, pads=())
    with tuning.override(sequential=1):
        check(cute_ssm.gated_delta_rule_mtp, gdn_cases.arguments(case), name, 1)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["a", "b"])
def test_gates_of_new_tokens_behind_pending_ones(name):
    """The state that is flushed is that of the pending tokens alone."""
    fields = {"batch": 2, "tokens": 3, "K": 64, "window": 8, "heads": 1, "ratio": 1, "pads": ()}
    call = replay_cases.arguments(replay_cases.Case(pending=(8, 3), **fields))
    check(cute_ssm.gated_delta_rule_replay, call, name, 1, accepted=0)


@pytest.mark.thin(2)
@pytest.mark.parametrize("cache", ["g_cache", "beta_cache"])
def test_a_pending_token_that_is_no_number_makes_all_new_outputs_nan(cache):
    fields = {"batch": 2, "tokens": 2, "K": 64, "window": 8, "heads": 1, "ratio": 1, "pads": ()}
    call = replay_cases.arguments(replay_cases.Case(pending=(8, 3), **fields))
    before, _ = by_kernel(cute_ssm.gated_delta_rule_replay, call)
    slots = call["initial_state_indices"].tolist()
    row = (int(call["ring_start"][slots[0]]) + 7) % call["k_cache"].shape[2]
    call[cache][slots[0], 0, row] = NAN
    out, state = by_kernel(cute_ssm.gated_delta_rule_replay, call)
    assert out[0].isnan().all()
    assert state[slots[0]].isnan().all()
    equal(out[1], before[1])

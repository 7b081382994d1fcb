"""FlashInfer's two signatures of `checkpointing_ssu`, against the operators and the token loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from bits import same_memory
from checkpointing_cases import PAD, Case, Sequence, arguments, check, slots_of
from memory import copy, storage

from cute_ssm.compat.flashinfer.mamba import checkpointing_ssu, checkpointing_ssu_double_buffer

COMMON = (
    "x dt A B C out D z dt_bias dt_softplus state_batch_indices pad_slot_id state_scale rand_seed philox_rounds "
    "d_split cu_seqlens max_seqlen enable_pdl"
).split()
DOUBLE = ("state", "old_x", "old_B", "old_dt", "old_cumAdt", "cache_buf_idx", "prev_num_accepted_tokens", *COMMON)
RING = ("state", "x_cache", "B_cache", "dt_cache", "ring_start", "prev_num_accepted_tokens", *COMMON)
SCRATCH = ("cb_scaled", "cumAdt_vec", "cb_old")
DEFAULTS = {
    "dt_softplus": False, "pad_slot_id": -1, "philox_rounds": 10, "enable_pdl": False, "precompute_heads_per_cta": 0,
    "algorithm": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (checkpointing_ssu_double_buffer, DOUBLE),
        (checkpointing_ssu, (*RING, *SCRATCH, "precompute_heads_per_cta", "algorithm")),
    ],
)
def test_signature(function, order):
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == order
    for name in order[order.index("out") + 1 :]:
        assert parameters[name].default == DEFAULTS.get(name), name
    assert all(parameters[name].default is inspect.Parameter.empty for name in order[: order.index("out") + 1])


def verify_by_position(case, function, order, **more):
    call = arguments(case)
    before = copy(call)
    sequences = [None if s == PAD else Sequence.of(case, before, s, *rest) for s, *rest in slots_of(case, before)]
    given = {**DEFAULTS, **call}
    assert function(*(given.get(name) for name in order), **more) is call["out"]
    check(case, before, call, sequences, False)


@pytest.mark.parametrize("state", ["f16", "i8"])
@pytest.mark.parametrize("lengths", [None, (3, 0, 4)])
def test_by_position(lengths, state):
    verify_by_position(Case(state=state, lengths=lengths), checkpointing_ssu_double_buffer, DOUBLE)
    verify_by_position(Case(state=state, lengths=lengths, history="ring"), checkpointing_ssu, RING)


@pytest.mark.parametrize("history", ["double", "ring"])
def test_a_seed_of_one_element_may_have_any_shape(history):
    function = checkpointing_ssu if history == "ring" else checkpointing_ssu_double_buffer
    states = []
    for shape in ((1,), (), (1, 1)):
        call = arguments(Case(history=history, rounds=4, accepted=(16, 0, 15)))
        call["rand_seed"] = call["rand_seed"].reshape(shape)
        function(**call)
        states.append(storage(call["state"]))
    assert all(torch.equal(states[0].view(torch.int16), other.view(torch.int16)) for other in states[1:])


def scratch(case):
    x = torch.empty(0, dtype=torch.bfloat16)
    return dict(zip(SCRATCH, (x.new_empty(case.batch, case.nheads, 32, 8), torch.empty(0), x)))


@pytest.mark.parametrize("algorithm", ["auto", "monolith", "two-kernel"])
def test_scratch_memory_is_accepted(algorithm):
    case = Case(history="ring")
    more = {**scratch(case), "algorithm": algorithm, "precompute_heads_per_cta": 4}
    verify_by_position(case, checkpointing_ssu, RING, **more)


def test_a_seed_with_a_float32_state_is_ignored():
    seed = torch.zeros(1, dtype=torch.int64)
    for case, function in (
        (Case(state="f32"), checkpointing_ssu_double_buffer),
        (Case(state="f32", history="ring"), None),
    ):
        call = arguments(case)
        twin = copy(call)
        function = function or checkpointing_ssu
        function(**call)
        function(**twin, rand_seed=seed)
        same_memory(call["state"], twin["state"])


BROKEN = [
    ({"algorithm": "fast"}, ValueError, "algorithm: expected auto or monolith or two-kernel, got 'fast'"),
    ({"algorithm": "two-kernel"}, ValueError, "cb_scaled: expected a tensor with algorithm = 'two-kernel', got None"),
    ({"cb_old": torch.empty(0)}, ValueError, "cb_scaled: expected a tensor with the other scratch tensors, got None"),
    ({"cb_scaled": 1, "cumAdt_vec": 1, "cb_old": 1}, TypeError, "cb_scaled: expected a torch.Tensor, got int"),
    ({"precompute_heads_per_cta": -1}, ValueError, "precompute_heads_per_cta: expected 0 or more, got -1"),
    ({"precompute_heads_per_cta": 1.5}, TypeError, "precompute_heads_per_cta: expected an int, got float"),
]


@pytest.mark.parametrize(("more", "error", "message"), BROKEN, ids=lambda v: str(v)[:40])
def test_broken_scratch_memory(more, error, message):
    call = arguments(Case(history="ring"))
    before = copy(call)
    with pytest.raises(error, match=message):
        checkpointing_ssu(**call, **more)
    assert all(torch.equal(storage(v), storage(call[n])) for n, v in before.items() if isinstance(v, torch.Tensor))

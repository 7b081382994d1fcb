"""vLLM's decode functions for gated delta nets against a loop in float64 that follows vLLM's rules of slots."""

from __future__ import annotations

import broken_arguments
import kernel_backends
import numpy as np
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import close, wide

from cute_ssm.compat.vllm import gated_delta as vllm
from cute_ssm.errors import UnsupportedSpecError

WEIGHTS = ("A_log", "dt_bias")


def gates(call):
    return {name: call[name] for name in ("a", "b", *WEIGHTS)}


def check_states(state, before, stored):
    for slot in range(len(state)):
        if slot in stored:
            assert close(state[slot], stored[slot]), f"state[{slot}]"
        else:
            same_bits(state[slot], before[slot], f"state[{slot}] changed where it must not")


@kernel_backends.both
def test_packed_decode_takes_slices_of_a_row_and_skips_the_null_slot(backend):
    call, state, slots = rows(), pool(6), torch.tensor([3, 0, 5, 2], dtype=torch.int32)
    before, out = state.clone(), torch.full((4, 1, 4, 32), float("nan"), dtype=torch.bfloat16)
    with backend():
        result = vllm.fused_recurrent_gated_delta_rule_packed_decode(
            packed(call), **gates(call), scale=32**-0.5, initial_state=state, out=out, ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
    assert result[0] is out and result[1] is state
    stored = {}
    for row, slot in enumerate(slots.tolist()):
        if slot == 0:
            assert not out[row].any(), "rows of padding are zero"
            continue
        stored[slot], want = step(wide(before[slot]), call, row)
        assert close(out[row, 0], want), f"out[{row}]"
    check_states(state, before, stored)


def speculative(call, state, indices, accepted):
    return vllm.fused_sigmoid_gating_delta_rule_update(
        **gates(call), q=call["q"][None], k=call["k"][None], v=call["v"][None], initial_state=state,
        cu_seqlens=torch.arange(0, len(call["q"]) + 1, indices.shape[-1] if indices.dim() == 2 else 1),
        ssm_state_indices=indices, num_accepted_tokens=accepted, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def test_a_speculative_step_starts_from_the_accepted_column_and_stores_every_state():
    call, state = rows(6), pool(9)
    indices = torch.tensor([[3, 1, 2], [8, 0, 6]], dtype=torch.int32)
    accepted, before = torch.tensor([2, 1], dtype=torch.int32), state.clone()
    out, final = speculative(call, state, indices, accepted)
    assert final is state and out.shape == (1, 6, 4, 32)
    stored = {}
    for i in range(2):
        h = wide(before[indices[i, accepted[i] - 1]])
        for t in range(3):
            h, want = step(h, call, 3 * i + t)
            assert close(out[0, 3 * i + t], want), f"out of token {t} of sequence {i}"
            if indices[i, t] > 0:
                stored[int(indices[i, t])] = h
    check_states(state, before, stored)


def test_a_step_of_one_token_per_sequence_updates_states_in_place():
    call, state, slots = rows(3), pool(5), torch.tensor([4, 0, 1, 3])
    before = state.clone()
    out, _ = speculative(call, state, slots, None)
    stored = {}
    for row, slot in ((0, 4), (2, 1)):
        stored[slot], want = step(wide(before[slot]), call, row)
        assert close(out[0, row], want)
    assert not out[0, 1].any()
    check_states(state, before, stored)


@pytest.mark.parametrize("gated", [lambda t: t, lambda t: t[None]], ids=["rows", "a batch of rows"])
def test_a_single_value_head_is_one_column_of_the_gates(gated):
    """As on each of many GPUs that share a layer."""
    call, state, slots = rows(3, heads=1, value_heads=1), pool(5, value_heads=1), torch.tensor([4, 2, 1])
    before = state.clone()
    out, _ = speculative({**call, "a": gated(call["a"]), "b": gated(call["b"])}, state, slots, None)
    stored = {}
    for row, slot in enumerate(slots.tolist()):
        stored[slot], want = step(wide(before[slot]), call, row)
        assert close(out[0, row], want)
    check_states(state, before, stored)


@kernel_backends.both
def test_sequences_of_different_lengths_leave_the_other_columns_alone(backend):
    """Three, none and one token, and rows of no sequence behind them, as where a CUDA graph has room for more."""
    call, state = rows(6), pool(10)
    indices = torch.tensor([[3, 1, 2], [8, 4, 6], [7, 5, 9]], dtype=torch.int32)
    before = state.clone()
    with backend(checks=False):
        out, _ = vllm.fused_sigmoid_gating_delta_rule_update(
            **gates(call), q=call["q"][None], k=call["k"][None], v=call["v"][None], initial_state=state,
            cu_seqlens=torch.tensor([0, 3, 3, 4]), ssm_state_indices=indices, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
    stored = {}
    for first, count, slots in ((0, 3, indices[0].tolist()), (3, 1, indices[2].tolist())):
        h = wide(before[slots[0]])
        for t in range(count):
            h, want = step(h, call, first + t)
            assert close(out[0, first + t], want)
            stored[slots[t]] = h
    assert not out[0, 4:].any(), "rows of no sequence are zero"
    check_states(state, before, stored)


def test_a_sequence_longer_than_its_slots_is_refused():
    call, state = rows(), pool(6)
    before = state.clone()
    with pytest.raises(ValueError, match="cu_seqlens: expected requests of at most 2 tokens, got one of 3"):
        vllm.fused_sigmoid_gating_delta_rule_update(
            **gates(call), **{key: call[key][None] for key in ("q", "k", "v")}, initial_state=state,
            cu_seqlens=torch.tensor([0, 1, 4]), ssm_state_indices=torch.tensor([[1, 2], [3, 4]]),
        )  # fmt: skip
    same_bits(state, before, "state")


def test_errors_of_the_recurrence_name_vllms_arguments():
    call = rows()
    given = {
        **gates(call), **{key: call[key][None] for key in ("q", "k", "v")}, "initial_state": pool(6), "scale": 0.1,
        "cu_seqlens": torch.tensor([0, 2, 4]), "ssm_state_indices": torch.tensor([[1, 2], [3, 4]]),
        "num_accepted_tokens": torch.tensor([1, 2]),
    }  # fmt: skip
    wrong = {"ssm_state_indices": torch.tensor([[1, 6], [3, 4]])}
    broken_arguments.check(vllm.fused_sigmoid_gating_delta_rule_update, given, wrong)
    too_long = given | {"ssm_state_indices": torch.tensor([[1], [3]]), "num_accepted_tokens": None}
    with pytest.raises(ValueError, match="got one of 2; give ssm_state_indices as many columns"):
        vllm.fused_sigmoid_gating_delta_rule_update(**too_long)


def test_errors_of_the_packed_step_name_vllms_arguments():
    call = rows(2)
    given = {
        "mixed_qkv": packed(call), **gates(call), "scale": 0.1, "initial_state": pool(3),
        "out": torch.zeros(2, 1, 4, 32, dtype=torch.bfloat16), "ssm_state_indices": torch.tensor([1, 2]),
    }  # fmt: skip
    wrong = {"ssm_state_indices": torch.tensor([1, 3])}
    broken_arguments.check(vllm.fused_recurrent_gated_delta_rule_packed_decode, given, wrong)


REFUSED = {
    "is_kda": True,
    "beta": 2.0,
    "threshold": 10.0,
    "inplace_final_state": False,
    "ssm_state_indices": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_lacks_is_refused_by_name_before_anything_is_written(name):
    call, state = rows(), pool(6)
    given = {"cu_seqlens": torch.tensor([0, 2, 4]), "ssm_state_indices": torch.tensor([[1, 2], [3, 4]])}
    before = state.clone()
    inputs = {key: call[key][None] for key in ("q", "k", "v")}
    with pytest.raises(UnsupportedSpecError, match=name):
        vllm.fused_sigmoid_gating_delta_rule_update(
            **gates(call), **inputs, initial_state=state, num_accepted_tokens=torch.ones(2, dtype=torch.int32),
            **{**given, name: REFUSED[name]},
        )  # fmt: skip
    same_bits(state, before, "state")


def test_columns_that_are_no_heads_are_refused():
    call, state = rows(), pool(6)
    with pytest.raises(ValueError, match="mixed_qkv: expected 2 heads K"):
        vllm.fused_recurrent_gated_delta_rule_packed_decode(
            packed(call)[:, :-1], **gates(call), scale=1.0, initial_state=state, out=np.empty(0), ssm_state_indices=None
        )

"""SGLang's decode functions against loops in float64 that follow SGLang's rules of slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm.compat import sglang
from cute_ssm.errors import UnsupportedSpecError

WEIGHTS = ("A_log", "dt_bias")


def test_a_decode_step_and_its_padding():
    call, state, slots = tokens(rows=3), states(5), torch.tensor([4, -1, 2], dtype=torch.int32)
    before, out = state.clone(), torch.full_like(call["x"], float("nan"))
    assert sglang.selective_state_update(state, **call, state_batch_indices=slots, out=out) is None
    for row, slot in enumerate(slots.tolist()):
        h = wide(before[slot]) if slot >= 0 else np.zeros(before.shape[1:])
        new, want = token(h, **at_row(call, row))
        assert close(out[row], want), f"out[{row}]"
        if slot >= 0:
            assert close(state[slot], new)
    for slot in (0, 1, 3):
        same_bits(state[slot], before[slot], "a slot of no request")


def test_layers_of_mamba_1_have_channels_as_heads():
    dim, dstate = 24, 16
    call = tokens(rows=2, heads=1, dim=dim, dstate=dstate, groups=1, dtype=torch.bfloat16, tied=False)
    call |= {name: call[name].float() * 1.003 for name in ("B", "C")}  # SGLang's are float32 beside bfloat16 rows
    state, slots = states(3, heads=1, dim=dim, dstate=dstate), torch.tensor([2, 0])
    want = [token(wide(state[slot]), **at_row(call, row)) for row, slot in enumerate((2, 0))]
    theirs = state.clone().transpose(1, 2).contiguous()
    rows_of = {name: call[name].transpose(1, 2) for name in ("x", "dt", "z")}
    weights = {name: call[name].transpose(0, 1) for name in ("A", "D", "dt_bias")}
    out = torch.empty_like(rows_of["x"])
    sglang.selective_state_update(
        theirs, **rows_of, **weights, B=call["B"], C=call["C"], dt_softplus=True, state_batch_indices=slots, out=out
    )
    for row, slot in enumerate((2, 0)):
        assert close(theirs[slot].transpose(0, 1), want[row][0]) and close(out[row].transpose(0, 1), want[row][1])


def test_verification_keeps_the_pool_and_stores_states_in_rows_of_the_buffer():
    flat, state, slots = tokens(rows=6), states(4), torch.tensor([1, 3])
    call = {k: v.unflatten(0, (2, 3)) if k in ("x", "dt", "B", "C", "z") else v for k, v in flat.items()}
    call["dt"] = flat["dt"][..., 0].reshape(2, 3, 4)[..., None].expand_as(call["x"])
    before, out = state.clone(), torch.empty_like(call["x"])
    buffer, where = torch.zeros(5, 3, *state.shape[1:]), torch.tensor([4, 0])
    sglang.selective_state_update(
        state, **call, state_batch_indices=slots, out=out, disable_state_update=True, cache_steps=3,
        intermediate_states_buffer=buffer, intermediate_state_indices=where,
    )  # fmt: skip
    same_bits(state, before, "the pool")
    for i in range(2):
        h = wide(before[slots[i]])
        for t in range(3):
            h, want = token(h, **at_row(flat, 3 * i + t))
            assert close(out[i, t], want) and close(buffer[where[i], t], h), f"token {t} of request {i}"


def test_trees_of_drafts_and_a_missing_out_are_refused_by_name():
    call, state = tokens(rows=2), states(2)
    with pytest.raises(UnsupportedSpecError, match="retrieve_parent_token"):
        sglang.selective_state_update(state, **call, out=call["x"].clone(), retrieve_parent_token=torch.zeros(2, 1))
    with pytest.raises(TypeError, match="out: expected"):
        sglang.selective_state_update(state, **call)


def gates(call):
    return {name: call[name] for name in ("a", "b", *WEIGHTS)}


def test_packed_decode_counts_slot_0_and_skips_negative_slots():
    call, state, slots = rows(3), pool(3), torch.tensor([0, -1, 2])
    before, out = state.clone(), torch.full((3, 1, 4, 32), float("nan"), dtype=torch.bfloat16)
    sglang.fused_recurrent_gated_delta_rule_packed_decode(
        packed(call), **gates(call), scale=32**-0.5, initial_state=state, out=out, ssm_state_indices=slots,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    for row, slot in ((0, 0), (2, 2)):
        new, want = step(wide(before[slot]), call, row)
        assert close(out[row, 0], want) and close(state[slot], new)
    assert not out[1].any()
    same_bits(state[1], before[1], "a slot of no request")


@pytest.mark.parametrize("positional", [True, False])
def test_verification_of_gated_delta_nets_stores_states_by_row(positional):
    call, state, slots = rows(4), pool(3), torch.tensor([2, 0])
    before, buffer = state.clone(), torch.zeros(3, 2, 4, 32, 32)
    where = torch.tensor([0, 1] if positional else [2, 0])
    out = sglang.fused_sigmoid_gating_delta_rule_update(
        softplus_beta=1.0, softplus_threshold=20.0, **gates(call), **{n: call[n][None] for n in ("q", "k", "v")},
        initial_state_source=state, initial_state_indices=slots, use_qk_l2norm_in_kernel=True,
        cu_seqlens=torch.tensor([0, 2, 4]), disable_state_update=True, intermediate_states_buffer=buffer,
        intermediate_state_indices=where, cache_steps=2, positional_rows=positional,
    )  # fmt: skip
    same_bits(state, before, "the pool")
    for i in range(2):
        h = wide(before[slots[i]])
        for t in range(2):
            h, want = step(h, call, 2 * i + t)
            assert close(out[0, 2 * i + t], want) and close(buffer[where[i], t], h), f"token {t} of request {i}"


REFUSED = {"is_kda": True, "lower_bound": -5.0, "softplus_threshold": 1.0, "cache_ring": True, "cache_steps": 7}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_lacks_is_refused_by_name(name):
    call, state = rows(2), pool(3)
    given = {"softplus_beta": 1.0, "softplus_threshold": 20.0, name: REFUSED[name]}
    if name == "cache_steps":
        given["intermediate_states_buffer"] = torch.zeros(2, 1, 4, 32, 32)
    with pytest.raises(ValueError, match=name):
        sglang.fused_sigmoid_gating_delta_rule_update(
            **gates(call), **{n: call[n][None] for n in ("q", "k", "v")}, initial_state_source=state,
            initial_state_indices=torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 1, 2]), **given,
        )  # fmt: skip

"""SGLang's decode functions against loops in float64 that follow SGLang's rules of slots."""

from __future__ import annotations

import broken_arguments
import kernel_backends
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


def sigmoid(call, state, slots, cu_seqlens, **more):
    return sglang.fused_sigmoid_gating_delta_rule_update(
        softplus_beta=1.0, softplus_threshold=20.0, **gates(call), **{n: call[n][None] for n in ("q", "k", "v")},
        initial_state_source=state, initial_state_indices=slots, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens,
        **more,
    )  # fmt: skip


@kernel_backends.both
@pytest.mark.parametrize("positional", [True, False])
def test_verification_of_gated_delta_nets_stores_states_by_row(positional, backend):
    """Of one and three tokens, which are two each on average: the lengths count, not the average."""
    call, state, slots = rows(4), pool(3), torch.tensor([2, 0])
    before, buffer = state.clone(), torch.full((4, 4, 4, 32, 32), 7.0)  # of more steps than drafts
    where = torch.tensor([0, 1] if positional else [3, 0])
    with backend(checks=False):
        out = sigmoid(
            call, state, slots, torch.tensor([0, 1, 4]), disable_state_update=True, intermediate_states_buffer=buffer,
            intermediate_state_indices=where, cache_steps=3, positional_rows=positional,
        )  # fmt: skip
    same_bits(state, before, "the pool")
    stored = torch.full_like(buffer, 7.0)
    for i, tokens_of in enumerate((range(1), range(1, 4))):
        h = wide(before[slots[i]])
        for t, row in enumerate(tokens_of):
            h, want = step(h, call, row)
            assert close(out[0, row], want) and close(buffer[where[i], t], h), f"token {t} of request {i}"
            stored[where[i], t] = buffer[where[i], t]
    same_bits(buffer, stored, "a row or a step of no token")


@pytest.mark.parametrize("longest", [None, 3])
def test_requests_of_different_lengths_advance_their_states(longest):
    call, state, slots = rows(4), pool(3), torch.tensor([2, 1, 0])
    before = state.clone()
    out = sigmoid(call, state, slots, torch.tensor([0, 3, 3, 4]), max_seqlen=longest)
    for slot, tokens_of in ((2, range(3)), (0, range(3, 4))):
        h = wide(before[slot])
        for row in tokens_of:
            h, want = step(h, call, row)
            assert close(out[0, row], want)
        assert close(state[slot], h)
    same_bits(state[1], before[1], "a slot of a request without tokens")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_seqlen": 2}, "at most 2 tokens, got one of 3; raise max_seqlen"),
        (
            {"intermediate_states_buffer": torch.zeros(2, 2, 4, 32, 32), "intermediate_state_indices": torch.arange(2)},
            "at most 2 tokens, got one of 3; give intermediate_states_buffer as many steps",
        ),
    ],
    ids=["bound", "buffer"],
)
def test_a_request_longer_than_its_bound_is_refused(more, message):
    call, state = rows(4), pool(3)
    before = state.clone()
    with pytest.raises(ValueError, match=f"cu_seqlens: expected requests of {message}"):
        sigmoid(call, state, torch.tensor([2, 0]), torch.tensor([0, 1, 4]), **more)
    same_bits(state, before, "state")


def test_states_of_drafts_are_rounded_to_nearest_and_those_of_the_pool_at_random():
    """float16 cannot hold 2048 + 1/2: its neighbours are 2048 and 2050."""
    zeros, slots = torch.zeros(1, 2, 1, 8), torch.tensor([0])
    call = {
        "x": torch.full((1, 2, 1, 8), 0.5), "dt": torch.ones(1, 2, 1, 1).expand(1, 2, 1, 8),
        "A": torch.zeros(1, 1, 1).expand(1, 8, 256), "B": torch.ones(1, 2, 1, 256),
        "C": zeros.new_zeros(1, 2, 1, 256), "out": zeros,
    }  # fmt: skip
    pools = [torch.full((1, 1, 8, 256), 2048.0, dtype=torch.float16) for _ in range(2)]
    buffers = [torch.zeros(1, 2, 1, 8, 256, dtype=torch.float16) for _ in range(2)]
    for state, buffer, disabled in zip(pools, buffers, (True, False)):
        sglang.selective_state_update(
            state, **call, state_batch_indices=slots, disable_state_update=disabled, intermediate_states_buffer=buffer,
            cache_steps=2, intermediate_state_indices=slots, enable_stochastic_rounding=True,
        )  # fmt: skip
        assert buffer[0, 0].eq(2048).all(), "rounded to nearest, of 2048.5"
    assert pools[0].eq(2048).all()
    assert set(pools[1].unique().tolist()) == {2048.0, 2050.0}, "rounded at random, of 2049"


def test_errors_of_the_recurrence_name_sglangs_arguments():
    call, state = rows(2), pool(3)
    given = {
        **gates(call), **{n: call[n][None] for n in ("q", "k", "v")}, "softplus_beta": 1.0, "softplus_threshold": 20.0,
        "initial_state_source": state, "initial_state_indices": torch.tensor([1, 2]),
        "cu_seqlens": torch.tensor([0, 1, 2]), "intermediate_states_buffer": torch.zeros(2, 1, 4, 32, 32),
        "intermediate_state_indices": torch.tensor([1, 0]), "scale": 0.1, "max_seqlen": 1,
    }  # fmt: skip
    broken_arguments.check(
        sglang.fused_sigmoid_gating_delta_rule_update, given,
        {"initial_state_indices": torch.tensor([1, 3]), "intermediate_state_indices": torch.tensor([0, 2])},
    )  # fmt: skip


def test_errors_of_the_packed_step_name_sglangs_arguments():
    call = rows(2)
    given = {
        "mixed_qkv": packed(call), **gates(call), "scale": 0.1, "initial_state": pool(3),
        "out": torch.zeros(2, 1, 4, 32, dtype=torch.bfloat16), "ssm_state_indices": torch.tensor([1, 2]),
    }  # fmt: skip
    broken_arguments.check(
        sglang.fused_recurrent_gated_delta_rule_packed_decode, given, {"ssm_state_indices": torch.tensor([1, 3])}
    )


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

"""FlashInfer's `selective_state_update`: its signature, and where it differs from the operator that it calls."""

from __future__ import annotations

import inspect

import kernel_backends
import pytest
import torch
from bits import equal, same_bits
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm.compat.flashinfer.mamba import selective_state_update

EMULATE = [False, pytest.param(True, marks=pytest.mark.accuracy)]
ORDER = (
    "state x dt A B C D z dt_bias dt_softplus state_batch_indices pad_slot_id state_scale out disable_state_update "
    "intermediate_states_buffer intermediate_state_indices intermediate_state_scales rand_seed philox_rounds "
    "cache_steps algorithm dst_state_batch_indices cu_seqlens num_accepted_tokens backend"
).split()
DEFAULTS = {
    "dt_softplus": False, "pad_slot_id": -1, "disable_state_update": False, "philox_rounds": 10, "cache_steps": 0,
    "algorithm": "auto", "backend": "auto",
}  # fmt: skip


def steps(call, T):
    """Rows of `tokens` as (batch, T, ...)."""
    grid = {n: call[n].unflatten(0, (-1, T)) for n in ("x", "dt", "B", "C", "z")}
    return {**call, **grid}


def test_signature():
    parameters = dict(inspect.signature(selective_state_update).parameters)
    assert parameters.pop("write_padded_rows").kind is inspect.Parameter.KEYWORD_ONLY, "not of FlashInfer"
    assert list(parameters) == ORDER
    for name, parameter in list(parameters.items())[6:]:
        assert parameter.default == DEFAULTS.get(name)


@pytest.mark.parametrize("backend", ["auto", "flashinfer", "cake"])
def test_one_token(backend):
    state, call, out = states(4), tokens(3), torch.empty(3, 4, 64)
    before = state.clone()
    slots = torch.tensor([3, -1, 0, 2], dtype=torch.int32)  # more rows than sequences
    out[1] = 7
    options = {"out": out, "backend": backend, "write_padded_rows": False}
    result = selective_state_update(state, **call, state_batch_indices=slots, **options)
    assert result is out
    for b, slot in ((0, 3), (2, 0)):
        new, y = token(wide(before[slot]), **at_row(call, b))
        assert close(out[b], y)
        assert close(state[slot], new)
    assert bool((out[1] == 7).all())
    same_bits(state[1:3], before[1:3])


@pytest.mark.parametrize("emulate", EMULATE, ids=["reference", "kernel"])
@pytest.mark.parametrize("columns", [None, 2])
def test_destinations_longer_than_the_batch(columns, emulate):
    """Buffers of CUDA graphs: rows beyond the batch are not looked at, whatever they hold."""
    state, call = states(7), tokens(3)
    before = state.clone()
    slots, to = (torch.tensor(rows, dtype=torch.int32) for rows in ([0, 1, 2, 99, -7], [3, -1, 5, 4, 6]))
    if columns:
        slots, to = (torch.stack([t, t * 0 + 99], 1) for t in (slots, to))
    options = {"state_batch_indices": slots, "dst_state_batch_indices": to}
    if emulate:
        with kernel_backends.kernel(checks=False):
            out = selective_state_update(state, **call, **options)
    else:
        out = selective_state_update(state, **call, **options)
    for b, slot in enumerate((3, None, 5)):
        new, y = token(wide(before[b]), **at_row(call, b))
        assert close(out[b], y)
        if slot is not None:
            assert close(state[slot], new)
    untouched = [0, 1, 2, 4, 6]
    equal(state[untouched], before[untouched])


@pytest.mark.parametrize("given", [True, False], ids=["out given", "out allocated"])
@pytest.mark.parametrize("kind", ["one token", "several", "packed", "int8"])
def test_padded_rows_hold_the_outputs_of_a_zero_state(kind, given):
    state, call, scale = states(4), tokens(6), None
    options, rows = {"state_batch_indices": torch.tensor([2, 9, 0, 99], dtype=torch.int32)}, {0: [2], 1: [3], 2: [4]}
    if kind in ("one token", "int8"):
        call, rows = tokens(3), {0: [0], 1: [1], 2: [2]}
    elif kind == "several":
        call, rows = steps(call, 2), {b: [2 * b, 2 * b + 1] for b in range(3)}
    else:
        options |= {"cu_seqlens": torch.tensor([0, 2, 5, 6], dtype=torch.int32), "cache_steps": 3}
        rows = {0: [0, 1], 1: [2, 3, 4], 2: [5]}
    if kind == "int8":
        scale = torch.rand(4, 4, 64) / 64
        state = torch.randint(-127, 128, (4, 4, 64, 32), dtype=torch.int8)
        options |= {"state_scale": scale}
    scale_before = None if scale is None else scale.clone()
    flat, before = tokens(len([row for found in rows.values() for row in found])), state.clone()
    if given:
        options["out"] = torch.full_like(call["x"], float("nan"))
    out = selective_state_update(state, **call, **options, pad_slot_id=9)
    out = out.flatten(0, 1) if out.dim() == 4 else out
    for b, slot in enumerate((2, None, 0)):
        h = 0 * wide(before[0]) if slot is None else wide(before[slot])
        h = h if scale is None or slot is None else h * wide(scale_before[slot])[..., None]
        for row in rows[b]:
            h, y = token(h, **at_row(flat, row))
            assert close(out[row], y), (b, row)
    equal(state[[1, 3]], before[[1, 3]], "nobody's states")
    bare = {**options, "out": None, "write_padded_rows": False}
    kept = selective_state_update(before.clone(), **call, **bare, pad_slot_id=9)
    kept = kept.flatten(0, 1) if kept.dim() == 4 else kept
    assert not kept[rows[1]].any()


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_seed_of_one_element_may_have_any_shape(shape):
    results = []
    for seed in (torch.tensor([5]), torch.full(shape, 5)):
        state = states(3).half()
        selective_state_update(state, **tokens(3), rand_seed=seed, philox_rounds=4)
        results.append(state)
    assert torch.equal(*results)


@pytest.mark.parametrize("emulate", EMULATE, ids=["reference", "kernel"])
def test_cache_steps_insert_an_axis_of_tokens(emulate):
    state, call = states(3), tokens(3)
    before, saved = state.clone(), torch.zeros(3, 2, 4, 64, 32)
    extra = {"cache_steps": 2, "intermediate_states_buffer": saved, "disable_state_update": True}
    if emulate:
        with kernel_backends.kernel(checks=False):
            out = selective_state_update(state, **call, **extra)
    else:
        out = selective_state_update(state, **call, **extra)
    assert out.shape == (3, 1, 4, 64)
    for b in range(3):
        new, y = token(wide(before[b]), **at_row(call, b))
        assert close(out[b, 0], y)
        assert close(saved[b, 0], new)
    assert not saved[:, 1].any()
    same_bits(state, before)
    given = torch.empty(3, 1, 4, 64)
    assert selective_state_update(before, **call, cache_steps=1, out=given) is given
    if not emulate:
        same_bits(given, out)


def test_several_tokens_with_intermediate_states_keep_the_last_one_too():
    state, call = states(2), tokens(6)
    before, saved = state.clone(), torch.zeros(2, 3, 4, 64, 32)
    out = selective_state_update(state, **steps(call, 3), cache_steps=3, intermediate_states_buffer=saved)
    for b in range(2):
        h = wide(before[b])
        for t in range(3):
            h, y = token(h, **at_row(call, 3 * b + t))
            assert close(out[b, t], y)
            assert close(saved[b, t], h)
        assert close(state[b], h)


def test_scales_may_have_a_trailing_axis():
    call = tokens(3)
    state, scale = torch.zeros(3, 4, 64, 32, dtype=torch.int16), torch.ones(3, 4, 64, 1)
    out = selective_state_update(state, **call, state_scale=scale)
    for b in range(3):
        new, y = token(0 * wide(state[b]), **at_row(call, b))
        assert close(out[b], y)
        assert close(state[b].float() * scale[b], new, torch.float16)


def test_packed_tokens():
    state, call, cu = states(3), tokens(5), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    before = state.clone()
    out = selective_state_update(state, **call, cu_seqlens=cu, cache_steps=3)
    assert out.shape == (5, 4, 64)
    for b in range(3):
        h = wide(before[b])
        for row in range(int(cu[b]), int(cu[b + 1])):
            h, y = token(h, **at_row(call, row))
            assert close(out[row], y)
        assert close(state[b], h)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "triton"}, ValueError, "backend: expected auto or flashinfer or cake, got 'triton'"),
        ({"algorithm": "diagonal"}, ValueError, "algorithm: expected auto or"),
        ({"state": None}, TypeError, "state: expected a torch.Tensor, got NoneType"),
        (
            {"out": torch.empty(3, 4, 64), "cache_steps": 1},
            ValueError,
            r"out: expected shape \(3, 1, 4, 64\).*unsqueeze",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3]), "cache_steps": 2},
            ValueError,
            "cu_seqlens: expected sequences of at most 2",
        ),
        ({"cache_steps": -1}, ValueError, "cache_steps: expected 0 or more, got -1"),
        ({"rand_seed": 4}, TypeError, "rand_seed: expected a torch.Tensor, or an array with __dlpack__, got int"),
    ],
)
def test_bad_arguments(change, error, message):
    state = states(3)
    before = state.clone()
    with pytest.raises(error, match=message):
        selective_state_update(**{"state": state, **tokens(3), **change})
    same_bits(state, before)


def test_cache_steps_below_the_number_of_tokens():
    with pytest.raises(ValueError, match="cache_steps: expected at least T = 3, got 2"):
        saved = torch.zeros(2, 3, 4, 64, 32)
        selective_state_update(states(2), **steps(tokens(6), 3), cache_steps=2, intermediate_states_buffer=saved)

"""mamba_ssm's `selective_state_update` against the loop in float64."""

from __future__ import annotations

import inspect

import kernel_backends
import numpy as np
import pytest
import torch
from bits import same_bits
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm.compat.mamba_ssm import selective_state_update

EMULATE = [False, pytest.param(True, marks=pytest.mark.accuracy)]
ORDER = "state x dt A B C D z dt_bias dt_softplus state_batch_indices".split()


def test_signature():
    parameters = inspect.signature(selective_state_update).parameters
    assert list(parameters) == ORDER
    assert [p.default for p in list(parameters.values())[6:]] == [None, None, None, False, None]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "dense"])
@pytest.mark.parametrize("emulate", EMULATE, ids=["reference", "kernel"])
def test_a_dense_state_is_updated_in_place(tied, emulate):
    state, call = states(3), tokens(3, tied=tied)
    before = state.clone()
    if emulate:
        with kernel_backends.kernel():
            out = selective_state_update(state, **call)
    else:
        out = selective_state_update(state, **call)
    for b in range(3):
        new, y = token(wide(before[b]), **at_row(call, b))
        assert close(out[b], y)
        assert close(state[b], new)


def test_slots_and_padding():
    state, call = states(5), tokens(3)
    before = state.clone()
    out = selective_state_update(state, **call, state_batch_indices=torch.tensor([4, -1, 0], dtype=torch.int32))
    for b, slot in ((0, 4), (2, 0)):
        new, y = token(wide(before[slot]), **at_row(call, b))
        assert close(out[b], y)
        assert close(state[slot], new)
    assert not out[1].any()
    same_bits(state[1:4], before[1:4])


def test_one_head_is_left_out_and_only_what_is_required_is_given():
    state, call = states(2, heads=1), tokens(2, heads=1, groups=1, tied=False)
    before = state.clone()
    args = [call[name].squeeze(1) for name in ("x", "dt")] + [call["A"][0]] + [call[n].squeeze(1) for n in ("B", "C")]
    out = selective_state_update(state.squeeze(1), *args)
    assert out.shape == (2, 64)
    for b in range(2):
        new, y = token(
            wide(before[b]), **{**at_row(call, b), "D": None, "z": None, "dt_bias": None, "dt_softplus": False}
        )
        assert close(out[b], y[0])
        assert close(state[b], new)


def test_any_strides_and_types_of_the_token():
    """As projections leave them: transposed, or in a type that autocast chose."""
    state, call = states(3), tokens(3, tied=False)
    want_state = state.clone()
    want = selective_state_update(want_state, **call)
    for name in ("x", "B", "C", "z", "A"):
        call[name] = call[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    same_bits(selective_state_update(state, **call), want)
    same_bits(state, want_state)
    half = {**tokens(3), "B": tokens(3)["B"].double(), "z": tokens(3)["z"].half()}
    out = selective_state_update(states(3), **half)
    assert out.dtype == torch.float32
    assert np.isfinite(wide(out)).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_projections_in_float32_beside_16_bit_tokens_are_not_rounded(kind):
    call = tokens(3)
    call |= {name: call[name].to(kind) for name in ("x", "dt", "z")}
    state, want_state = states(3), states(3)
    out = selective_state_update(state, **call)
    exact = selective_state_update(want_state, **{**call, "x": call["x"].float(), "z": call["z"].float()})
    assert out.dtype == kind
    same_bits(out, exact.to(kind))
    same_bits(state, want_state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": states(2)}, ValueError, "state: expected at least batch = 3 slots, got 2; pass state_batch_indices"),
        ({"x": None}, TypeError, "x: expected a torch.Tensor, or an array with __dlpack__, got NoneType"),
        ({"B": torch.zeros(3, 3, 32)}, ValueError, r"B: expected ngroups that divides nheads = 4, got ngroups = 3"),
        ({"D": torch.zeros(4, 32)}, ValueError, r"D: expected shape \(nheads, dim\) = \(4, 64\), got \(4, 32\)"),
        ({"state": states(3, dim=32, dstate=64).transpose(-1, -2)}, ValueError, "state: expected contiguous rows"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        selective_state_update(**{"state": states(3), **tokens(3), **change})

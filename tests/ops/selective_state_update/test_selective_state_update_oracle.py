"""`selective_state_update` with one token against a NumPy loop, and the mathematics in float64 against the same loop.

The loop, `token_cases.Oracle`, goes over sequences, heads and tokens in float64 and shares nothing with the package.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from bits import equal
from memory import copy
from token_cases import PAD, Oracle, Tokens, arguments, check, numpy

import cute_ssm
from cute_ssm.ops.selective_state_update.reference import selective_state_update as mathematics
from cute_ssm.reference import rounding

LAYOUTS = ("tied", "dense", "dense_A", "dense_dt")
ONE = Tokens(lengths=(1, 1, 1), nheads=4)


def one_token(case: Tokens, seed: int = 0, matrices: bool = False) -> dict:
    """A call whose tokens have no axis T; index matrices of such calls have one column in use."""
    call = arguments(case, seed)
    for name in ("x", "dt", "B", "C", "z", "out"):
        if call.get(name) is not None:
            call[name] = call[name][:, 0]
    if matrices:
        for name in ("state_batch_indices", "dst_state_batch_indices"):
            if name in call and call[name].dim() == 1:
                call[name] = torch.stack([call[name], torch.full_like(call[name], 99)], 1)
    return call


def verify(case: Tokens, seed: int = 0, matrices: bool = False) -> dict:
    call = one_token(case, seed, matrices)
    before = copy(call)
    out = cute_ssm.selective_state_update(**call)
    check(case, before, call, out)
    return call


CASES = [
    *(dataclasses.replace(ONE, layout=layout, ngroups=groups) for layout in LAYOUTS for groups in (1, 2, 4)),
    *(dataclasses.replace(ONE, state=state, layout=layout) for state in ("f32", "bf16", "i16", "i8", "f8")
      for layout in ("tied", "dense")),
    *(dataclasses.replace(ONE, io=io) for io in ("f32", "f16")),
    *(dataclasses.replace(ONE, state=state, rounds=7) for state in ("f16", "bf16", "i16", "i8", "f8")),
    *(dataclasses.replace(ONE, dim=dim, dstate=dstate) for dim, dstate in ((8, 16), (80, 100), (128, 256))),
    *(dataclasses.replace(ONE, destination=kind) for kind in ("vector", "intermediates")),
    dataclasses.replace(ONE, has_z=False, give_out=False),
    dataclasses.replace(ONE, disabled=True),
    dataclasses.replace(ONE, indices=None, pads=()),
    dataclasses.replace(ONE, indices=torch.int64, pads=(0, 1, 2)),
    dataclasses.replace(ONE, decay=400.0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.parametrize("case", CASES[:12:5] + CASES[12::7], ids=str)
def test_kernel(case, backend):
    with backend(checks=False):
        verify(case)


@pytest.mark.parametrize("destination", ["source", "vector"])
def test_column_0_of_matrices(destination):
    verify(dataclasses.replace(ONE, destination=destination), matrices=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_token_is_a_sequence_of_one(layout):
    """(batch, nheads, dim), (batch, 1, nheads, dim) and packed sequences of one say the same."""
    case = dataclasses.replace(ONE, layout=layout, pads=())
    results = []
    for form in ("one", "batched", "packed"):
        call = arguments(case) if form == "batched" else one_token(case)
        if form == "packed":
            call["cu_seqlens"] = torch.arange(4, dtype=torch.int32)
        out = cute_ssm.selective_state_update(**call)
        results.append((out.reshape(3, 4, 64), call["state"][call["state_batch_indices"].long()]))
    for out, state in results[1:]:
        equal(out, results[0][0])
        equal(state, results[0][1])


@pytest.mark.parametrize("state", ["f32", "f16", "i8"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mathematics_in_float64(layout, groups, state):
    """Token by token from the stored state; relative to the sum of the magnitudes of a value's terms."""
    case = dataclasses.replace(ONE, lengths=(3, 3, 3), layout=layout, ngroups=groups, state=state)
    call = arguments(case)
    oracle = Oracle(call)
    slots = call["state_batch_indices"].long()
    real = (slots != PAD).nonzero()[:, 0]
    h = call["state"][slots[real]].double()
    if state == "i8":
        h = h * call["state_scale"][slots[real]].double()[..., None]
    else:
        equal(h.float(), rounding.load(call["state"][slots[real]], None))
    for t in range(3):
        x, dt, B, C, z = (call[name][real, t] for name in ("x", "dt", "B", "C", "z"))
        y, h = mathematics(
            h, x, dt, call["A"], B, C, call["D"], z, call["dt_bias"], call["dt_softplus"], compute_dtype=torch.float64
        )
        for i, b in enumerate(real.tolist()):
            want, size, _ = oracle.outputs[b, t]
            assert (np.abs(numpy(y[i]) - want) <= 1e-12 * size).all()
    for i, b in enumerate(real.tolist()):
        (found,) = [(want, size) for _, at, want, size, _ in oracle.stores if at == (int(slots[b]),)]
        assert (np.abs(numpy(h[i]) - found[0]) <= 1e-12 * found[1]).all()


def test_oracle_by_hand():
    """One head, two tokens, numbers that can be followed: the loop itself is right."""
    one = torch.ones
    call = {
        "state": one(1, 1, 8, 16), "x": one(1, 2, 1, 8) * 3, "dt": one(1, 2, 1, 8) * 0.5, "A": one(1, 8, 16) * -2,
        "B": one(1, 2, 1, 16) * 5, "C": one(1, 2, 1, 16), "D": one(1, 8) * 7, "z": None,
        "dt_bias": torch.zeros(1, 8), "disable_state_update": False,
    }  # fmt: skip
    step = np.log1p(np.exp(0.5))
    first = np.exp(-2 * step) + 15 * step
    second = first * np.exp(-2 * step) + 15 * step
    oracle = Oracle(call)
    for t, h in enumerate((first, second)):
        assert np.allclose(oracle.outputs[0, t][0], 16 * h + 21, rtol=1e-14)
    ((pool, at, state, *_),) = oracle.stores
    assert (pool, at) == ("state", (0,))
    assert np.allclose(state, second, rtol=1e-14)

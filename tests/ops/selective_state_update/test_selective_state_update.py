"""`selective_state_update` against the float64 oracle: reference and compiled kernel, one factor at a time."""

from __future__ import annotations

import mmap

import pytest
import torch
from bits import equal, same_memory
from cases import vary
from kernel_backends import both
from memory import copy
from step_cases import DECAYS, Case, arguments, expected, verify

import cute_ssm
from cute_ssm import tuning

BASE = Case()


CASES = [
    BASE,
    *vary(
        BASE,
        state=("f32", "bf16"),
        io=("f32", "f16"),
        dt=("bf16", "f16"),
        A=("bf16", "f16"),
        weights=("bf16", "f16"),
        dim=(8, 24, 80, 128),
        dstate=(8, 9, 16, 17, 64, 96, 100, 256),
        ngroups=(1, 4),
        layout=("dense", "dense_A", "dense_dt"),
        softplus=(False,),
        has_z=(False,),
        has_D=(False,),
        has_bias=(False,),
        indices=(None, torch.int64),
        separate=(True,),
        pads=((), (0, 1, 2)),
        update=(False,),
        give_out=(False,),
        strided=(True,),
        decay=("slow", "fast"),
        batch=(1,),
    ),
    Case(state="f32", io="f32", layout="dense", dstate=16, nheads=1, ngroups=1, dim=128),  # Mamba-1
    Case(state="f32", io="bf16", layout="dense", dstate=8, nheads=1, ngroups=1, dim=128),
    Case(state="bf16", io="bf16", layout="dense", dstate=8, nheads=1, ngroups=1, dim=128),  # a lane for every row
    Case(state="f32", dstate=96, strided=True, layout="dense"),
    Case(state="bf16", dstate=17, dim=40, strided=True, io="f16", dt="f16"),
    Case(state="f32", dstate=256, dim=128, nheads=2, batch=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(6, "state", "io")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, backend):
    with backend(shuffle_sync=False):
        verify(case)


PERSISTENT = {"stages": 3, "warps": 2, "ctas_per_sm": 1}


@pytest.mark.thin(8)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=5, nheads=6, pads=(0, 3)),
        Case(batch=5, nheads=6, state="f32", separate=True, pads=(2, 4)),
        Case(batch=5, nheads=6, update=False, indices=None),
        Case(batch=4, nheads=2, dim=80, dstate=96, state="bf16", layout="dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "mode", [{}, {"async_mode": "late"}, {"schedule": 1}, {"schedule": 2, "async_mode": "late"}], ids=str
)
def test_persistent_ring(case, mode, backend):
    """Several units per warp, so that stages are used again, under delayed copies and other interleavings."""
    rows = 16 if case.dim % 32 else 32
    with backend(shuffle_sync=False, sm_count=1, **mode) as session:
        with tuning.override(rows=rows, **PERSISTENT):
            verify(case)
        assert session.launches[-1].grid == (1, 1, 1)


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", [BASE, *vary(BASE, state=("f32", "bf16"), layout=("dense",), dstate=(96,))], ids=str)
def test_sm_100a(case, backend):
    with backend("sm_100a", shuffle_sync=False):
        verify(case)


@pytest.mark.thin(2)
@pytest.mark.parametrize("io", ["bf16", "f32"])
def test_bits_do_not_depend_on_batch_tiling_or_repetition(io, backend):
    """The same sequence gives the same bits alone, in any order of a batch, and whatever the config."""
    call = arguments(Case(batch=4, nheads=2, pads=(), give_out=False, io=io))
    results = []
    with backend(checks=False):
        for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1], [3]):
            turn = copy(call)
            for name in ("x", "dt", "B", "C", "z", "state_batch_indices"):
                turn[name] = turn[name][order]
            out = cute_ssm.selective_state_update(**turn)
            results.append((out[order.index(3)], turn["state"][call["state_batch_indices"][3]]))
        for config in ({"rows": 16, "stages": 3}, {"rows": 64, "warps": 2}, {"rows": 8}):
            turn = copy(call)
            with tuning.override(**config):
                out = cute_ssm.selective_state_update(**turn)
            results.append((out[3], turn["state"][call["state_batch_indices"][3]]))
    for out, state in results[1:]:
        equal(out, results[0][0])
        equal(state, results[0][1])


@both
def test_decode_of_many_steps(backend):
    """Forty steps: errors of a stored float16 state stay what forty roundings explain."""
    case = Case(batch=2, nheads=2, ngroups=1, dim=32, dstate=32, pads=(), give_out=False)
    call = arguments(case)
    call["state"].nan_to_num_(0.0)
    exact = call["state"].double()
    with backend(checks=False):
        for step in range(40):
            fresh = arguments(case, seed=step)
            call.update({name: fresh[name] for name in ("x", "dt", "B", "C", "z")})
            want, new, size, _ = expected({**call, "state": exact}, torch.float64)
            exact[call["state_batch_indices"].long()] = new
            out = cute_ssm.selective_state_update(**call)
            assert ((out.double() - want).abs() / size).max() < 2**-7
    real = call["state_batch_indices"].long()
    assert (call["state"][real].double() - exact[real]).abs().max() < 40 * 2**-11 * exact[real].abs().max()


def test_headless_shorthand(backend):
    """Leaving out the axis of a single head is the same as a single head, tensor by tensor."""
    full = arguments(Case(nheads=1, ngroups=1, layout="dense", strided=True))
    short = copy(full)
    for name in ("state", "x", "dt", "B", "C", "z", "out"):
        short[name] = short[name][:, 0]
    for name in ("A", "D", "dt_bias"):
        short[name] = short[name][0]
    with backend(checks=False):
        wanted = cute_ssm.selective_state_update(**full)
        got = cute_ssm.selective_state_update(**short)
    assert got.shape == (3, 64)
    equal(torch.nan_to_num(got.float()), torch.nan_to_num(wanted[:, 0].float()))
    same_memory(short["state"], full["state"])


@both
def test_two_dimensional_indices_use_column_0(backend):
    call = arguments(Case(separate=True))
    matrix = copy(call)
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        matrix[name] = torch.stack([call[name], torch.full_like(call[name], 10**6)], 1)
    with backend(checks=False):
        cute_ssm.selective_state_update(**call)
        cute_ssm.selective_state_update(**matrix)
    same_memory(matrix["state"], call["state"])
    same_memory(matrix["out"], call["out"])


def test_slots_beyond_2_to_the_31_elements(backend):
    """A pool of 2^33 elements, mapped but never touched except in its last slot: offsets are 64 bits wide."""
    heads, dim, dstate, stride = 1, 32, 16, 2**31
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * stride * 2 + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    flat = torch.frombuffer(memory, dtype=torch.float16)
    state = flat.as_strided((5, heads, dim, dstate), (stride, dim * dstate, dstate, 1))
    call = arguments(Case(batch=1, nheads=heads, ngroups=1, dim=dim, dstate=dstate, pads=(), give_out=False))
    near = copy(call)
    slot = int(call["state_batch_indices"][0])
    far = {**call, "state": state, "state_batch_indices": torch.tensor([4], dtype=torch.int32)}
    try:
        state[4] = call["state"][slot]
    except RuntimeError as error:  # a machine that cannot map it
        pytest.skip(str(error))
    with backend(checks=False):
        out = cute_ssm.selective_state_update(**far)
        wanted = cute_ssm.selective_state_update(**near)
    equal(out, wanted)
    equal(state[4], near["state"][slot])
    assert not state[:4, :, :, 0].any()


def test_empty_batch(backend):
    call = arguments(Case(batch=1, pads=()))
    for name in ("x", "dt", "B", "C", "z", "out", "state_batch_indices"):
        call[name] = call[name][:0]
    before = copy(call)
    cute_ssm.selective_state_update(**call)
    with backend(checks=False):
        assert cute_ssm.selective_state_update(**call).shape == (0, 4, 64)
    same_memory(before["state"], call["state"])


def test_every_decay_regime_is_what_it_says():
    for name, (low, high) in {"slow": (0.99, 1.0), "typical": (0.3, 0.999), "fast": (0.0, 0.2)}.items():
        call = arguments(Case(decay=name, batch=8))
        step = torch.nn.functional.softplus(call["dt"] + call["dt_bias"])
        assert low <= torch.exp(call["A"][:, 0, 0, None] * step).median() <= high
    assert set(DECAYS) == {"slow", "typical", "fast"}

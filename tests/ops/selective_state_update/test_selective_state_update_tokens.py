"""`selective_state_update` with several tokens, all state types, roundings and destinations, against a NumPy loop."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from bits import equal, same_memory
from cases import vary
from memory import copy
from token_cases import LARGEST, Path, Tokens, arguments, path_of, verify

import cute_ssm
import ptxsim
from cute_ssm import arch, runtime, tuning

BASE = Tokens()


LOOP = {"matmul": 0, "lanes": 8}  # token by token where the choice would be products of few tokens
PACKED = Tokens(packed=True, lengths=(3, 0, 1, 5), pads=(0,))
CASES = [
    BASE,
    *vary(
        BASE,
        state=("f32", "bf16", "i16", "i8", "f8"),
        io=("f32", "f16"),
        layout=("dense", "dense_A", "dense_dt"),
        dim=(8, 80, 128),
        dstate=(8, 16, 96, 100, 128, 256),
        ngroups=(2,),
        has_z=(False,),
        indices=(None, torch.int64),
        destination=("vector", "matrix", "intermediates"),
        disabled=(True,),
        give_out=(False,),
        pads=((), (0, 1, 2)),
        decay=(1e-3, 30.0, 400.0),
        lengths=((1,), (2, 2), (9,), (40,)),
    ),
    PACKED,
    dataclasses.replace(PACKED, destination="matrix", accepted=True, cache_steps=5),
    dataclasses.replace(PACKED, destination="intermediates", state="i8", disabled=True),
    dataclasses.replace(PACKED, destination="vector", indices=torch.int64),
    dataclasses.replace(PACKED, give_out=False, layout="dense"),
    dataclasses.replace(PACKED, indices=None, pads=()),
    Tokens(accepted=True, destination="matrix"),
    Tokens(accepted=True),
    Tokens(destination="intermediates", rows=False, disabled=True),
    Tokens(destination="intermediates", state="f8", layout="dense"),
    *(Tokens(state=s, rounds=10) for s in ("f16", "bf16", "i16", "i8", "f8")),
    Tokens(state="f16", rounds=4, seed_per_slot=True, destination="matrix"),
    Tokens(state="i8", rounds=1, seed_per_slot=True, destination="intermediates", dstate=128),
    Tokens(state="bf16", rounds=10, layout="dense", packed=True, lengths=(2, 3)),
    *(Tokens(lengths=(1, 1, 1), state=s, rounds=r) for s in ("i16", "i8", "f8") for r in (0, 10)),
    Tokens(lengths=(1, 1, 1), state="f16", rounds=10, dstate=128),
    *(Tokens(state=s, rounds=10, layout="dense", dstate=8) for s in ("bf16", "i8")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(20, "state", "io", "destination")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, backend):
    with backend(shuffle_sync=False):
        verify(case)


@pytest.mark.thin(8)
@pytest.mark.parametrize(
    "case",
    [
        BASE,
        dataclasses.replace(PACKED, cache_steps=6),
        *vary(BASE, state=("bf16",), io=("f16",), decay=(1e-3, 400.0), dim=(80,), dstate=(96, 128), ngroups=(2,)),
        *vary(
            BASE,
            destination=("vector",),
            disabled=(True,),
            lengths=((8, 8), (1, 1), (2, 2)),
            rounds=(10,),
            has_z=(False,),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [{}, LOOP], ids=["products", "loop"])
def test_products_and_loop(case, config, backend):
    """What a spec of 16-bit operands can be computed by, both ways."""
    with backend(shuffle_sync=False) as session:
        with tuning.override(**config):
            verify(case)
    multiplies = any("mma.sync" in function.ptx for function in session.functions)
    assert multiplies == (not config and max(case.lengths) > 1)


@pytest.mark.parametrize(
    "case, config, path",
    [
        (BASE, {}, Path(multiplies=True)),
        (BASE, LOOP, Path(divides=True)),
        (Tokens(state="f32"), {}, Path(divides=True)),
        (Tokens(layout="dense_A"), {}, Path()),
        (Tokens(lengths=(1,), pads=()), {}, Path()),
    ],
    ids=str,
)
def test_bounds_have_the_terms_of_the_code_that_runs(case, config, path):
    """Without softplus and gate, only divisions by running products take rcp."""
    call = arguments(dataclasses.replace(case, has_z=False)) | {"dt_softplus": False}
    assert path_of(call) == Path(), "by the reference"
    with ptxsim.emulate(), tuning.override(**config):
        assert path_of(call) == path
        with runtime.planned(arch.SM_90A) as plan:
            cute_ssm.selective_state_update(**call)
    ((spec, chosen, target),) = plan.kernels
    ptx = runtime.emulated(spec, chosen, target).ptx
    assert Path("rcp.approx" in ptx, "mma.sync" in ptx) == path


@pytest.mark.parametrize(
    "case",
    [
        BASE,
        Tokens(state="f16", rounds=10),
        Tokens(state="i8", destination="matrix"),
        Tokens(state="f8", layout="dense"),
    ],
    ids=str,
)
def test_sm_100a(case, backend):
    with backend("sm_100a", shuffle_sync=False):
        verify(case)


@pytest.mark.thin(5)
@pytest.mark.parametrize(
    "mode", [{"async_mode": "late"}, {"schedule": 1}, {"schedule": 2, "async_mode": "late"}], ids=str
)
@pytest.mark.parametrize(
    "case",
    [
        Tokens(lengths=(2,) * 5, nheads=4, pads=(0, 3), destination="matrix"),
        Tokens(lengths=(3, 0, 1, 2, 2), packed=True, nheads=4, pads=(1,), destination="intermediates", state="i8"),
        Tokens(lengths=(2,) * 5, nheads=4, rounds=3),
    ],
    ids=str,
)
def test_persistent_ring(case, mode, backend):
    with backend(shuffle_sync=False, sm_count=1, **mode):
        with tuning.override(rows=32, stages=3, warps=2, ctas_per_sm=1):
            verify(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize("state", ["f16", "bf16", "i16", "i8", "f8"])
def test_random_bits_are_those_of_the_reference(state, backend):
    """Kernel and reference draw the same bits: stored states agree but where float32 differs in its last bits."""
    case = Tokens(state=state, rounds=10, dstate=128, destination="matrix", pads=())
    call = arguments(case)
    twin, other = copy(call), copy(call)
    other["rand_seed"] += 1
    with backend(checks=False):
        cute_ssm.selective_state_update(**call)
    for reference in (twin, other):
        cute_ssm.selective_state_update(**reference)
    slots = call["dst_state_batch_indices"][:, :4].flatten().long()
    slots = slots[slots >= 0]

    def agreement(a, b):
        return (a["state"][slots].float() == b["state"][slots].float()).float().mean().item()

    assert agreement(call, twin) > 0.98
    assert agreement(call, other) < 0.9


@pytest.mark.wide
def test_bits_of_both_targets_agree_where_arithmetic_does(backend):
    """Software rounding on sm_90a and cvt.rs on sm_100a: the same bits."""
    for state in ("f16", "bf16"):
        call = arguments(Tokens(state=state, rounds=10, dstate=128))
        twin = copy(call)
        with backend(checks=False):
            cute_ssm.selective_state_update(**call)
        with backend("sm_100a", checks=False):
            cute_ssm.selective_state_update(**twin)
        same_memory(call["state"], twin["state"])


@pytest.mark.thin(4)
@pytest.mark.parametrize("io", ["bf16", "f32"])
@pytest.mark.parametrize("state", ["f16", "i8"])
def test_bits_do_not_depend_on_tiling_or_batch(state, io, backend):
    case = Tokens(lengths=(3, 3, 3), state=state, io=io, rounds=5, pads=(), give_out=False, has_z=False)
    call = arguments(case)
    names = ("x", "dt", "B", "C", "state_batch_indices")
    results = []
    with backend(checks=False):
        for order, config in (
            ([0, 1, 2], {}),
            ([2, 0, 1], {}),
            ([2], {"rows": 32}),
            ([0, 1, 2], {"rows": 16, "stages": 3}),
        ):
            turn = copy(call)
            turn.update({name: turn[name][order] for name in names})
            with tuning.override(**config):
                out = cute_ssm.selective_state_update(**turn)
            results.append((out[order.index(2)], turn["state"][call["state_batch_indices"][2].long()]))
    for out, state_ in results[1:]:
        equal(out, results[0][0])
        equal(state_.float(), results[0][1].float())


@pytest.mark.thin(2)
@pytest.mark.parametrize("config", [{}, LOOP], ids=["products", "loop"])
def test_packed_is_one_by_one(config, backend):
    """A packed batch gives the bits of its sequences called alone."""
    case = Tokens(packed=True, lengths=(3, 2, 4), pads=(), give_out=False, cache_steps=8)
    call = arguments(case)
    alone = copy(call)
    with backend(checks=False), tuning.override(**config):
        out = cute_ssm.selective_state_update(**call)
        cu = alone["cu_seqlens"].tolist()
        for b in range(3):
            rows = slice(cu[b], cu[b + 1])
            part = {n: alone[n][None, rows] if alone[n] is not None else None for n in ("x", "dt", "B", "C", "z")}
            index = alone["state_batch_indices"][b : b + 1]
            single = {**alone, **part, "cu_seqlens": None, "state_batch_indices": index}
            got = cute_ssm.selective_state_update(**single)
            equal(got[0], out[rows], b)
    same_memory(alone["state"], call["state"])


def sample(rng: random.Random) -> Tokens:
    """A random legal configuration."""
    packed = rng.random() < 0.4
    batch = rng.randint(1, 4)
    lengths = tuple(rng.randint(0, 6) for _ in range(batch)) if packed else (rng.randint(1, 6),) * batch
    state = rng.choice(["f32", "f16", "bf16", "i16", "i8", "f8"])
    rounds = rng.choice([0, 0, 1, 5, 10]) if state != "f32" else 0
    narrow = state in LARGEST or rounds
    indices = rng.choice([None, torch.int32, torch.int64])
    destination = rng.choice(["source", "vector", "matrix", "intermediates"])
    accepted = indices is not None and rng.random() < 0.25
    nheads = rng.choice([1, 2, 4])
    return Tokens(
        lengths=lengths if max(lengths) else (1,) * batch,
        packed=packed,
        nheads=nheads,
        dim=rng.choice([8, 16, 64, 80]),
        dstate=rng.choice([8, 16, 32, 64, 96, 128] + ([] if narrow else [17, 100])),
        ngroups=rng.choice([g for g in (1, 2, 4) if nheads % g == 0]),
        state=state,
        io=rng.choice(["bf16", "f16", "f32"]),
        layout=rng.choice(["tied", "tied", "dense", "dense_A", "dense_dt"]),
        has_z=rng.random() < 0.5,
        decay=rng.choice([1e-3, 1.0, 30.0]),
        indices=indices,
        destination=destination,
        accepted=accepted,
        disabled=destination != "matrix" and rng.random() < 0.2,
        rows=rng.random() < 0.7,
        rounds=rounds,
        seed_per_slot=rng.random() < 0.3,
        pads=(rng.randrange(batch),) if rng.random() < 0.4 else (),
        give_out=rng.random() < 0.7,
    )


@pytest.mark.thin(10)
@pytest.mark.parametrize("seed", range(300))
def test_random_configuration_of_the_reference(seed):
    verify(sample(random.Random(seed)), seed)


@pytest.mark.thin(20)
@pytest.mark.parametrize("seed", [pytest.param(s, marks=() if s < 20 else pytest.mark.slow) for s in range(300)])
def test_random_configuration_of_the_kernel(seed, backend):
    case = sample(random.Random(seed))
    with backend(shuffle_sync=False):
        verify(case, seed)

"""`gated_delta_rule_mtp` against the float64 oracle: reference and compiled kernel, one factor at a time."""

from __future__ import annotations

import dataclasses
import mmap
import random

import pytest
import tensor_sums
import torch
from bits import equal, same_memory
from cases import vary
from gdn_cases import DTYPES, MODES, REGIMES, Case, arguments, expected, losses, verify, within
from kernel_backends import both
from memory import copy

import cute_ssm
from cute_ssm import tuning
from cute_ssm.ops.gated_delta_rule_mtp.reference import gated_delta_rule, gated_delta_rule_products

BASE = Case()


CASES = [
    BASE,
    *vary(BASE, mode=[mode for mode in MODES if mode != "update"]),
    *vary(BASE, regime=REGIMES[1:]),
    *vary(
        BASE,
        tokens=(1, 2, 3),
        ratio=(1, 4),
        heads=(3,),
        state=("bf16", "f16"),
        io=("f16",),
        out=(None, "bf16", "f16"),
        gate=("f32", "f16"),
        bias=("bf16",),
        indices=(torch.int64,),
        pads=((), (0, 1, 2)),
        l2norm=(False,),
        scale=(1.0,),
        strided=(True,),
        batch=(1,),
    ),
    Case(tokens=8),
    Case(tokens=7, regime="cut", mode="buffer_update", state="bf16"),
    Case(tokens=5, regime="collinear", mode="accepted", out=None, strided=True),
    *vary(Case(tokens=1), mode=[mode for mode in MODES if mode != "update"], state=("bf16", "f16"), io=("f16",)),
    *vary(Case(tokens=1), regime=REGIMES[1:], out=(None, "bf16")),
    Case(tokens=1, state="bf16", strided=True, l2norm=False, regime="fast", mode="buffer_update"),
    Case(tokens=16, K=64, out=None),
    Case(tokens=11, K=64, regime="fast", mode="scatter"),
]
SIZES = [
    Case(K=64, V=64, batch=1, pads=(), tokens=6, mode="buffer_update"),
    Case(K=256, V=64, batch=1, pads=(), out=None),
    Case(K=256, V=64, batch=1, pads=(), tokens=2, mode="accepted"),
    Case(K=256, V=256, batch=1, pads=(), tokens=1, out=None),
    Case(K=64, V=256, batch=1, pads=(), mode="verify", out=None),
    Case(K=128, V=128, batch=1, pads=(), tokens=8, state="f16", io="f16", out=None),
    Case(K=96, V=192, batch=1, pads=(), mode="accepted"),
    Case(K=192, V=192, batch=1, pads=(), tokens=1, out=None),
    Case(K=16, V=48, batch=1, pads=(), tokens=2, mode="buffer_update"),
    Case(K=256, V=512, batch=1, pads=(), tokens=2, mode="verify", out=None),
]


@pytest.mark.parametrize("case", CASES + SIZES, ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(25, "mode", "state")
@pytest.mark.parametrize("case", CASES + SIZES, ids=str)
def test_kernel(case, backend):
    with backend():
        verify(case)


@pytest.mark.thin(4)
@pytest.mark.parametrize("mode", ["verify", "accepted_split", "buffer_update", "scatter"])
def test_one_token_after_the_other(mode, backend):
    """Two tokens in the form that is chosen for one, and one in that of more."""
    with backend():
        with tuning.override(sequential=1):
            verify(Case(tokens=2, mode=mode))
        with tuning.override(sequential=0):
            verify(Case(tokens=1, mode=mode))


@pytest.mark.thin(2)
@pytest.mark.parametrize("tokens", [4, 8])
def test_sm_100a(tokens, backend):
    with backend("sm_100a"):
        verify(Case(tokens=tokens, mode="buffer_update", batch=2))


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "mode", [{"async_mode": "late"}, {"schedule": 1}, {"schedule": 2, "async_mode": "late"}], ids=str
)
def test_schedules(mode, backend):
    with backend(**mode):
        verify(Case(mode="split", out=None))
        verify(Case(tokens=8))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_products_are_the_recurrence(tokens, regime):
    """The form that the kernel computes is the same mathematics."""
    call = arguments(Case(tokens=tokens, regime=regime, pads=(), K=64))
    first = call["initial_state"][call["initial_state_indices"].long()]
    inputs = (first, *(call[n] for n in ("q", "k", "v", "a", "b", "A_log", "dt_bias")), 0.3, True, torch.float64)
    for got, want in zip(gated_delta_rule_products(*inputs), gated_delta_rule(*inputs)):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.thin(7, "backend")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_error_is_that_of_sequential_float32(tokens, regime, backend):
    """Average errors over many heads, without the allowance that `within` makes; and what tensor cores lose."""
    call = arguments(Case(tokens=tokens, regime=regime, pads=(), batch=4, heads=16, ratio=1))
    (want, states), (want32, states32) = (expected(call, dtype) for dtype in (torch.float64, torch.float32))
    with backend(checks=False):
        lost_out, lost_states = losses(call) or (torch.zeros(2, 1), torch.zeros(2, 1, 1))
        out, pool = cute_ssm.gated_delta_rule_mtp(**call)
    state = pool[call["initial_state_indices"].long()]
    for got, single, exact, lost, dims in (
        (out, want32, want, lost_out, (-1,)),
        (state, states32[:, -1], states[:, -1], lost_states[:, :, -1], (-2, -1)),
    ):
        error, allowed, more = tensor_sums.averages(got, single, exact, lost, dims)
        assert error <= 1.5 * allowed + more, error / allowed


@pytest.mark.thin(3)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_bits_do_not_depend_on_batch_tiling_or_repetition(tokens, backend):
    """A request gives the same bits alone, in any order of a batch, in any slot, and whatever the config."""
    call = arguments(Case(tokens=tokens, batch=4, K=64, pads=(), out=None))
    rows = ("q", "k", "v", "a", "b", "initial_state_indices")
    results = []
    with backend(checks=False):
        for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1], [3]):
            turn = copy(call)
            turn.update({name: turn[name][order] for name in rows})
            out, pool = cute_ssm.gated_delta_rule_mtp(**turn)
            results.append((out[order.index(3)], pool[call["initial_state_indices"][3]]))
        for config in ({"rows": 16, "warps": 1}, {"rows": 64, "warps": 2}):
            turn = copy(call)
            with tuning.override(**config):
                out, pool = cute_ssm.gated_delta_rule_mtp(**turn)
            results.append((out[3], pool[call["initial_state_indices"][3]]))
        turn = copy(call)
        turn["initial_state"] = turn["initial_state"].roll(1, 0)
        turn["initial_state_indices"] = (turn["initial_state_indices"] + 1) % len(turn["initial_state"])
        out, pool = cute_ssm.gated_delta_rule_mtp(**turn)
        results.append((out[3], pool[turn["initial_state_indices"][3]]))
    for out, state in results[1:]:
        equal(out, results[0][0])
        equal(state, results[0][1])


@pytest.mark.thin(2)
@pytest.mark.parametrize("tokens", [4, 6])
def test_stored_states_are_the_final_states_of_prefixes(tokens, backend):
    """Bit for bit: the buffer, the scattered states, the accepted prefixes and the final state."""
    base = Case(tokens=tokens, pads=(), batch=1, K=64, mode="buffer_update")
    call = arguments(base)
    other = arguments(dataclasses.replace(base, mode="scatter"))
    other["ssm_state_indices"][0] = torch.arange(tokens)
    slot = int(call["initial_state_indices"][0])
    with backend(checks=False):
        first = copy(call)
        cute_ssm.gated_delta_rule_mtp(**call)
        cute_ssm.gated_delta_rule_mtp(**other)
        buffer = call["intermediate_states_buffer"]
        equal(call["initial_state"][slot], buffer[0, tokens - 1])
        for t in range(tokens):
            equal(other["initial_state"][t], buffer[0, t])
            turn = copy(first)
            del turn["intermediate_states_buffer"]
            turn["accepted_steps"] = torch.tensor([t + 1])
            cute_ssm.gated_delta_rule_mtp(**turn)
            equal(turn["initial_state"][slot], buffer[0, t])


def test_invariants(backend):
    """What must hold exactly: beta = 0 without decay, doubled values and states, and interpolation."""
    call = arguments(Case(pads=(), batch=1, regime="slow", io="f16"))
    slot = int(call["initial_state_indices"][0])
    with backend(checks=False):
        idle = copy(call)
        idle["A_log"].fill_(-60)
        idle["b"].fill_(-200)
        cute_ssm.gated_delta_rule_mtp(**idle)
        equal(idle["initial_state"][slot], call["initial_state"][slot])
        twice, once = copy(call), copy(call)
        twice["v"] *= 2
        twice["initial_state"] *= 2
        cute_ssm.gated_delta_rule_mtp(**once)
        cute_ssm.gated_delta_rule_mtp(**twice)
        equal(twice["output"], 2 * once["output"])
        equal(twice["initial_state"][slot], 2 * once["initial_state"][slot])
        exact = copy(call)
        exact["b"].fill_(60)
        cute_ssm.gated_delta_rule_mtp(**exact)
        k = exact["k"][0, -1, 0].double()
        held = exact["initial_state"][slot].double() @ (k / k.square().sum().sqrt())
        assert (held - exact["v"][0, -1].double()).abs().max() < 3e-6


def test_two_calls_are_one(backend):
    whole = arguments(Case(tokens=7, pads=(), mode="update", batch=2))
    parts = copy(whole)
    names = ("q", "k", "v", "a", "b", "output")
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**whole)
        for piece in (slice(0, 3), slice(3, 7)):
            cute_ssm.gated_delta_rule_mtp(**{**parts, **{n: parts[n][:, piece] for n in names}})
    rows = whole["initial_state_indices"].long()
    assert (parts["output"] - whole["output"]).abs().max() < 1e-6
    assert (parts["initial_state"][rows] - whole["initial_state"][rows]).abs().max() < 4e-6


@both
def test_decode_of_many_steps(backend):
    """Forty verifications, of which a varying number of tokens is accepted."""
    case = Case(batch=2, K=64, pads=(), mode="accepted", ratio=1)
    call = arguments(case)
    call["initial_state"].nan_to_num_(0.0)
    rows = call["initial_state_indices"].long()
    exact = call["initial_state"].double()
    single = call["initial_state"].clone()
    outputs = []
    with backend(checks=False):
        for step in range(40):
            fresh = arguments(case, seed=step)
            call.update({name: fresh[name] for name in ("q", "k", "v", "a", "b")})
            counts = call["accepted_steps"].copy_(torch.tensor([step % 5, (step * 3 + 1) % 5]))
            want, states = expected({**call, "initial_state": exact}, torch.float64)
            want32, states32 = expected({**call, "initial_state": single}, torch.float32)
            exact[rows] = states[torch.arange(2), counts.long()]
            single[rows] = states32[torch.arange(2), counts.long()]
            cute_ssm.gated_delta_rule_mtp(**call)
            outputs.append([call["output"].clone(), want32, want])
    within(*(torch.stack(part) for part in zip(*outputs)), (-1,), "outputs")
    within(call["initial_state"][rows], single[rows], exact[rows], (-2, -1), "state")


def test_number_of_tokens_scale_and_strides_need_no_compile(backend):
    with backend(checks=False) as session:
        for tokens, scale, strided, batch in ((5, 0.1, False, 3), (8, 2.0, True, 2), (6, None, True, 4)):
            verify(Case(tokens=tokens, scale=scale, strided=strided, batch=batch))
    assert len({id(function) for function in session.functions}) == 1


def test_default_output_is_fresh(backend):
    call = arguments(Case(out=None, mode="verify"))
    with backend(checks=False):
        one, _ = cute_ssm.gated_delta_rule_mtp(**call)
        two, _ = cute_ssm.gated_delta_rule_mtp(**call)
    assert one.data_ptr() != two.data_ptr()
    equal(one, two)


def test_padding_rows_keep_a_sentinel_and_nan_inputs_of_others_stay_away(backend):
    """Padding of the oracle's cases, and requests beside one full of NaN."""
    call = arguments(Case(out="bf16"))
    call["output"].fill_(42)
    for name in ("q", "k", "v", "a", "b"):
        call[name][1] = float("nan")
    clean = arguments(Case(out="bf16"))
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**call)
        cute_ssm.gated_delta_rule_mtp(**clean)
    assert (call["output"][1] == 42).all()
    for row in (0, 2):
        equal(call["output"][row], clean["output"][row])
    same_memory(call["initial_state"], clean["initial_state"])


@pytest.mark.long
def test_slots_beyond_2_to_the_31_elements(backend):
    """A pool of 2^33 elements, mapped but never touched except in its last slot: offsets are 64 bits wide."""
    stride, K, V = 2**31, 64, 64
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * stride * 2 + 2 * K * V + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    state = flat.as_strided((5, 1, V, K), (stride, V * K, K, 1))
    near = arguments(Case(batch=1, K=K, V=V, ratio=1, state="bf16", pads=()))
    slot = int(near["initial_state_indices"][0])
    far = {**copy(near), "initial_state": state, "initial_state_indices": torch.tensor([4], dtype=torch.int32)}
    try:
        state[4] = near["initial_state"][slot]
    except RuntimeError as error:  # a machine that cannot map it
        pytest.skip(str(error))
    with backend(checks=False):
        cute_ssm.gated_delta_rule_mtp(**far)
        cute_ssm.gated_delta_rule_mtp(**near)
    equal(far["output"], near["output"])
    equal(state[4], near["initial_state"][slot])
    assert not state[:4].any()


def test_empty_batch(backend):
    call = arguments(Case(batch=1, pads=()))
    for name in ("q", "k", "v", "a", "b", "output", "initial_state_indices"):
        call[name] = call[name][:0]
    before = copy(call)
    cute_ssm.gated_delta_rule_mtp(**call)
    with backend(checks=False):
        assert cute_ssm.gated_delta_rule_mtp(**call)[0].shape == (0, 4, 2, 64)
    same_memory(before["initial_state"], call["initial_state"])


def random_case(seed: int) -> Case:
    pick = random.Random(seed)
    mode = pick.choice(MODES)
    return Case(
        batch=pick.randint(1, 3),
        tokens=pick.randint(1, 16),
        heads=pick.randint(1, 2),
        ratio=pick.choice((1, 2, 3)),
        K=pick.choice((64, 64, 128, 256)),
        V=pick.choice((64, 64, 128, 256)),
        state=pick.choice(tuple(DTYPES)),
        io=pick.choice(("bf16", "f16")),
        out=pick.choice((None, *DTYPES)),
        gate=pick.choice(tuple(DTYPES)),
        bias=pick.choice(tuple(DTYPES)),
        mode=mode,
        indices=pick.choice((torch.int32, torch.int64)),
        pads=pick.choice(((), (0,), (1,))),
        l2norm=pick.random() < 0.7,
        scale=pick.choice((None, 1.0)),
        strided=pick.random() < 0.5,
        regime=pick.choice([r for r in REGIMES if r != "collinear"]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_configurations(seed, backend):
    case = random_case(seed)
    if not case.l2norm:  # keys of norm 1 by construction would need it; keep the recurrence a contraction otherwise
        case = dataclasses.replace(case, regime="fast")
    with backend(("sm_90a", "sm_100a")[seed % 2]):
        verify(case, seed)

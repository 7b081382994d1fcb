"""`selective_scan` and `selective_scan_fn` against the float64 oracle, by the reference and by the kernel."""

from __future__ import annotations

import dataclasses
import mmap
from contextlib import nullcontext

import kernel_backends
import pytest
import torch
from bits import equal, same_memory
from bounds import like_float32
from cases import vary
from kernel_backends import both
from memory import copy
from scan_cases import DECAYS, NULL, Case, arguments, expected, scan, segments, verify

import cute_ssm
from cute_ssm import tuning

BASE = Case()
PREFIX = Case(varlen=True, lengths=(21, 5, 16, 40), computed=(0, 3, 8, 29), block_size=8, nulls=(1,), dim=24, ngroups=2)


CASES = [
    BASE,
    *vary(
        BASE,
        io=("f32", "f16"),
        state=("io", None),
        dim=(1, 32, 72),
        dstate=(1, 2, 4, 5, 8, 17, 32, 64, 100, 128, 256),
        ngroups=(2, 4),
        grouped=(False,),
        softplus=(False,),
        has_z=(False,),
        has_D=(False,),
        has_bias=(False,),
        indices=(None, torch.int64),
        initial=(False,),
        nulls=((), (0, 1, 2)),
        in_place=(False,),
        layout=("odd", "packed"),
        slot_gap=(0, 3),
        decay=("slow", "fast"),
        lengths=((1,) * 3, (7,) * 2, (8,) * 2, (33,), (64,), (128,)),
    ),
    Case(in_place=False, give_out=False),
    Case(io="f32", decay="slow", lengths=(16,) * 3, dim=64),
    Case(varlen=True, lengths=(5, 0, 12, 1, 30)),
    Case(varlen=True, lengths=(5, 9, 12, 1, 30), layout="odd", io="f16"),
    Case(varlen=True, lengths=(5, 9, 12, 1, 30), layout="packed", in_place=False, indices=torch.int64),
    Case(varlen=True, lengths=(9, 23), in_place=False, give_out=False, ngroups=2, io="f32"),
    Case(varlen=True, lengths=(9, 23), state=None, in_place=False, grouped=False),
    Case(io="f32", state="io", layout="odd", softplus=False, dstate=5),
    Case(io="f16", state="io", layout="odd", dstate=24),
    Case(has_z=False, has_D=False, has_bias=False, softplus=False, in_place=False),
    PREFIX,
    *vary(PREFIX, nulls=((), (0, 1, 2, 3)), indices=(torch.int64,), state=("io",), layout=("odd",), in_place=(False,)),
    *vary(PREFIX, block_size=(1, 5, 13, 64)),
    dataclasses.replace(PREFIX, chunks=False, computed=(0, 8, 16, 24)),
    Case(lengths=(20,) * 3, computed=(0, 6, 12), block_size=6, chunks=False, nulls=()),
    Case(lengths=(20,) * 3, computed=(0, 6, 14), block_size=8, dstate=33),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(25, "io", "state")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, backend):
    with backend():
        verify(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "case", [BASE, PREFIX, *vary(BASE, io=("f32",), dstate=(64, 256)), Case(varlen=True, lengths=(5, 12, 30))], ids=str
)
def test_sm_100a(case, backend):
    with backend("sm_100a"):
        verify(case)


@pytest.mark.thin(24)
@pytest.mark.parametrize(
    "config", [{"lanes": 1, "warps": 2}, {"lanes": 2, "warps": 1, "tokens": 16}, {"lanes": 4, "warps": 4}], ids=str
)
@pytest.mark.parametrize("mode", [{}, {"async_mode": "late"}, {"schedule": 1}, {"schedule": 2}], ids=str)
@pytest.mark.parametrize("case", [Case(dim=130, lengths=(70, 70)), dataclasses.replace(PREFIX, dim=70)], ids=str)
def test_persistent(case, config, mode, backend):
    """Several tiles and sequences one after another in a CTA, under other interleavings of its warps."""
    with backend(sm_count=1, **mode) as session:
        with tuning.override(ctas_per_sm=1, **config):
            verify(case)
        assert session.launches[-1].grid == (1, 1, 1)


def close(got, wanted, backend):
    """The kernel's bits are the same; PyTorch's functions depend on the size of a tensor in the last bit."""
    tolerance = 0.0 if backend is kernel_backends.kernel else 2.0**-7 if got.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.thin(5, "way")
@pytest.mark.parametrize("length", [1, 7, 128, 1024, 4096])
@pytest.mark.parametrize("way", ["reference", "kernel", "kernel-whole"])
def test_lengths(length, way, backend):
    """So few channels are scanned in parts from 512 tokens on, unless that is forbidden."""
    case = Case(lengths=(length,), dim=8, io="bf16", layout="packed" if length % 8 == 0 else "pitched", nulls=())
    if way == "reference":
        verify(case)
        return
    whole = tuning.override(splits=1) if way == "kernel-whole" else nullcontext()
    with backend(checks=False) as session, whole:
        verify(case)
    assert len(session.launches) == (2 if way == "kernel" and length >= 512 else 1)


@pytest.mark.thin(2, "backend")
@both
@pytest.mark.parametrize("state", ["f32", "bf16"])
def test_chunks_carry_the_state(backend, state):
    """Three calls that carry the state give what one does: the same bits, if the state is float32."""
    case = Case(lengths=(96, 96), io="bf16", state=state, nulls=(), in_place=False)
    call = arguments(case)
    whole = copy(call)
    with backend(checks=False):
        scan(case, whole)
        for begin, end in ((0, 41), (41, 48), (48, 96)):
            part = {n: call[n][..., begin:end] for n in ("u", "delta", "B", "C", "z", "out")}
            turn = {**call, **part}
            if begin:
                turn["has_initial_state"] = torch.ones(2, dtype=torch.bool)
            scan(case, turn)
    slots = call["cache_indices"].long()
    if state == "f32":
        close(call["out"], whole["out"], backend)
        close(call["ssm_states"][slots], whole["ssm_states"][slots], backend)
    else:
        torch.testing.assert_close(call["out"], whole["out"], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(call["ssm_states"][slots], whole["ssm_states"][slots], rtol=2e-2, atol=2e-2)


@pytest.mark.thin(2)
@both
def test_packed_sequences_are_those_of_single_calls(backend):
    """Every sequence of a packed batch has the result it has alone, wherever it begins; slots are permuted."""
    case = Case(varlen=True, lengths=(5, 9, 32, 1, 30), nulls=(), in_place=False)
    call = arguments(case)
    single = copy(call)
    with backend(checks=False):
        scan(case, call)
        begin = 0
        for b, length in enumerate(case.lengths):
            part = {n: single[n][..., begin : begin + length] for n in ("u", "delta", "B", "C", "z", "out")}
            part |= {n: single[n][b : b + 1] for n in ("cache_indices", "has_initial_state")}
            scan(case, {**single, **part, "query_start_loc": torch.tensor([0, length])})
            begin += length
    close(single["out"], call["out"], backend)
    close(single["ssm_states"], call["ssm_states"], backend)


@pytest.mark.wide
def test_bits_do_not_depend_on_batch_tiling_or_repetition(backend):
    call = arguments(Case(lengths=(45,) * 4, dim=40, nulls=(), in_place=False, dstate=12))
    names = ("u", "delta", "B", "C", "z", "cache_indices", "has_initial_state")
    slot = int(call["cache_indices"][3])
    results = []
    with backend(checks=False):
        for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1], [3]):
            turn = copy(call)
            turn.update({name: turn[name][order] for name in names})
            turn["out"] = torch.empty(len(order), 40, 45).bfloat16()
            out = cute_ssm.selective_scan(**turn)
            results.append((out[order.index(3)], turn["ssm_states"][slot]))
        for config in ({"lanes": 1}, {"lanes": 2, "warps": 2}, {"lanes": 4, "tokens": 8}, {"lanes": 1, "tokens": 16}):
            turn = copy(call)
            with tuning.override(**config):
                out = cute_ssm.selective_scan(**turn)
            results.append((out[3], turn["ssm_states"][slot]))
    for out, state in results[1:]:
        equal(out, results[0][0])
        equal(state, results[0][1])


@both
def test_prefix_caching_saves_the_states_at_boundaries(backend):
    """The state in a block's slot is the final state of a call that ends there, the same bits in the kernel."""
    case = dataclasses.replace(PREFIX, nulls=(), in_place=False)
    call = arguments(case)
    before = copy(call)
    with backend(checks=False):
        scan(case, call)
        for _, begin, slot, ends in segments(case, before):
            for end, target in ends:
                part = {n: before[n][..., begin:end][None] for n in ("u", "delta", "B", "C", "z")}
                states = torch.zeros(1, case.dim, case.dstate)
                if slot is not None:
                    states[0] = before["ssm_states"][slot]
                weights = {n: before[n] for n in ("A", "D", "delta_bias", "delta_softplus")}
                cute_ssm.selective_scan(
                    ssm_states=states, has_initial_state=torch.tensor([slot is not None]), **part, **weights
                )
                close(call["ssm_states"][target], states[0], backend)


@both
@pytest.mark.parametrize(("ends", "columns"), [([0, 4, 8, 12], [0, 1, 2]), ([0, 8, 12, 14], [0, 1, 2])], ids=str)
def test_a_short_first_chunk_completes_a_block(ends, columns, backend):
    """Columns count from the end of a block, if the first of several chunks is shorter, whatever the others are."""
    case = Case(lengths=(ends[-1],), varlen=True, computed=(0,), block_size=8, nulls=(), in_place=False, dim=8)
    call = arguments(case)
    index = {"dtype": torch.int32}
    call.update(
        ssm_states=torch.zeros(4, case.dim, case.dstate),
        cache_indices=torch.tensor([[1, 2, 3]], **index),
        block_idx_last_scheduled_token=torch.tensor([2], **index),
        cu_chunk_seqlen=torch.tensor(ends, **index),
        last_chunk_indices=torch.tensor([2], **index),
    )
    whole = copy(call)
    with backend(checks=False):
        scan(case, call)
        for end, column in zip(ends[1:], columns):
            part = {n: whole[n][..., :end][None] for n in ("u", "delta", "B", "C", "z")}
            weights = {n: whole[n] for n in ("A", "D", "delta_bias", "delta_softplus")}
            states = torch.zeros(1, case.dim, case.dstate)
            cute_ssm.selective_scan(ssm_states=states, **part, **weights)
            close(call["ssm_states"][1 + column], states[0], backend)


@both
def test_null_destinations_are_not_written(backend):
    """A block that the table maps to the null block keeps its state to itself; the null slot's bytes stay."""
    case = dataclasses.replace(PREFIX, nulls=(), in_place=False)
    call = arguments(case)
    sequences = segments(case, call)
    call["cache_indices"][3, 4] = NULL  # tokens 32 to 39 of the last sequence
    before = copy(call)
    with backend(initcheck=False):
        scan(case, call)
    equal(call["ssm_states"][NULL].isnan(), before["ssm_states"][NULL].isnan())
    _, saved = expected(case, before, torch.float64)
    assert len(saved) == sum(len(ends) for *_, ends in sequences) - 1
    for slot, state in saved:
        torch.testing.assert_close(call["ssm_states"][slot].double(), state, rtol=1e-5, atol=1e-5)


@pytest.mark.thin(5, "backend")
@both
@pytest.mark.parametrize("names", [("delta",), ("z",), ("delta", "z"), ("u",), ("B", "C", "u", "delta", "z")])
def test_other_strides_receive_the_result(names, backend):
    """Results land in the caller's tensors whatever their strides, and the strides' gaps stay as they are."""
    case = Case(nulls=(1,))
    call = arguments(case)
    plain = copy(call)
    for name in names:
        wide = torch.full((*call[name].shape, 2), float("nan"), dtype=call[name].dtype)
        wide[..., 0] = call[name]
        call[name] = wide[..., 0]
    u = call["u"].clone()
    with backend(checks=False):
        out = scan(case, call)
        scan(case, plain)
    assert out is call["z"]
    for name in ("delta", "z"):
        equal(call[name], plain[name], name)
        if name in names:
            assert call[name].as_strided((call[name].numel(),), (2,), 1).isnan().all()
    equal(call["u"], u)


@both
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_out_may_be_an_input(name, backend):
    case = Case(in_place=False, give_out=False, nulls=())
    call = arguments(case)
    with backend(initcheck=False):
        wanted = scan(case, copy(call))
        got = scan(case, {**call, "out": call[name]})
    assert got is call[name]
    equal(got, wanted)


@both
def test_matrix_of_indices_uses_column_0(backend):
    case = Case()
    call = arguments(case)
    matrix = copy(call)
    matrix["cache_indices"] = torch.stack([call["cache_indices"], torch.full_like(call["cache_indices"], 10**6)], 1)
    with backend(checks=False):
        scan(case, call)
        scan(case, matrix)
    same_memory(matrix["ssm_states"], call["ssm_states"])
    same_memory(matrix["z"], call["z"])


@pytest.mark.parametrize(
    "change", [{"lengths": ()}, {"lengths": (0, 0)}, {"varlen": True, "lengths": (0, 0, 0)}], ids=str
)
def test_nothing_to_do(change, backend):
    case = dataclasses.replace(BASE, nulls=(), **change)
    if case.lengths:
        call = arguments(case)
    else:
        call = arguments(Case(nulls=()))
        call.update({n: call[n][:0] for n in ("u", "delta", "B", "C", "z", "cache_indices", "has_initial_state")})
    before = copy(call)
    scan(case, call)
    with backend(checks=False):
        assert scan(case, call).shape == call["u"].shape
    same_memory(before["ssm_states"], call["ssm_states"])


def test_slots_beyond_2_to_the_31_elements(backend):
    """A pool of 2^33 elements, mapped but never touched except in its last slot: offsets are 64 bits wide."""
    dim, dstate, stride = 32, 16, 2**31
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 4 * stride * 2 + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    states = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((5, dim, dstate), (stride, dstate, 1))
    case = Case(lengths=(9,), dim=dim, dstate=dstate, state="io", nulls=())
    call = arguments(case)
    near = copy(call)
    slot = int(call["cache_indices"][0])
    far = {**call, "ssm_states": states, "cache_indices": torch.tensor([4], dtype=torch.int32)}
    try:
        states[4] = call["ssm_states"][slot]
    except RuntimeError as error:  # a machine that cannot map it
        pytest.skip(str(error))
    with backend(checks=False):
        equal(scan(case, far), scan(case, near))
    equal(states[4], near["ssm_states"][slot])
    assert not states[:4, :, 0].any()


def test_every_decay_regime_is_what_it_says():
    for name, (low, high) in {"slow": (0.99, 1.0), "typical": (0.3, 0.999), "fast": (0.0, 0.2)}.items():
        call = arguments(Case(decay=name, io="f32"))
        step = torch.nn.functional.softplus(call["delta"] + call["delta_bias"][:, None])
        assert low <= torch.exp(call["A"].median() * step).median() <= high
    assert set(DECAYS) == {"slow", "typical", "fast"}


def test_bounds_reject_small_errors():
    want = torch.rand(1000, dtype=torch.float64) + 1
    like_float32([want.float()], [want.float()], [want], [want], ["same"])
    with pytest.raises(AssertionError, match="exceeds"):
        like_float32([want.float() * (1 + 2.0**-21)], [want.float()], [want], [want], ["off"])

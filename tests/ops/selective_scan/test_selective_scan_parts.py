"""Sequences of `selective_scan` that are split into parts: the carry pass, and everything that parts must not mix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bits import equal, same_memory
from cases import vary
from memory import copy
from scan_cases import NULL, Case, arguments, expected, scan, segments, verify

import cute_ssm
from cute_ssm import tuning
from cute_ssm.arch import ARCHS, SM_90A
from cute_ssm.ops.selective_scan import config as choices
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec

BASE = Case(lengths=(53,) * 3)
PREFIX = Case(varlen=True, lengths=(21, 5, 16, 40), computed=(0, 3, 8, 29), block_size=8, nulls=(1,), dim=24, ngroups=2)
RAGGED = Case(varlen=True, lengths=(45, 0, 12, 1, 30))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What parts hand on lies in memory that is NaN before."""
    empty = torch.empty

    def nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


CASES = [
    BASE,
    *vary(
        BASE,
        io=("f32", "f16"),
        state=("io", None),
        dim=(1, 72),
        dstate=(1, 5, 32, 100, 256),
        ngroups=(4,),
        softplus=(False,),
        has_z=(False,),
        has_D=(False,),
        has_bias=(False,),
        indices=(None, torch.int64),
        initial=(False,),
        nulls=((), (0, 1, 2)),
        in_place=(False,),
        layout=("odd", "packed"),
        decay=("slow", "fast"),
        lengths=((1,) * 3, (8,) * 2, (9,), (16,), (64,), (130,)),
    ),
    RAGGED,
    *vary(RAGGED, layout=("odd",), io=("f32",), in_place=(False,), state=(None,), nulls=((0, 2),)),
    PREFIX,
    *vary(PREFIX, nulls=((), (0, 1, 2, 3)), state=("io",), layout=("odd",), in_place=(False,), io=("f32",)),
    *vary(PREFIX, block_size=(1, 5, 13, 64)),
    dataclasses.replace(PREFIX, chunks=False, computed=(0, 8, 16, 24)),
    Case(lengths=(50,) * 3, computed=(0, 6, 12), block_size=6, chunks=False, nulls=()),
    Case(lengths=(50,) * 3, computed=(0, 6, 14), block_size=24, dstate=33),
]


@pytest.mark.thin(53, "io", "state")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case, backend):
    """Two launches against the oracle, with the bounds of one."""
    with backend() as session, tuning.override(splits=3):
        verify(case)
    assert len(session.launches) == 2


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", [BASE, PREFIX, dataclasses.replace(BASE, dstate=64, io="f32")], ids=str)
def test_sm_100a(case, backend):
    with backend("sm_100a"), tuning.override(splits=4):
        verify(case)


@pytest.mark.thin(4)
@pytest.mark.parametrize("splits", [1, 3, 7, 32])
@pytest.mark.parametrize("decay", ["slow", "typical", "fast"])
def test_any_number_of_parts(decay, splits, backend):
    """More parts than there are blocks of 8 tokens, too; folds are as exact as the scan they replace."""
    case = Case(lengths=(200,), io="f32", decay=decay, dim=8, nulls=(), layout="packed")
    with backend(initcheck=False), tuning.override(splits=splits):
        verify(case)


@pytest.mark.wide
@pytest.mark.parametrize("config", [{"lanes": 1, "warps": 2}, {"lanes": 4, "warps": 1, "tokens": 16}], ids=str)
@pytest.mark.parametrize("mode", [{}, {"async_mode": "late"}, {"schedule": 1}], ids=str)
@pytest.mark.parametrize("case", [Case(dim=70, lengths=(70, 70)), dataclasses.replace(PREFIX, dim=70)], ids=str)
def test_persistent(case, config, mode, backend):
    """All parts of all sequences one after another in one CTA, under other interleavings of its warps."""
    with backend(sm_count=1, **mode) as session:
        with tuning.override(ctas_per_sm=1, splits=3, **config):
            verify(case)
        assert [launch.grid for launch in session.launches] == [(1, 1, 1)] * 2


@pytest.mark.wide
@pytest.mark.parametrize("io", ["f32", "bf16"])
def test_parts_against_the_whole(io, backend):
    """What splitting changes is the rounding of the states that parts start from."""
    case = Case(lengths=(160,) * 2, io=io, in_place=False, nulls=())
    whole = arguments(case)
    parts = copy(whole)
    with backend(checks=False):
        with tuning.override(splits=1):
            scan(case, whole)
        with tuning.override(splits=5):
            scan(case, parts)
    slots = whole["cache_indices"].long()
    tolerance = 2.0**-7 if io == "bf16" else 1e-5
    torch.testing.assert_close(parts["out"], whole["out"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(parts["ssm_states"][slots], whole["ssm_states"][slots], rtol=1e-5, atol=1e-5)
    equal(parts["out"][..., :32], whole["out"][..., :32], "the first part starts where the sequence does")
    if io == "f32":
        assert not torch.equal(parts["out"], whole["out"]), "a scan that was not split proves nothing"


@pytest.mark.wide
def test_bits_do_not_depend_on_batch_tiling_or_repetition(backend):
    """For a number of parts: nothing waits, nothing is added in the order of arrival."""
    call = arguments(Case(lengths=(75,) * 4, dim=40, nulls=(), in_place=False, dstate=12))
    names = ("u", "delta", "B", "C", "z", "cache_indices", "has_initial_state")
    slot = int(call["cache_indices"][3])
    results = []
    with backend(checks=False):
        for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1], [3]):
            turn = copy(call)
            turn.update({name: turn[name][order] for name in names})
            turn["out"] = torch.empty(len(order), 40, 75).bfloat16()
            with tuning.override(splits=3):
                out = cute_ssm.selective_scan(**turn)
            results.append((out[order.index(3)], turn["ssm_states"][slot]))
        for config in ({"lanes": 1}, {"lanes": 2, "warps": 2}, {"lanes": 4, "tokens": 8}):
            turn = copy(call)
            with tuning.override(splits=3, **config):
                out = cute_ssm.selective_scan(**turn)
            results.append((out[3], turn["ssm_states"][slot]))
    for out, state in results[1:]:
        equal(out, results[0][0])
        equal(state, results[0][1])


@pytest.mark.wide
def test_packed_sequences_are_those_of_single_calls(backend):
    """Parts are cut, and sums over their tokens taken, from a sequence's beginning, wherever it lies."""
    case = Case(varlen=True, lengths=(5, 39, 64, 1, 50), nulls=(), in_place=False)
    call = arguments(case)
    single = copy(call)
    with backend(checks=False), tuning.override(splits=3):
        scan(case, call)
        begin = 0
        for b, length in enumerate(case.lengths):
            part = {n: single[n][..., begin : begin + length] for n in ("u", "delta", "B", "C", "z", "out")}
            part |= {n: single[n][b : b + 1] for n in ("cache_indices", "has_initial_state")}
            scan(case, {**single, **part, "query_start_loc": torch.tensor([0, length])})
            begin += length
    same_memory(single["out"], call["out"])
    same_memory(single["ssm_states"], call["ssm_states"])


@pytest.mark.wide
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_out_may_be_an_input(name, backend):
    """A part reads the tokens that are its own: what another has overwritten it has no use for."""
    case = Case(lengths=(53,) * 2, in_place=False, give_out=False, nulls=())
    call = arguments(case)
    with backend(initcheck=False, schedule=1), tuning.override(splits=3):
        wanted = scan(case, copy(call))
        got = scan(case, {**call, "out": call[name]})
    assert got is call[name]
    equal(got, wanted)


def test_the_final_state_replaces_an_initial_one_that_all_parts_need(backend):
    """Parts run in any order: the last may have stored the slot's new state before the first begins."""
    case = Case(lengths=(53,), nulls=(), dim=8)
    call = arguments(case)
    whole = copy(call)
    with backend(initcheck=False):
        with tuning.override(splits=4):
            scan(case, call)
        with tuning.override(splits=1):
            scan(case, whole)
    slot = int(call["cache_indices"][0])
    torch.testing.assert_close(call["ssm_states"][slot], whole["ssm_states"][slot], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(call["z"], whole["z"], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.thin(2)
@pytest.mark.parametrize("block_size", [8, 13])
def test_states_of_blocks_within_parts(block_size, backend):
    """Every block's state is saved once, by the part that its last token is in, and null destinations by none."""
    case = dataclasses.replace(PREFIX, nulls=(), in_place=False, block_size=block_size)
    call = arguments(case)
    sequences = segments(case, call)
    computed, length = case.computed[3], case.lengths[3]
    call["cache_indices"][3, (computed + length - 9) // block_size] = NULL  # a block in the middle of a sequence
    before = copy(call)
    with backend(initcheck=False), tuning.override(splits=3):
        scan(case, call)
    equal(call["ssm_states"][NULL].isnan(), before["ssm_states"][NULL].isnan())
    _, saved = expected(case, before, torch.float64)
    assert len(saved) == sum(len(ends) for *_, ends in sequences) - 1
    for slot, state in saved:
        torch.testing.assert_close(call["ssm_states"][slot].double(), state, rtol=1e-5, atol=1e-5)


SPEC = SelectiveScanSpec(
    input_dtype="bfloat16",
    state_dtype="float32",
    dstate=16,
    has_D=True,
    has_z=True,
    has_bias=True,
    delta_softplus=True,
    query_dtype=None,
    cache_dtype="int32",
    has_initial=True,
    blocks=False,
    chunks=False,
    ungated=False,
    aligned=True,
    aligned_states=True,
)


@pytest.mark.parametrize(
    ("channels", "length", "splits"),
    [
        (1536, 4096, 32),  # Mamba-130m, one sequence
        (1536, 1024, 8),
        (2048, 4096, 16),  # Mamba-790m, one of two GPUs
        (5120, 4096, 1),  # Mamba-2.8b: what is gained does not pay for the second pass
        (8192, 1 << 17, 1),
        (1 << 16, 4096, 1),  # a full GPU
        (1, 255, 1),  # too short for two parts
        (1, 512, 4),
        (1 << 20, 1 << 17, 1),
    ],
)
def test_who_is_split(channels, length, splits):
    config = choices.choose(SPEC, SM_90A, channels, channels, length, SM_90A.sm_count)
    assert config.splits == splits
    config.check(SPEC, SM_90A)


def test_a_number_of_parts_that_is_asked_for_gets_lanes_of_its_own():
    args = (SPEC, SM_90A, 1536, 1536, 4096, SM_90A.sm_count)
    natural = choices.choose(*args)
    with tuning.override(splits=1):
        whole = choices.choose(*args)
    with tuning.override(splits=1, lanes=2):
        both = choices.choose(*args)
    assert [(c.lanes, c.splits) for c in (natural, whole, both)] == [(1, 32), (4, 1), (2, 1)]


def test_splits_pay_by_the_model_and_parts_are_long():
    found = set()
    for dstate in (1, 16, 64, 256):
        spec = dataclasses.replace(SPEC, dstate=dstate)
        for arch in ARCHS.values():
            for channels in (1, 64, 1536, 4096, 8192, 1 << 16):
                for length in (1, 100, 1024, 4096, 1 << 17):
                    config = choices.choose(spec, arch, channels, channels, length, arch.sm_count)
                    config.check(spec, arch)
                    found.add(config.splits)
                    work = (channels, length, arch.sm_count)
                    whole = min(choices.duration(spec, n, 1, *work) for n in choices.lane_choices(spec))
                    if config.splits > 1:
                        assert length >= config.splits * choices.PART_TOKENS
                        assert choices.duration(spec, config.lanes, config.splits, *work) * 1.3 <= whole
    assert {1, 8, 16, 32} <= found


@pytest.mark.slow
def test_few_channels_take_less_in_parts_by_an_independent_model():
    """`gpumodel` replays the kernels' instructions on a model of an SM; it knows nothing of `duration`."""
    from cute_ssm.tuner import modelled

    pytest.importorskip("gpumodel")
    keys = {"batch": 1, "dim": 768, "length": 256}
    parts, whole = (modelled.time_op("selective_scan", keys, "H200", {"splits": n}) for n in (4, 1))
    assert parts.us < whole.us

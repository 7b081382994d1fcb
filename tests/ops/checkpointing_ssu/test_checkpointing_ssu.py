"""Single steps of `checkpointing_ssu` and `checkpointing_ssu_ring`, reference and kernel, against a token loop."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from bits import equal, same_bits, same_memory
from cases import vary
from checkpointing_cases import COARSE, DTYPES, STATES, Case, Sequence, arguments, check, run, slots_of, verify
from checkpointing_runs import LATE, WRITES, digest
from memory import copy, storage

from cute_ssm import tuning
from cute_ssm.ops.checkpointing_ssu.config import DYNAMIC, FUSED, PAIR

ARCHS = ("sm_90a", "sm_100a")
HISTORIES = ("double", "double_x", "ring")


BASE = Case(accepted=(7, 5, 14))  # the third writes
RING = dataclasses.replace(BASE, history="ring")
PACKED = Case(batch=5, lengths=(3, 0, 1, 4, 2), accepted=(15, 3, 16, 2, 14), pads=(3,))
FACTORS = [
    BASE,
    *vary(
        BASE,
        state=("f32", "bf16", "i16", "i8", "f8"),
        io=("f16",),
        dt=("bf16", "f16"),
        A=("bf16",),
        D=("bf16", None),
        dt_bias=("f16", None),
        softplus=(False,),
        has_z=(False,),
        history=("double_x", "ring"),
        dim=(16, 80, 128),
        dstate=(96, 128, 256),
        nheads=(1, 3, 8),
        indices=(None, torch.int64),
        pads=((), (0, 1, 2)),
        items=(True,),
        rounds=(10,),
        d_split=(1, 2, 4),
        pdl=(True, "early_reads"),
        decay=("slow", "fast"),
        fill=("garbage",),
        strided=(True,),
        batch=(1,),
    ),
    dataclasses.replace(BASE, nheads=4, ngroups=2),
    dataclasses.replace(BASE, nheads=4, ngroups=4),
    *vary(RING, slack=(5,), items=(True,), fill=("garbage",), strided=(True,), state=("f32", "i8"), nheads=(3,)),
    dataclasses.replace(BASE, state="f32", dim=16, dstate=96),
    # sizes of window and step: a step that fits none, exactly, and all of a window
    *(
        Case(tokens=tokens, window=window, history=history, accepted=(0, window, max(window - tokens, 0)), pads=())
        for tokens, window in ((1, 1), (1, 16), (5, 8), (8, 8), (16, 16), (6, 24), (4, 64), (64, 64), (20, 8), (33, 3))
        for history in HISTORIES
    ),
    # packed sequences
    *vary(PACKED, history=HISTORIES, items=(True,), state=("i8", "f32"), indices=(torch.int64,), fill=("garbage",)),
    dataclasses.replace(PACKED, indices=None, pads=()),
    dataclasses.replace(PACKED, history="ring", strided=True, slack=2, fill="garbage"),
    dataclasses.replace(PACKED, batch=2, lengths=(0, 0), pads=()),
    # stochastic rounding
    *(
        dataclasses.replace(BASE, state=state, rounds=rounds, seed_per_slot=per_slot, dstate=dstate, pads=())
        for state, rounds, per_slot, dstate in (
            ("bf16", 10, False, 64),
            ("f16", 5, True, 96),
            ("i16", 1, True, 128),
            ("i8", 10, False, 96),
            ("f8", 7, True, 128),
        )
    ),
    # types of inputs and states that are multiplied in other ways
    *(
        dataclasses.replace(BASE, io="f16", state=state, history=history)
        for state in ("f32", "bf16", "i16", "i8", "f8")
        for history in ("double", "ring")
    ),
]


@pytest.mark.parametrize("case", FACTORS, ids=str)
def test_reference(case):
    verify(case)


QUICK = [
    BASE,
    *vary(BASE, state=("f32", "i8"), io=("f16",), history=("double_x",), dim=(80,), dstate=(96,), items=(True,)),
    *vary(BASE, rounds=(10,), decay=("fast",), d_split=(4,)),
    dataclasses.replace(BASE, nheads=4, ngroups=2),
    dataclasses.replace(RING, strided=True),
    dataclasses.replace(PACKED, history="ring"),
    Case(tokens=20, window=8, history="ring", accepted=(0, 8, 0), pads=()),
    Case(tokens=6, window=24, accepted=(0, 24, 18), pads=()),
    dataclasses.replace(BASE, state="f32", dim=16, dstate=96),
]


def slow_unless(condition):
    return () if condition else pytest.mark.slow


@pytest.mark.thin(8, "state", "history", "arch")
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, marks=slow_unless(case in (QUICK if arch == "sm_90a" else QUICK[::6])))
        for arch in ARCHS
        for case in FACTORS
    ],
    ids=str,
)
def test_kernel(case, arch, backend):
    with backend(arch, **LATE):
        verify(case)


def test_bounds_allow_one_part_where_kernels_use_it():
    from cute_ssm.ops.checkpointing_ssu.state_fold import PARTS

    for io, allowed in COARSE.items():
        parts = PARTS[str(DTYPES[io]).removeprefix("torch.")]
        used = {name for name, dtype in STATES.items() if parts.get(str(dtype).removeprefix("torch.")) == 1}
        assert set(allowed) == used


@pytest.mark.parametrize("state", COARSE["f16"][:2])
def test_states_that_are_folded_with_coefficients_of_one_part(state, backend):
    """Where the state hardly decays, the error of the coefficients shows beside that of its rounding."""
    with backend():
        verify(Case(batch=1, window=8, accepted=(8,), io="f16", state=state, decay="slow", pads=()))


EVERY = [
    Case(batch=1, tokens=tokens, window=window, accepted=(accepted,), history=history, pads=())
    for tokens, window in ((4, 16), (6, 4))
    for history in HISTORIES
    for accepted in range(window + 1)
]


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_number_of_accepted_tokens(case):
    verify(case)


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("tokens", "window"), [(4, 16), (6, 4)])
def test_every_number_of_accepted_tokens_of_the_kernel(tokens, window, history, backend):
    """All at once: a sequence for each."""
    numbers = tuple(range(window + 1))
    case = Case(batch=window + 1, tokens=tokens, window=window, accepted=numbers, history=history, pads=(), nheads=1)
    with backend(**LATE):
        verify(case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"schedule": 1, "async_mode": "early"}, {"schedule": 2}], ids=str)
@pytest.mark.parametrize("form", [FUSED, DYNAMIC, PAIR], ids=["fused", "dynamic", "pair"])
@pytest.mark.parametrize("history", HISTORIES)
def test_forms_on_one_multiprocessor(form, history, mode, backend):
    """Persistent CTAs take every stage of their rings more than once."""
    case = Case(batch=6, nheads=6, ngroups=2, history=history, accepted=(16, 2, 13, 9, 14, 0), pads=(3,), items=True)
    with backend(sm_count=1, **{**LATE, **mode}), tuning.override(form=form):
        verify(case)


@pytest.mark.wide
@pytest.mark.parametrize(
    "knobs",
    [
        {"tiles": 3, "consumers": 1, "depth": 1},
        {"tiles": 3, "consumers": 3, "depth": 1},
        {"d_split": 2, "tiles": 6, "consumers": 2, "depth": 2},
    ],
    ids=str,
)
def test_units_of_three_heads(knobs, backend):
    """With stages that are used again in a unit, and without."""
    case = dataclasses.replace(BASE, nheads=6, ngroups=2)
    config = {"form": FUSED, "d_split": 1, "unit_stages": 1, "ctas_per_sm": 1, **knobs}
    with backend(**LATE), tuning.override(**config):
        verify(case)


def check_any_size_of_C(state):
    """A token of zeros, of nearly the smallest numbers, of the largest: products are made of C by powers of two."""
    case = dataclasses.replace(BASE, state=state, D=None, pads=())
    call = arguments(case)
    for name in ("x", "old_x", "B", "old_B", "state_scale" if "state_scale" in call else "state"):
        call[name] *= 2.0**-12
    for token, largest in enumerate((0.0, 2.0**-120, 2.0**127 * 1.75)):
        C = call["C"][:, token]
        C *= largest / C.abs().amax(-1, keepdim=True)
    before = copy(call)
    sequences = [Sequence.of(case, before, *each) for each in slots_of(case, before)]
    check(case, before, call, sequences, run(case, call))
    assert (call["out"][:, 0].abs() < 1).all() and (call["out"][:, 2].abs() > 2.0**100).any()


@pytest.mark.parametrize("state", ["f16", "i8"])
def test_any_size_of_C(state):
    check_any_size_of_C(state)


@pytest.mark.thin(2)
@pytest.mark.parametrize("state", ["f16", pytest.param("i16", marks=pytest.mark.slow), "i8"])
def test_any_size_of_C_in_the_kernel(state, backend):
    with backend(**LATE):
        check_any_size_of_C(state)


def flat(tensor):
    """All elements of a tensor's memory."""
    return storage(tensor).view(tensor.dtype)


def check_what_is_not_read_does_not_matter(case):
    """Whatever was NaN before becomes random bytes: what is not NaN afterwards has the same bits."""
    first = arguments(case)
    twin = copy(first)
    g = torch.Generator().manual_seed(1)
    for value in twin.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            values = flat(value)
            garbage = torch.randint(0, 256, storage(value).shape, generator=g, dtype=torch.uint8).view(value.dtype)
            unread = values.float().isnan()
            values.copy_(torch.where(unread, garbage.float(), values.float()).to(value.dtype))
    run(case, first)
    run(case, twin)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            written = ~flat(value).float().isnan() if value.is_floating_point() else slice(None)
            equal(flat(value).float()[written], flat(twin[name]).float()[written], name)


CONTRACTS = [BASE, RING, PACKED, dataclasses.replace(PACKED, history="ring")]


@pytest.mark.parametrize("case", CONTRACTS, ids=str)
def test_what_is_not_read_does_not_matter(case):
    check_what_is_not_read_does_not_matter(case)


@pytest.mark.parametrize(
    "case", [CONTRACTS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CONTRACTS[1:])], ids=str
)
def test_what_the_kernel_does_not_read_does_not_matter(case, backend):
    with backend(**LATE):
        check_what_is_not_read_does_not_matter(case)


def check_outputs_do_not_depend_on_writing(state, io):
    """The same rows of a ring under two windows: one step writes its state, the other does not."""
    case = Case(history="ring", accepted=(8, 6, 7), pads=(), state=state, io=io, slack=7, window=9)
    writes = arguments(case)
    keeps = copy(writes)
    keeps["window"] = 16
    before = copy(writes)
    run(case, writes)
    run(case, keeps)
    same_memory(writes["out"], keeps["out"])
    same_memory(keeps["state"], before["state"])
    slots = writes["state_batch_indices"].long()
    assert all(not torch.equal(writes["state"][s].float(), before["state"][s].float()) for s in slots)


@pytest.mark.parametrize("io", ["bf16", "f16"])
@pytest.mark.parametrize("state", ["f32", "f16", "i8"])
def test_outputs_do_not_depend_on_writing(state, io):
    check_outputs_do_not_depend_on_writing(state, io)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("state", "io"),
    [
        pytest.param(state, io, marks=slow_unless((state, io) in (("f16", "bf16"), ("i8", "f16"))))
        for state in ("f32", "f16", "i8")
        for io in ("bf16", "f16")
    ],
)
def test_outputs_of_the_kernel_do_not_depend_on_writing(state, io, backend):
    with backend(**LATE):
        check_outputs_do_not_depend_on_writing(state, io)


def test_a_step_that_folds_nothing_keeps_the_bytes():
    """T > W and no history: a write, of the state that is there, with a seed that would round it otherwise."""
    case = Case(tokens=6, window=4, accepted=(0,), state="i8", rounds=10, pads=())
    before = arguments(case)
    after = verify(case)
    same_memory(before["state"], after["state"])
    same_memory(before["state_scale"], after["state_scale"])


# ---------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("history", HISTORIES)
def test_five_runs_of_the_reference_have_the_same_bits(history):
    case = dataclasses.replace(WRITES, history=history)
    assert len({digest(verify(case)) for _ in range(5)}) == 1


@pytest.mark.wide
@pytest.mark.parametrize("case", [WRITES, dataclasses.replace(WRITES, state="i8", history="ring")], ids=str)
def test_five_runs_of_the_kernel_have_the_same_bits(case, backend):
    digests = set()
    for schedule in range(5):
        call = arguments(case)
        with backend(checks=False, schedule=schedule):
            run(case, call)
        digests.add(digest(call))
    assert len(digests) == 1


def permuted(case, call, order):
    """The same sequences in another order."""
    twin = copy(call)
    for name in ("x", "z", "B", "C", "out"):
        twin[name] = twin[name][order]
    twin["dt"] = call["dt"][order][..., :1].expand_as(twin["x"])
    twin["state_batch_indices"] = call["state_batch_indices"][order]
    return twin


def check_bits_do_not_depend_on_order(case):
    call, order = arguments(case), [2, 0, 3, 1]
    twin = permuted(case, call, order)
    alone = permuted(case, call, [3])
    for one in (call, twin, alone):
        run(case, one)
    equal(call["out"][order], twin["out"])
    equal(call["out"][[3]], alone["out"])
    names = ("state", "state_scale", *(name for name in case.names[:4] if name))
    for name in names:
        if name in call:
            same_memory(call[name], twin[name], name)
    slot = int(call["state_batch_indices"][3])
    same_bits(call["state"][slot], alone["state"][slot])


ORDERED = [dataclasses.replace(WRITES, state=state, history=h) for state, h in (("f16", "double"), ("i8", "ring"))]


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_bits_do_not_depend_on_the_order_of_the_batch(case):
    check_bits_do_not_depend_on_order(case)


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_bits_of_the_kernel_do_not_depend_on_the_order_of_the_batch(case, backend):
    with backend(checks=False):
        check_bits_do_not_depend_on_order(case)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("history", "state"),
    [
        pytest.param(h, s, marks=slow_unless((h, s) == ("double", "f16")))
        for h in HISTORIES
        for s in ("f32", "f16", "i8")
    ],
)
def test_forms_splits_and_launches_have_the_same_bits(history, state, backend):
    """Fused, dynamic and a pair of kernels; parts of a head; programmatic launches: one result."""
    rounds = 0 if state == "f32" else 10
    case = dataclasses.replace(WRITES, history=history, state=state, rounds=rounds, items=True)
    digests = {}
    for form, d_split, pdl in (
        (FUSED, 1, False),
        (DYNAMIC, 1, False),
        (PAIR, 1, False),
        (FUSED, 2, "early_reads"),
        (FUSED, 1, True),
        (DYNAMIC, 4, False),
        (PAIR, 4, "early_reads"),
    ):
        call = arguments(case)
        call |= {"d_split": d_split, "enable_pdl": pdl}
        with backend(checks=False), tuning.override(form=form):
            run(case, call)
        digests[form, d_split, pdl] = digest(call)
    assert len(set(digests.values())) == 1, digests


@pytest.mark.wide
@pytest.mark.parametrize("history", [pytest.param(h, marks=slow_unless(h == "ring")) for h in HISTORIES])
def test_work_items_change_no_bit(history, backend):
    case = dataclasses.replace(WRITES, history=history)
    names = ("out", "state", *(name for name in case.names[:4] if name))
    calls = [arguments(case), arguments(dataclasses.replace(case, items=True))]
    for call in calls:
        with backend(checks=False):
            run(case, call)
    assert all(torch.equal(storage(calls[0][name]), storage(calls[1][name])) for name in names)


@pytest.mark.wide
@pytest.mark.parametrize("state", [pytest.param(s, marks=slow_unless(s == "f8")) for s in ("f16", "i8", "f8")])
def test_both_targets_have_the_same_bits(state, backend):
    """Software rounding on sm_90a and cvt.rs on sm_100a included."""
    case = dataclasses.replace(WRITES, state=state)
    digests = set()
    for arch in ARCHS:
        call = arguments(case)
        with backend(arch, checks=False):
            run(case, call)
        digests.add(digest(call))
    assert len(digests) == 1


@pytest.mark.wide
@pytest.mark.parametrize("history", [pytest.param(h, marks=slow_unless(h == "ring")) for h in ("double", "ring")])
def test_packed_sequences_have_the_bits_of_equally_long_ones(history, backend):
    packed = Case(batch=3, lengths=(4, 4, 4), accepted=(15, 3, 13), pads=(), history=history)
    first = arguments(packed)
    dense = copy(first)
    for name in ("x", "z", "B", "C", "out", "dt"):
        dense[name] = dense[name][:, 1:13].unflatten(1, (3, 4))[0]
    del dense["cu_seqlens"], dense["max_seqlen"]
    with backend(checks=False):
        run(packed, first)
        run(packed, dense)
    same_memory(first["out"], dense["out"])
    same_memory(first["state"], dense["state"])


@pytest.mark.wide
@pytest.mark.parametrize(
    "state", [pytest.param(s, marks=slow_unless(s in ("f16", "i8"))) for s in ("f16", "bf16", "i16", "i8", "f8")]
)
def test_random_bits_are_those_of_the_reference(state, backend):
    """Kernel and reference draw the same bits: stored states agree but where float32 differs in its last bits."""
    case = Case(state=state, rounds=10, dstate=128, accepted=(14, 16, 15), pads=(), seed_per_slot=True)
    call = arguments(case)
    if state in COARSE[case.io]:  # coefficients that one number of 16 bits holds
        call["A"] = torch.zeros(2, 1, 1).expand_as(call["A"])
        call["old_dt"].fill_(1.0)
        if "state_scale" in call:
            call["state_scale"].fill_(2.0**-6)
    twin, other = copy(call), copy(call)
    other["rand_seed"] += 1
    with backend(checks=False):
        run(case, call)
    for reference in (twin, other):
        run(case, reference)
    slots = call["state_batch_indices"].long()

    def agreement(a, b):
        return (a["state"][slots].float() == b["state"][slots].float()).float().mean().item()

    assert agreement(call, twin) > 0.98
    assert agreement(call, other) < 0.9


# ---------------------------------------------------------------------------------------------- random configurations
def sample(rng: random.Random) -> Case:
    """A random legal configuration."""
    batch, tokens = rng.randint(1, 4), rng.choice([1, 2, 3, 4, 6, 8, 9, 17])
    window = rng.choice([1, 3, 4, 8, 15, 16, 24, 40])
    packed = rng.random() < 0.4
    nheads = rng.choice([1, 2, 4, 6])
    state = rng.choice(["f32", "bf16", "f16", "i16", "i8", "f8"])
    history = rng.choice(HISTORIES)
    indices = rng.choice([None, torch.int32, torch.int64])
    dim = rng.choice([16, 64, 80, 128])
    return Case(
        batch=batch,
        tokens=tokens,
        window=window,
        lengths=tuple(rng.randint(0, tokens) for _ in range(batch)) if packed else None,
        nheads=nheads,
        ngroups=rng.choice([g for g in (1, 2, 4) if nheads % g == 0]),
        dim=dim,
        dstate=rng.choice([64, 96, 128, 256]),
        state=state,
        io=rng.choice(["bf16", "f16"]),
        dt=rng.choice(["f32", "bf16", "f16"]),
        A=rng.choice(["f32", "bf16"]),
        D=rng.choice([None, "f32", "bf16"]),
        dt_bias=rng.choice([None, "f32", "f16"]),
        softplus=rng.random() < 0.7,
        has_z=rng.random() < 0.5,
        history=history,
        slack=rng.choice([0, 3]) if history == "ring" else 0,
        indices=indices,
        pads=(rng.randrange(batch),) if rng.random() < 0.3 else (),
        items=rng.random() < 0.3,
        rounds=rng.choice([0, 1, 10]) if state != "f32" else 0,
        seed_per_slot=rng.random() < 0.5,
        d_split=rng.choice([None, *(s for s in (1, 2, 4) if dim % (16 * s) == 0)]),
        pdl=rng.choice([False, False, False, True, "early_reads"]),
        decay=rng.choice(["slow", "typical", "fast"]),
        fill=rng.choice(["nan", "garbage"]),
        strided=rng.random() < 0.5,
    )


@pytest.mark.thin(10)
@pytest.mark.parametrize("seed", range(200))
def test_random_configuration_of_the_reference(seed):
    verify(sample(random.Random(seed)), seed)


@pytest.mark.wide
@pytest.mark.parametrize("seed", [pytest.param(s, marks=slow_unless(s < 6)) for s in range(200)])
def test_random_configuration_of_the_kernel(seed, backend):
    case = sample(random.Random(seed))
    with backend(("sm_90a", "sm_100a")[seed % 4 == 3], **LATE):
        verify(case, seed)

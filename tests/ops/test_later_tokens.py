"""No value of a later token reaches an earlier output, an earlier state, or a state that is committed.

Each sequence of a batch has one token of which one tensor holds a value that products would carry everywhere: NaN, an
infinity, or the largest number of its type; in one element, or in all.  What comes before that token must have the bits
that it has in the same call with random tokens, and so must a step after it that rejects the token.
"""

from __future__ import annotations

import dataclasses
import itertools

import checkpointing_cases
import pytest
import scan_cases
import token_cases
import torch
from bits import same_bits
from memory import copy

import cute_ssm
from cute_ssm import serving, tuning

VALUES = ("nan", "inf", "-inf", "largest", "-largest")
INTEGERS = {2: torch.int16, 4: torch.int32, 1: torch.int8}


@dataclasses.dataclass(frozen=True)
class Poison:
    """What is put where in one sequence."""

    tensor: str
    value: str
    token: int
    whole: bool  # in all elements of the token, or in one

    def apply(self, row: torch.Tensor, g: torch.Generator) -> None:
        """Write it to a token's elements, which may be expanded."""
        largest = torch.finfo(row.dtype).max
        value = float(self.value.replace("largest", str(largest)))
        for axis, stride in enumerate(row.stride()):
            if stride == 0:
                row = row.narrow(axis, 0, 1)
        if self.whole:
            row.fill_(value)
        else:
            row[tuple(int(torch.randint(size, (1,), generator=g)) for size in row.shape)] = value


def poisons(tensors, positions, values=VALUES) -> list[Poison]:
    """One of each kind, one element and all elements in turn."""
    kinds = itertools.product(tensors, values, positions)
    return [Poison(*kind, whole=i % 2 == 0) for i, kind in enumerate(kinds)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def same(clean: torch.Tensor, poisoned: torch.Tensor, what) -> None:
    assert torch.isfinite(clean.float()).all(), f"{what}: not finite without the poison"
    same_bits(poisoned, clean, what)


# --------------------------------------------------------------------------------------------------- checkpointing_ssu
def history_rows(case, call, slot, cursor, first, count):
    """Rows of the history that hold `count` tokens from position `first` on."""
    rows = []
    for name, axis in zip(case.names[:4], (0, 1, 2, 2)):
        if name is not None:
            at = (checkpointing_cases.place(case, slot, cursor, first + t)[axis] for t in range(count))
            rows += [call[name][index] for index in at]
    return rows


def commit(case, call, taken) -> None:
    """Accept the first ``taken[b]`` tokens of each sequence."""
    accepted, cursor = call["prev_num_accepted_tokens"], call[case.names[4]]
    for b, (slot, k, place) in enumerate(checkpointing_cases.slots_of(case, call)):
        writes = k + len(checkpointing_cases.tokens_of(call, "x", b)) > case.window
        accepted[slot] = taken[b] + (0 if writes else k)
        if writes:
            cursor[slot] = (place + k) % case.rows if case.ring else 1 - place


def check_checkpointing(case) -> None:
    """Outputs before the poison, states and rows of the history, and all of the next step, which rejects it."""
    kinds = poisons(("x", "dt", "B", "C", *("z" * case.has_z)), range(case.tokens))
    lengths = None if case.lengths is None else (case.tokens,) * len(kinds)
    case = dataclasses.replace(case, batch=len(kinds), lengths=lengths, pads=())
    g = torch.Generator().manual_seed(2)
    clean = checkpointing_cases.arguments(case)
    poisoned = copy(clean)
    for b, kind in enumerate(kinds):
        kind.apply(checkpointing_cases.tokens_of(poisoned, kind.tensor, b)[kind.token], g)
    found = checkpointing_cases.slots_of(case, clean)
    for call in (clean, poisoned):
        checkpointing_cases.run(case, call)
    wrote = 0
    for b, (kind, (slot, k, cursor)) in enumerate(zip(kinds, found)):
        outs = [checkpointing_cases.tokens_of(call, "out", b)[: kind.token] for call in (clean, poisoned)]
        same(*outs, f"out of {kind} after {k} tokens")
        writes = k + case.tokens > case.window
        base, first = (cursor, k) if case.ring or not writes else (1 - cursor, 0)
        kept = min(kind.token, case.window)
        for rows in zip(*(history_rows(case, call, slot, base, first, kept) for call in (clean, poisoned))):
            same(*rows, f"history of {kind} after {k} tokens")
        wrote += writes
    assert 0 < wrote < len(kinds), "steps that write states, and others"
    same_states(case, clean, poisoned, found)

    taken = [min(kind.token, case.window) for kind in kinds]
    fresh = checkpointing_cases.new_tokens(case, g)
    for call in (clean, poisoned):
        commit(case, call, taken)
        call |= copy(fresh)
        checkpointing_cases.run(case, call)
    for b, kind in enumerate(kinds):
        outs = [checkpointing_cases.tokens_of(call, "out", b) for call in (clean, poisoned)]
        same(*outs, f"out of a step that rejected {kind}")
    same_states(case, clean, poisoned, found)


def same_states(case, clean, poisoned, found) -> None:
    slots = [slot for slot, *_ in found]
    for name in ("state", *(["state_scale"] if case.state in checkpointing_cases.LARGEST else [])):
        same(clean[name][slots], poisoned[name][slots], name)


STEP = checkpointing_cases.Case(tokens=4, window=9, nheads=1, dim=32, accepted=(2, 9, 5, 0, 7), history="ring")
SOME_STEPS = [
    STEP,
    dataclasses.replace(STEP, io="f16", state="i8", history="double", lengths=(4,)),
    dataclasses.replace(STEP, tokens=10, window=14, state="f32", history="double_x", has_z=False),
]
STEPS = [
    *SOME_STEPS,
    *(
        dataclasses.replace(step, **{name: value})
        for step in SOME_STEPS
        for name, values in {
            "state": ("f32", "bf16", "f16", "i16", "i8", "f8"),
            "io": ("bf16", "f16"),
            "history": ("double", "double_x", "ring"),
            "lengths": (None, (step.tokens,)),
            "softplus": (False,),
            "dim": (64, 80),
            "dstate": (128, 256),
            "nheads": (3,),
            "tokens": (2, 8, 17, 33),
            "D": (None,),
            "rounds": (10,),
        }.items()
        for value in values
        if getattr(step, name) != value and not (name == "rounds" and step.state == "f32")
    ),
]


def some(cases, few):
    """All of them, those that are not among the few as slow tests."""
    return [pytest.param(case, marks=() if case in few else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", some(STEPS, SOME_STEPS), ids=str)
def test_checkpointing_reference(case):
    check_checkpointing(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, marks=() if arch == "sm_90a" and case in SOME_STEPS else pytest.mark.slow)
        for arch in ("sm_90a", "sm_100a")
        for case in STEPS
    ],
    ids=str,
)
def test_checkpointing_kernel(case, arch, backend):
    with backend(arch, racecheck=False):
        check_checkpointing(case)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["FUSED", "DYNAMIC", "PAIR"])
@pytest.mark.parametrize("state", ["f16", "i8"])
def test_forms_of_the_checkpointing_kernel(form, state, backend):
    """Where a stage is given back before the outputs are complete, and where it is not."""
    from cute_ssm.ops.checkpointing_ssu import config as forms

    case = dataclasses.replace(STEP, state=state, nheads=4, dstate=64)
    with backend(checks=False, sm_count=1), tuning.override(form=getattr(forms, form)):
        check_checkpointing(case)


# ---------------------------------------------------------------------------------------------- selective_state_update
def token_row(case, call, name, b, t):
    """Token t of sequence b, in x, dt, B, C, z or out."""
    steps = max(case.lengths)
    return call[name][int(call["cu_seqlens"][b]) + t] if case.packed else call[name][b, min(t, steps - 1)]


def check_step(case) -> None:
    """Outputs before the poison, and the states after the tokens before it, wherever they are kept."""
    steps = max(case.lengths)
    kinds = poisons(("x", "dt", "B", "C", *("z" * case.has_z)), range(steps))
    lengths = tuple(1 + max(kind.token, i % steps) for i, kind in enumerate(kinds)) if case.packed else None
    case = dataclasses.replace(case, lengths=lengths or (steps,) * len(kinds), pads=())
    g = torch.Generator().manual_seed(2)
    clean = token_cases.arguments(case)
    poisoned = copy(clean)
    for b, kind in enumerate(kinds):
        kind.apply(token_row(case, poisoned, kind.tensor, b, kind.token), g)
    for call in (clean, poisoned):
        cute_ssm.selective_state_update(**call)
    scaled = case.state in token_cases.LARGEST
    for b, kind in enumerate(kinds):
        for t in range(kind.token):
            outs = [token_row(case, call, "out", b, t) for call in (clean, poisoned)]
            same(*outs, f"out, token {t} of {kind}")
            for pool, scales, at in kept_states(case, clean, b, t):
                same(clean[pool][at], poisoned[pool][at], f"{pool}, token {t} of {kind}")
                if scaled:
                    same(clean[scales][at], poisoned[scales][at], f"{scales}, token {t} of {kind}")


def kept_states(case, call, b, t):
    """(pool, its scales, where in both) of the states after token t of sequence b."""
    if case.destination == "intermediates":
        rows = call.get("intermediate_state_indices")
        line = int(rows[b]) if rows is not None else int(call["state_batch_indices"][b])
        yield "intermediate_states_buffer", "intermediate_state_scales", (line, t)
    if case.destination == "matrix" and not case.disabled and int(call["dst_state_batch_indices"][b, t]) >= 0:
        yield "state", "state_scale", (int(call["dst_state_batch_indices"][b, t]),)


UPDATE = token_cases.Tokens(lengths=(4,), dim=32)
SOME_UPDATES = [
    UPDATE,  # up to 8 tokens of 16-bit states: multiplied by tensor core
    dataclasses.replace(UPDATE, lengths=(8,), packed=True, cache_steps=8, state="bf16", io="f16"),
    dataclasses.replace(UPDATE, lengths=(5,), state="f32", destination="matrix", accepted=True),
    dataclasses.replace(UPDATE, lengths=(10,), state="i8", destination="intermediates", layout="dense"),
]
UPDATES = [
    *SOME_UPDATES,
    *(
        dataclasses.replace(update, **{name: value})
        for update in SOME_UPDATES
        for name, values in {
            "state": ("f32", "bf16", "f16", "i16", "i8", "f8"),
            "io": ("bf16", "f16", "f32"),
            "layout": ("tied", "dense", "dense_A", "dense_dt"),
            "packed": (True,),
            "dim": (64,),
            "dstate": (16, 128),
            "lengths": ((2,), (7,), (33,)),
            "destination": ("source", "vector", "matrix", "intermediates"),
            "decay": (50.0,),
        }.items()
        for value in values
        if getattr(update, name) != value and not (update.accepted and name == "destination")
    ),
]


@pytest.mark.parametrize("case", some(UPDATES, SOME_UPDATES), ids=str)
def test_step_reference(case):
    check_step(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, marks=() if case in few else pytest.mark.slow)
        for arch, few in (("sm_90a", SOME_UPDATES), ("sm_100a", SOME_UPDATES[:1]))
        for case in UPDATES
    ],
    ids=str,
)
def test_step_kernel(case, arch, backend):
    with backend(arch, racecheck=False):
        check_step(case)


# ------------------------------------------------------------------------------------------------------ selective_scan
def check_scan(case, positions) -> None:
    """Outputs before the poison, and the states that prefix caching saves before it."""
    length = case.lengths[0]
    kinds = poisons(("u", "delta", "B", "C", *("z" * case.has_z)), positions)
    lengths = tuple(length + i % 3 for i in range(len(kinds))) if case.varlen else (length,) * len(kinds)
    computed = tuple(5 * i % case.block_size for i in range(len(kinds))) if case.block_size else ()
    case = dataclasses.replace(case, lengths=lengths, computed=computed, nulls=())
    g = torch.Generator().manual_seed(2)
    clean = scan_cases.arguments(case)
    poisoned = copy(clean)
    starts = [sum(lengths[:b]) if case.varlen else 0 for b in range(len(kinds))]

    def tokens(call, name, b):
        return call[name][..., starts[b] : starts[b] + lengths[b]] if case.varlen else call[name][b]

    for b, kind in enumerate(kinds):
        kind.apply(tokens(poisoned, kind.tensor, b)[..., kind.token], g)
    outs = [scan_cases.scan(case, call) for call in (clean, poisoned)]
    saved = 0
    for b, kind in enumerate(kinds):
        before = [tokens({"out": out}, "out", b)[..., : kind.token] for out in outs]
        same(*before, f"out of {kind}")
    for b, start, _, ends in scan_cases.segments(case, clean):
        for stop, slot in ends:
            if stop - start <= kinds[b].token and slot is not None:
                states = [call["ssm_states"][slot] for call in (clean, poisoned)]
                same(*states, f"state of {kinds[b]} after {stop - start} tokens")
                saved += 1
    assert saved or not case.block_size


SCAN = scan_cases.Case(lengths=(28,), dim=12, in_place=False)
SOME_SCANS = [
    (SCAN, {"splits": 2}),
    (dataclasses.replace(SCAN, varlen=True, io="f16", softplus=False, layout="odd"), {}),
    (dataclasses.replace(SCAN, varlen=True, block_size=8, state="io"), {"splits": 4}),
]
SCANS = [
    *SOME_SCANS,
    *(
        (dataclasses.replace(scan, **{name: value}), {**knobs, "splits": splits})
        for scan, knobs in SOME_SCANS
        for splits in (1, 2, 4)
        for name, values in {
            "io": ("f32", "bf16", "f16"),
            "varlen": (True,),
            "dstate": (5, 64),
            "in_place": (True,),
            "decay": ("slow", "fast"),
        }.items()
        for value in values
        if (getattr(scan, name) != value)
    ),
]


@pytest.mark.parametrize(("case", "knobs"), SOME_SCANS, ids=str)
def test_scan_reference(case, knobs):
    check_scan(case, (1, 8, 17, 27))


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("case", "knobs"), [pytest.param(*scan, marks=() if scan in SOME_SCANS else pytest.mark.slow) for scan in SCANS],
    ids=str,
)  # fmt: skip
def test_scan_kernel(case, knobs, backend):
    with backend(racecheck=False), tuning.override(**knobs):
        check_scan(case, (1, 7, 8, 15, 16, 17, 27))


# ---------------------------------------------------------------------------------------------------------- materialize
def check_materialize(history) -> None:
    """States, whatever rows of the history hold that are not folded."""
    g = torch.Generator().manual_seed(0)
    slots, rows, heads, dim, dstate = 4, 12, 2, 16, 64
    two = {"double": (), "double_x": (2,), "ring": ()}[history]
    x, B, dt = (slots, *two, rows, heads, dim), (slots, 2, rows, 1, dstate), (slots, 2, heads, rows)
    if history == "ring":
        x, B, dt = (slots, heads, rows, dim), (slots, 1, rows, dstate), (slots, heads, rows)
    tensors = {
        "x_history": torch.randn(x, generator=g).bfloat16(),
        "B_history": torch.randn(B, generator=g).bfloat16(),
        "dt_history": torch.rand(dt, generator=g),
    }
    place, pending, counts = torch.tensor([3, 1, 7, 2]), torch.tensor([9, 12, 5, 12]), torch.tensor([4, 1, 0, 11])
    if history != "ring":
        place = place % 2
    call = {
        **tensors,
        "A": (-torch.rand(heads, generator=g))[:, None, None].expand(heads, dim, dstate),
        "prev_num_accepted_tokens": pending.int(),
        "state_batch_indices": torch.arange(slots),
        "dst_state_batch_indices": torch.arange(slots),
        "ring_start" if history == "ring" else "cache_buf_idx": place.int(),
        "num_tokens": counts,
        "pad_slot_id": -1,
    }
    state = torch.randn(slots, heads, dim, dstate, generator=g)

    def run(value):
        """Everything that is not folded holds a value, or, if that is None, random numbers."""
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for slot in range(slots):
            for name, tensor in changed.items() if value is not None else ():
                keep = torch.zeros(tensor.shape[1:], dtype=torch.bool)
                for t in range(int(counts[slot])):
                    row = (int(place[slot]) + t) % rows if history == "ring" else t
                    if history == "ring":
                        keep[(slice(None), row)] = True
                    elif name == "x_history" and history == "double":
                        keep[row] = True
                    else:
                        keep[(int(place[slot]), *((slice(None), row) if name == "dt_history" else (row,)))] = True
                number = float(value.replace("largest", str(torch.finfo(tensor.dtype).max)))
                tensor[slot] = torch.where(keep, tensor[slot], torch.full_like(tensor[slot], number))
        return serving.materialize(**{**call, **changed}, state=state.clone())

    clean = run(None)
    assert not torch.equal(clean[0], state[0])
    for value in VALUES:
        same(clean, run(value), f"state, {value}")


@pytest.mark.parametrize("history", ["double", "double_x", "ring"])
def test_materialize_reference(history):
    check_materialize(history)


@pytest.mark.parametrize(
    "history", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("double", "double_x")] + ["ring"]
)
def test_materialize_kernel(history, backend):
    with backend(racecheck=False):
        check_materialize(history)

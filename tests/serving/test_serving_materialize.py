"""`serving.materialize`: against token-by-token float64, on reference and emulator; bits of rounding; bad arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from dataclasses import dataclass

import pytest
import torch
from bits import each_same_bits, same_bits

from cute_ssm import arch as archs
from cute_ssm import runtime, serving, tuning
from cute_ssm.ops.materialize.spec import MaterializeSpec
from cute_ssm.reference import rounding

ptxsim = pytest.importorskip("ptxsim")
NAN = float("nan")
DTYPES = {
    "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i16": torch.int16, "i8": torch.int8,
    "f8": torch.float8_e4m3fn,
}  # fmt: skip


def emulated(arch="sm_90a", **options):
    return ptxsim.emulate(arch=arch, **{"racecheck": True, "initcheck": True, **options})


@dataclass(frozen=True)
class Case:
    """A call; the defaults are the base that tests vary one factor of at a time."""

    state: str = "f32"
    out: str | None = None  # None: the pool that is read
    inputs: str = "bf16"
    A: torch.dtype = torch.float32
    history: str = "double"
    rows: int = 16
    heads: int = 2
    groups: int = 1
    dim: int = 64
    dstate: int = 128
    counts: bool = True  # of pending tokens to fold; else all
    indices: torch.dtype = torch.int32
    pad: int = -1
    seeds: str | None = None
    rounds: int = 10
    rate: float = 1.0
    place: bool = False  # fold into the slot that is read


def random(case: Case, seed: int) -> dict:
    """Random arguments; rows of the history that are not pending, and slots that are not read, hold NaN or garbage."""
    g = torch.Generator().manual_seed(seed)
    ring, slots, spread = case.history == "ring", 11, 9 if case.out else 11
    most = min(case.rows, 64)  # a ring has rows for new tokens too
    pending = torch.tensor([0, 1, most, most // 2, most - 1, 3 % most])
    batch = len(pending)
    order = torch.randperm(slots - 1, generator=g)[:batch] + (case.pad == 0)
    to = torch.randperm(spread - 1, generator=g)[:batch] + (case.pad == 0)
    if case.place:
        to = order.clone()
    elif case.out is None:  # distinct from what is read
        free = [s for s in range(slots) if s not in order.tolist() and s != case.pad]
        to = torch.tensor((free + free)[:batch])
        to[len(free) :] = case.pad
    src = order.clone()
    src[4] = case.pad

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    values = randn(slots, case.heads, case.dim, case.dstate)
    values[:, 0, 1] = 0  # a row of zeros
    state, scale = rounding.store(values, DTYPES[case.state])
    dtype = DTYPES[case.inputs]
    start = torch.randint(case.rows if ring else 2, (slots,), generator=g)
    if ring:
        x = torch.full((slots, case.heads, case.rows, case.dim), NAN, dtype=dtype)
        B = torch.full((slots, case.groups, case.rows, case.dstate), NAN, dtype=dtype)
        dt = torch.full((slots, case.heads, case.rows), NAN)
    else:
        two = (2,) if case.history == "double_x" else ()
        x = torch.full((slots, *two, case.rows, case.heads, case.dim), NAN, dtype=dtype)
        B = torch.full((slots, 2, case.rows, case.groups, case.dstate), NAN, dtype=dtype)
        dt = torch.full((slots, 2, case.heads, case.rows), NAN)
    pnat = torch.full((slots,), -5, dtype=torch.int32)
    tokens = []  # (x, B, dt) of each row, oldest first
    for slot, n in zip(order.tolist(), pending.tolist()):
        one = randn(n, case.heads, case.dim).to(dtype), randn(n, case.groups, case.dstate).to(dtype)
        step = torch.rand(n, case.heads, generator=g) * 0.5
        tokens.append((*one, step))
        pnat[slot] = n
        for t in range(n):
            place = int(start[slot])
            if ring:
                row = (place + t) % case.rows
                x[slot, :, row], B[slot, :, row], dt[slot, :, row] = one[0][t], one[1][t], step[t]
            else:
                (x[slot, place] if case.history == "double_x" else x[slot])[t] = one[0][t]
                B[slot, place, t], dt[slot, place, :, t] = one[1][t], step[t]
    cursor = torch.full((slots,), 99, dtype=torch.int32)
    cursor[order] = start[order].int()
    A = (-case.rate * torch.rand(case.heads, generator=g)).to(case.A)
    call = {
        "state": state,
        "x_history": x,
        "B_history": B,
        "dt_history": dt,
        "A": A[:, None, None].expand(-1, case.dim, case.dstate),
        "prev_num_accepted_tokens": pnat,
        "state_batch_indices": src.to(case.indices),
        "dst_state_batch_indices": to.to(case.indices),
        "ring_start" if ring else "cache_buf_idx": cursor,
        "pad_slot_id": case.pad,
    }
    if scale is not None:
        call["state_scale"] = scale
    counts = pending.clone()
    if case.counts:
        counts = torch.tensor([0, 1, most // 3, 0, 0, 2 % most])
        call["num_tokens"] = counts.to(case.indices)
    if case.out:
        call["out"], out_scale = rounding.store(torch.full((spread, *values.shape[1:]), 7.0), DTYPES[case.out])
        if out_scale is not None:
            call["out_scale"] = out_scale
    if case.seeds:
        seeds = torch.randint(-(2**62), 2**62, (slots,), generator=g)
        call |= {"rand_seed": seeds if case.seeds == "slots" else seeds[:1].clone(), "philox_rounds": case.rounds}
    return {"call": call, "tokens": tokens, "counts": counts, "order": order}


def fold(state, A, x, B, dt):
    """Token by token, in float64."""
    for t in range(len(x)):
        b = B[t].double().repeat_interleave(x.shape[1] // B.shape[1], 0)
        decay = torch.exp(A.double() * dt[t].double())[:, None, None]
        state = decay * state + (dt[t].double()[:, None] * x[t].double())[..., None] * b[:, None]
    return state


def verify(case: Case, seed: int = 0):
    """Errors of live rows within a rounding; all other bytes as they were."""
    made = random(case, seed)
    call = made["call"]
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    got = serving.materialize(**call)
    target, scales = ("out", "out_scale") if case.out else ("state", "state_scale")
    assert got is call[target]
    dtype, quantised = got.dtype, DTYPES[case.out or case.state] in rounding.LARGEST
    written = set()
    for b, (tokens, n) in enumerate(zip(made["tokens"], made["counts"].tolist())):
        source, to = (int(call[name][b]) for name in ("state_batch_indices", "dst_state_batch_indices"))
        if case.pad in (source, to):
            continue
        written.add(to)
        scale = before["state_scale"][source] if "state_scale" in before else None
        first = rounding.load(before["state"][source], scale)
        if n == 0 and before["state"].dtype == dtype:
            same_bits(got[to].view(torch.uint8), before["state"][source].view(torch.uint8), "a copy of bytes")
            if quantised:
                same_bits(call[scales][to], scale)
            continue
        want = fold(first.double(), call["A"][:, 0, 0], *(t[:n] for t in tokens))
        result = rounding.load(got[to], call[scales][to] if quantised else None).double()
        size = fold(first.double().abs(), call["A"][:, 0, 0], *(t[:n].abs() for t in tokens))
        exponent = (call["A"][:, 0, 0].double()[:, None] * tokens[2][:n].T).abs().sum(1)[:, None, None]
        bound = 2.0**-22 * (2 + exponent) * size + unit(want, dtype) * (1 if case.seeds else 0.5)
        assert ((result - want).abs() <= bound).all(), f"row {b}: {((result - want).abs() / bound).max():.3f} bounds"
    assert len(written) >= 3
    for name, value in before.items():
        same = [s for s in range(len(value)) if name not in (target, scales) or s not in written]
        same_bits(call[name][same].view(torch.uint8), value[same].view(torch.uint8), f"{name} changed")


def unit(want, dtype):
    """Distance of neighbours of a stored value."""
    if dtype is torch.float32:
        return want.abs() * 2.0**-23
    largest = want.abs().amax(-1, keepdim=True)
    if dtype in (torch.int8, torch.int16):
        return (largest / rounding.LARGEST[dtype]).expand_as(want) * 1.001
    if dtype is torch.float8_e4m3fn:
        return torch.maximum(want.abs() * 2.0**-3, largest / 448 * 2.0**-9) * 1.001
    bits, smallest = (7, 2.0**-133) if dtype is torch.bfloat16 else (10, 2.0**-24)
    return torch.maximum(want.abs() * 2.0**-bits, torch.tensor(smallest, dtype=torch.float64)) * 1.001


BASE = Case()


def vary(**factors):
    return [dataclasses.replace(BASE, **{name: value}) for name, values in factors.items() for value in values]


CASES = [
    BASE,
    *vary(
        state=("bf16", "f16", "i16", "i8", "f8"),
        inputs=("f16",),
        A=(torch.bfloat16,),
        history=("double_x", "ring"),
        rows=(1, 5, 33, 64),
        groups=(2,),
        dim=(16, 80, 128),
        dstate=(64, 96, 256, 8),
        counts=(False,),
        indices=(torch.int64,),
        pad=(0,),
        rate=(0.001, 100.0),
        place=(True,),
    ),
    Case(dim=80, dstate=64),  # rows that only some segments of a warp have
    Case(rows=64, counts=False),  # more tokens than a warp has lanes
    Case(rows=40, counts=False, history="ring"),
    Case(state="i8", out="f32"),
    Case(state="f32", out="i8", history="ring"),
    Case(state="i16", out="f16", counts=False),
    Case(state="f16", out="f16", seeds="one"),
    Case(state="f8", place=True, counts=False, history="ring"),
    Case(state="i8", dim=80, dstate=96, place=True, counts=False),
    Case(state="f16", seeds="slots", history="ring", rows=22),
    Case(history="ring", rows=72, counts=False),  # a window of 64, and 8 new tokens
    Case(state="bf16", seeds="one", rounds=7),
    Case(state="i8", seeds="slots", counts=False),
    Case(state="f8", seeds="one", dstate=96),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    for seed in range(2):
        verify(case, seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case):
    with emulated() as session:
        verify(case)
    assert len(session.launches) == 1


@pytest.mark.parametrize("case", [BASE, Case(state="i8", seeds="slots"), Case(state="f16", seeds="one")], ids=str)
def test_emulated_for_blackwell(case):
    with emulated("sm_100a"):
        verify(case)


@pytest.mark.parametrize("emulate", [contextlib.nullcontext, emulated], ids=["reference", "emulated"])
@pytest.mark.parametrize("rate", [1.0, 100.0])
@pytest.mark.parametrize(
    "state", ["bf16", "f16", *(pytest.param(s, marks=pytest.mark.slow) for s in ("f32", "i16", "i8", "f8"))]
)
def test_a_state_errs_like_one_rounding(state, rate, emulate):
    """In root mean square, at most 1.1 times as much as the right state rounded once; float32, as a few roundings.

    All tokens but the last three decay by far more than those: exponents of their sums would cancel.
    """
    made = random(Case(state=state, rows=64, counts=False, rate=rate, heads=8, dim=16), 0)
    call = made["call"]
    for (_, _, step), slot in zip(made["tokens"], made["order"].tolist()):
        count = max(len(step) - 3, 0)
        step[:count] *= 300.0
        call["dt_history"][slot, call["cache_buf_idx"][slot], :, :count] *= 300.0
    before = call["state"].clone(), call["state_scale"].clone() if "state_scale" in call else None
    with emulate():
        serving.materialize(**call)
    for b, tokens in enumerate(made["tokens"]):
        source, to = (int(call[name][b]) for name in ("state_batch_indices", "dst_state_batch_indices"))
        if call["pad_slot_id"] in (source, to) or len(tokens[0]) == 0:
            continue
        first = rounding.load(before[0][source], None if before[1] is None else before[1][source])
        want = fold(first.double(), call["A"][:, 0, 0], *tokens)
        got = rounding.load(call["state"][to], None if before[1] is None else call["state_scale"][to]).double()
        dtype = call["state"].dtype
        if before[1] is None:
            nearest = want.to(dtype).double()
        else:
            scale = want.abs().amax(-1, keepdim=True) / rounding.LARGEST[dtype]
            nearest = (want / scale if dtype is torch.float8_e4m3fn else (want / scale).round()).to(
                dtype
            ).double() * scale
        ratio = ((got - want).square().mean((1, 2)) / (nearest - want).square().mean((1, 2))).mean().sqrt()
        assert ratio <= (4.0 if state == "f32" else 1.1), f"{len(tokens[0])} tokens: {ratio:.3f} roundings"


@pytest.mark.parametrize("warps", [1, 3, 8])
def test_bits_do_not_depend_on_config_or_order(warps):
    """Nor on the place in the batch, nor on the run."""
    results = []
    for flip in (False, True):
        call = random(Case(state="i8", seeds="slots", out="i8"), 0)["call"]
        if flip:
            for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
                call[name] = call[name].flip(0)
        with emulated(schedule=warps) if flip else emulated(), tuning.override(warps=warps if flip else 4):
            serving.materialize(**call)
        results.append((call["out"], call["out_scale"]))
    each_same_bits(*results)


@pytest.mark.parametrize("out", ["f16", "bf16", "i8", "i16", "f8"])
@pytest.mark.parametrize("seeds", ["slots", None])
def test_bits_are_those_of_the_reference(out, seeds):
    """Where no sum is rounded, kernel and reference agree in every bit, random ones included."""
    results = []
    for context in (contextlib.nullcontext(), emulated()):
        call = random(Case(out=out, counts=False, seeds=seeds, rate=0.0), 3)["call"]
        for name in ("state", "x_history", "B_history", "dt_history"):
            call[name].copy_(call[name].float().nan_to_num().mul(8).round().clamp(-16, 16).div(8))
        with context:
            serving.materialize(**call)
        results.append(call["out"])
    same_bits(results[0].view(torch.uint8), results[1].view(torch.uint8))


SPECS = [
    MaterializeSpec("float32", "float32", "bfloat16", "float32", 64, 128, "ring", "int32", "int32", "int32"),
    MaterializeSpec("int8", "int8", "float16", "float32", 128, 256, "double_x", "int64", "int64", None, 10, True),
    MaterializeSpec("float16", "float16", "bfloat16", "float32", 80, 128, "double", "int32", "int32", None, 10, True),
    MaterializeSpec("float8_e4m3fn", "float32", "bfloat16", "bfloat16", 64, 96, "ring", "int32", "int32", None),
]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text())
def test_nothing_spills(spec, arch):
    compiled = runtime.emulated(spec, None, archs.by_name(arch))
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


# -------------------------------------------------------------------------------------------------------- bad arguments
def changed(name, change):
    return lambda call: call.__setitem__(name, change(call[name]))


BAD = {
    "state: expected dtype": changed("state", lambda t: t.double()),
    "state: expected shape": changed("state", lambda t: t[0]),
    "state: expected contiguous rows": changed("state", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "state: expected an address": changed("state", lambda t: torch.zeros(t.numel() + 1)[1:].view(t.shape)),
    "out: expected elements": changed("state", lambda t: t[:1].expand(t.shape)),
    "out: expected shape": lambda call: call.update(out=torch.zeros(3, 2, 64, 64)),
    "state_scale: expected None with": lambda call: call.update(state_scale=torch.zeros(11, 2, 64)),
    "state_scale: expected scales": changed("state", lambda t: t.to(torch.int8)),
    "out_scale: expected None without": lambda call: call.update(out_scale=torch.zeros(11, 2, 64)),
    "out_scale: expected scales": lambda call: call.update(out=call["state"].to(torch.int8)),
    "x_history: expected dtype": changed("x_history", lambda t: t.float()),
    "x_history: expected shape": changed("x_history", lambda t: t[:, :, 0]),
    "x_history: expected at most 64": changed("x_history", lambda t: t.repeat(1, 5, 1, 1)),
    "x_history: expected stride 1": changed("x_history", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
    "B_history: expected dtype": changed("B_history", lambda t: t.half()),
    "B_history: expected ngroups": changed("B_history", lambda t: t.repeat(1, 1, 1, 3, 1)),
    "B_history: expected shape": changed("B_history", lambda t: t[:, :, :8]),
    "dt_history: expected shape": changed("dt_history", lambda t: t[:, :1]),
    "dt_history: expected dtype": changed("dt_history", lambda t: t.half()),
    "A: expected stride 0": changed("A", lambda t: t.contiguous()),
    "A: expected shape": changed("A", lambda t: t[:1]),
    "prev_num_accepted_tokens: expected dtype": changed("prev_num_accepted_tokens", lambda t: t.long()),
    "prev_num_accepted_tokens: expected values from 0 to 16": changed("prev_num_accepted_tokens", lambda t: t + 100),
    "cache_buf_idx: expected values from 0 to 1": changed("cache_buf_idx", lambda t: t + 2),
    "cache_buf_idx: expected a tensor, or ring_start": changed("cache_buf_idx", lambda t: None),
    "cache_buf_idx: expected a torch.Tensor": changed("cache_buf_idx", lambda t: 1),
    "ring_start: expected None beside": lambda call: call.update(ring_start=call["cache_buf_idx"]),
    "state_batch_indices: expected indices in": changed("state_batch_indices", lambda t: t + 11),
    "dst_state_batch_indices: expected indices in": changed("dst_state_batch_indices", lambda t: t + 11),
    "dst_state_batch_indices: expected distinct": changed("dst_state_batch_indices", lambda t: t * 0 + t[0]),
    "dst_state_batch_indices: expected slots that no other": lambda call: call.update(
        dst_state_batch_indices=call["state_batch_indices"].roll(1)
    ),
    "dst_state_batch_indices: expected shape": changed("dst_state_batch_indices", lambda t: t[:3]),
    "dst_state_batch_indices: expected dtype": changed("dst_state_batch_indices", lambda t: t.float()),
    "num_tokens: expected 0 to": changed("num_tokens", lambda t: t + 17),
    "num_tokens: expected shape": changed("num_tokens", lambda t: t[:3]),
    "num_tokens: expected dtype": changed("num_tokens", lambda t: t.float()),
    "rand_seed: expected None with a float32": lambda call: call.update(rand_seed=torch.zeros(1, dtype=torch.int64)),
    "rand_seed: expected shape": lambda call: call.update(rand_seed=torch.zeros(2, dtype=torch.int64)),
    "philox_rounds: expected 1 or more": lambda call: call.update(
        rand_seed=torch.zeros(1, dtype=torch.int64), out=call["state"].half(), philox_rounds=0
    ),
    "dim: expected a multiple of 8": lambda call: call.update(
        state=call["state"][:, :, :60], x_history=call["x_history"][..., :60], A=call["A"][:, :60]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    call = random(BASE, 0)["call"]
    BAD[message](call)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        serving.materialize(**call)
    assert message in str(caught.value)
    each_same_bits(call, before)


def test_an_empty_batch():
    call = random(BASE, 0)["call"]
    for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
        call[name] = call[name][:0]
    state = call["state"].clone()
    for context in (contextlib.nullcontext(), emulated()):
        with context:
            serving.materialize(**call)
    same_bits(call["state"], state)


def test_slots_beyond_31_bits():
    """Offsets in elements of the pool and of the history pass 2^31."""
    small = random(Case(counts=False, history="ring"), 0)["call"]
    call = random(Case(counts=False, history="ring"), 0)["call"]
    for name in ("state", "x_history", "B_history"):
        value = call[name]
        stride = (2**31 // 5) // 64 * 64
        size = (len(value) * stride) * value.element_size()
        memory = mapped(size).view(value.dtype)
        far = memory.as_strided(value.shape, (stride, *value.stride()[1:]))
        call[name] = far.copy_(value)
    with emulated(racecheck=False, initcheck=False):
        serving.materialize(**call)
        serving.materialize(**small)
    same_bits(call["state"], small["state"])


def mapped(size):
    """Bytes of memory that exists where it is touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.uint8)


def test_registered_with_pytorch():
    call, eager = (random(Case(state="i8"), 0)["call"] for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(call):
        return serving.materialize(**call)

    step(call)
    serving.materialize(**eager)
    same_bits(call["state"], eager["state"])
    same_bits(call["state_scale"], eager["state_scale"])

"""`serving.materialize`: against token-by-token float64, on reference and emulator; bits of rounding; bad arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bits import same_bits
from bounds import within
from cases import vary

from cute_ssm import serving
from cute_ssm.reference import rounding

NAN = float("nan")
DTYPES = {
    "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i16": torch.int16, "i8": torch.int8,
    "f8": torch.float8_e4m3fn,
}  # fmt: skip


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
        within(result, want, bound, f"{target}[{to}], of row {b}")
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


CASES = [
    BASE,
    *vary(
        BASE,
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

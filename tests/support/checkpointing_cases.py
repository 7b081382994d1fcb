"""Calls of `checkpointing_ssu` and `checkpointing_ssu_ring`, single steps and long runs of them.

The oracle is the recurrence token by token in NumPy float64: it keeps the state of every sequence and its pending
tokens itself, knows nothing of running sums, products or coefficients, and shares no code with the package.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import tensor_sums
import torch
from bits import same_memory
from bounds import rms_within, within
from cases import Named
from memory import copy, moved, storage
from step_cases import DECAYS, DTYPES, PAD

import cute_ssm
from cute_ssm import runtime

STATES = {**DTYPES, "i16": torch.int16, "i8": torch.int8, "f8": torch.float8_e4m3fn}
LARGEST = {"i16": 32767.0, "i8": 127.0, "f8": 448.0}
# relative step between neighbours, and the step below the normal range, of what a state is stored in
ULP = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10, "f8": 2.0**-3}
SUBNORMAL = {"f32": 0.0, "bf16": 0.0, "f16": 2.0**-24, "f8": 2.0**-9}
HALF = {"bf16": 2.0**-8, "f16": 2.0**-11}  # largest relative error of a rounding
CLOSE = {"bf16": 6e-3, "f16": 2e-3}  # of |out| and its root mean square together
DOUBLE = ("old_x", "old_B", "old_dt", "old_cumAdt", "cache_buf_idx")
RING = ("x_cache", "B_cache", "dt_cache", None, "ring_start")
NEW = ("x", "z", "B", "C", "dt", "out")
COARSE = {"bf16": ("f8",), "f16": ("bf16", "i8", "f8")}  # by inputs: states folded with coefficients of one part
UNUSED = -77  # cursors of slots that no sequence has


@dataclass(frozen=True)
class Case(Named):
    """One kind of call; the defaults are the base that tests vary one factor of at a time."""

    batch: int = 3
    tokens: int = 4
    window: int = 16
    lengths: tuple[int, ...] | None = None  # of packed sequences
    nheads: int = 2
    ngroups: int = 1
    dim: int = 64
    dstate: int = 64
    state: str = "f16"
    io: str = "bf16"
    dt: str = "f32"
    A: str = "f32"
    D: str | None = "f32"
    dt_bias: str | None = "f32"
    softplus: bool = True
    has_z: bool = True
    history: str = "double"  # double | double_x | ring
    slack: int = 0  # rows of a ring beyond W + T
    accepted: tuple[int, ...] | None = None  # of the sequences; None: random
    indices: torch.dtype | None = torch.int32
    pads: tuple[int, ...] = (1,)
    items: bool = False  # work_items
    rounds: int = 0
    seed_per_slot: bool = False
    d_split: int | None = None
    pdl: bool | str = False
    decay: str = "typical"
    fill: str = "nan"  # nan | garbage: what no token was written to
    strided: bool = False  # new tokens and rings have gaps between their rows
    shift: int = 0  # elements that new tokens, and their rows, are away from an address that is aligned

    @property
    def ring(self) -> bool:
        return self.history == "ring"

    @property
    def rows(self) -> int:
        """Rows of the history of a slot."""
        return self.window + self.tokens + self.slack if self.ring else self.window

    @property
    def names(self) -> tuple[str | None, ...]:
        """x, B, dt', sums and cursor of the history, as the operator calls them."""
        return RING if self.ring else DOUBLE


# ------------------------------------------------------------------------------------------------------------ arguments
def room(shape, dtype, fill, g, *gaps, shift=0):
    """An uninitialised tensor with memory around it, and gaps between its parts, all filled.

    ``gaps`` are those between the parts along each dimension, in elements; dimensions without one are contiguous.
    """
    block, strides = 1, []
    for n, gap in zip(reversed(shape), reversed([*gaps, *[0] * (len(shape) - len(gaps))])):
        strides.insert(0, block + gap)
        block = n * (block + gap)
    guard = 64
    raw = torch.empty(block + 2 * guard, dtype=dtype)
    if fill == "garbage":
        raw.view(torch.uint8).copy_(torch.randint(0, 256, raw.view(torch.uint8).shape, generator=g, dtype=torch.uint8))
    elif dtype in (torch.int16, torch.int8):
        raw.fill_(torch.iinfo(dtype).max)
    else:
        raw.copy_(torch.full(raw.shape, float("nan")))
    return raw.as_strided(shape, strides, guard + shift)


def processed(case, shape, g):
    """Step sizes dt' as a history holds them."""
    values = torch.randn(*shape, generator=g)
    if case.softplus:
        return torch.nn.functional.softplus(values + DECAYS[case.decay][1])
    return 0.3 * values.abs() + 1e-3


def new_tokens(case: Case, g: torch.Generator, lengths=None) -> dict:
    """x, z, B, C, dt, a new out, and cu_seqlens; what no sequence owns is filled."""
    io, heads, batch = DTYPES[case.io], case.nheads, case.batch
    if case.lengths is None:
        lead, owned = (batch, case.tokens), None
    else:
        lengths = case.lengths if lengths is None else lengths
        cu = np.concatenate([[1], 1 + np.cumsum(lengths)])
        lead, owned = (1, int(cu[-1]) + 2), slice(1, int(cu[-1]))
    gaps = (8, 8) if case.strided else (0, case.shift)

    def tensor(*inner):
        value = room((*lead, *inner), io, case.fill, g, *gaps, shift=case.shift)
        part = value if owned is None else value[:, owned]
        part.copy_(torch.randn(part.shape, generator=g))
        return value

    dt = torch.randn(*lead, heads + 3, generator=g)[..., :heads]
    if not case.softplus:
        dt = 0.3 * dt.abs() + 1e-3
    call = {
        "x": tensor(heads, case.dim),
        "dt": dt.to(DTYPES[case.dt])[..., None].expand(*lead, heads, case.dim),
        "B": tensor(case.ngroups, case.dstate),
        "C": tensor(case.ngroups, case.dstate),
        "z": tensor(heads, case.dim) if case.has_z else None,
        "out": room((*lead, heads, case.dim), io, case.fill, g, *gaps, shift=case.shift),
    }
    if case.lengths is not None:
        kind = case.indices or torch.int32
        call |= {"cu_seqlens": torch.from_numpy(cu).to(kind), "max_seqlen": case.tokens}
    return call


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments.

    Unused slots, gaps, rows at or after those that were accepted, the other buffers, all of ``old_cumAdt``, and inputs
    and outputs of padding are NaN or random bytes.
    """
    g = torch.Generator().manual_seed(seed)
    batch, heads, groups, dim, dstate = case.batch, case.nheads, case.ngroups, case.dim, case.dstate
    io, window, ring = DTYPES[case.io], case.window, case.ring
    slots = batch + 3
    order = torch.randperm(slots, generator=g)[:batch] if case.indices is not None or case.items else range(batch)
    order = torch.as_tensor(order)

    state = room((slots, heads, dim, dstate), STATES[case.state], case.fill, g, 16)
    scale = room((slots, heads, dim), torch.float32, case.fill, g, 4) if case.state in LARGEST else None
    values = torch.randn(batch, heads, dim, dstate, generator=g)
    if scale is None:
        state[order] = values.to(state.dtype)
    else:
        scale[order] = values.abs().amax(-1) / LARGEST[case.state]
        encoded = values / scale[order][..., None]
        state[order] = (encoded.round() if case.state != "f8" else encoded.clamp(-448, 448)).to(state.dtype)
    if ring:
        gaps = (8, 8, 8) if case.strided else (8,)
        x = room((slots, heads, case.rows, dim), io, case.fill, g, *gaps)
        B = room((slots, groups, case.rows, dstate), io, case.fill, g, *gaps)
        dt = room((slots, heads, case.rows), torch.float32, case.fill, g, 1)
        sums, end = None, case.rows
    else:
        buffers = (2,) if case.history == "double_x" else ()
        gaps = (8, *(8 for _ in buffers), 8) if case.strided else (8,)
        x = room((slots, *buffers, window, heads, dim), io, case.fill, g, *gaps)
        B = room((slots, 2, window, groups, dstate), io, case.fill, g, *((8, 8, 8) if case.strided else (8,)))
        dt, sums = (room((slots, 2, heads, window), torch.float32, case.fill, g, 1) for _ in range(2))
        end = 2
    accepted, cursor = torch.full((2, slots), UNUSED, dtype=torch.int32)
    call = dict(zip(case.names, (x, B, dt, sums, cursor)))
    call.pop(None, None)
    for b, slot in enumerate(order.tolist()):
        count = int(torch.randint(0, window + 1, (1,), generator=g))
        accepted[slot] = count if case.accepted is None else case.accepted[b % len(case.accepted)]
        cursor[slot] = int(torch.randint(0, end, (1,), generator=g))
        for j in range(int(accepted[slot])):
            at = place(case, slot, int(cursor[slot]), j)
            x[at[0]] = torch.randn(heads, dim, generator=g).to(io)
            B[at[1]] = torch.randn(groups, dstate, generator=g).to(io)
            dt[at[2]] = processed(case, (heads,), g)

    def per_head(kind, values, inner):
        return None if kind is None else values.to(DTYPES[kind])[(..., *[None] * len(inner))].expand(heads, *inner)

    factor, shift = DECAYS[case.decay]
    bias = torch.randn(heads, generator=g) + shift if case.softplus else 0.1 * torch.rand(heads, generator=g)
    call |= {
        "state": state,
        "prev_num_accepted_tokens": accepted,
        **new_tokens(case, g),
        "A": per_head(case.A, factor * (0.1 + torch.rand(heads, generator=g)), (dim, dstate)),
        "D": per_head(case.D, torch.randn(heads, generator=g), (dim,)),
        "dt_bias": per_head(case.dt_bias, bias, (dim,)),
        "dt_softplus": case.softplus,
        "pad_slot_id": PAD,
        "d_split": case.d_split,
        "enable_pdl": case.pdl,
    }
    if scale is not None:
        call["state_scale"] = scale
    if case.rounds:
        seeds = torch.randint(-(2**62), 2**62, (slots if case.seed_per_slot else 1,), generator=g)
        call |= {"rand_seed": seeds, "philox_rounds": case.rounds}
    if ring and case.slack:
        call["window"] = window
    assign(case, call, [PAD if b in case.pads and case.indices is not None else int(s) for b, s in enumerate(order)])
    return call


def assign(case: Case, call: dict, slots: list[int]) -> None:
    """Give sequences their slots; of padding, inputs become NaN."""
    for b, slot in enumerate(slots):
        if slot == PAD:
            for name in NEW[:5]:
                if call[name] is not None:
                    tokens_of(call, name, b).fill_(float("nan"))
    if case.indices is not None:
        call["state_batch_indices"] = torch.tensor(slots, dtype=case.indices)
    if case.items:
        call["work_items"], call["num_writes"] = work_items(case, call, slots)
        if case.indices is not None:
            call["state_batch_indices"] = torch.full_like(call["state_batch_indices"], PAD)  # not read
        # nor are these: the list has copies
        call["prev_num_accepted_tokens"] = torch.full_like(call["prev_num_accepted_tokens"], UNUSED)
        call[case.names[4]] = torch.full_like(call[case.names[4]], UNUSED)


def work_items(case: Case, call: dict, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The list and its number of writes: those that write first, each half in the order of the batch."""
    items, writes = [], []
    for b, slot in enumerate(slots):
        n = len(tokens_of(call, "x", b))
        if slot == PAD or n == 0:
            items.append((b, PAD, UNUSED, UNUSED))
            writes.append(False)
            continue
        accepted, cursor = int(call["prev_num_accepted_tokens"][slot]), int(call[case.names[4]][slot])
        items.append((b, slot, accepted, cursor))
        writes.append(accepted + n > case.window)
    order = sorted(range(len(slots)), key=lambda b: not writes[b])
    return torch.tensor([items[b] for b in order], dtype=torch.int32).view(-1, 4), torch.tensor([sum(writes)]).int()


def tokens_of(call: dict, name: str, b: int) -> torch.Tensor:
    """The rows of sequence b in x, z, B, C, dt or out."""
    cu = call.get("cu_seqlens")
    return call[name][b] if cu is None else call[name][0, int(cu[b]) : int(cu[b + 1])]


def place(case: Case, slot: int, cursor: int, j: int) -> tuple:
    """Indices of (x, B, dt') of position j after a buffer's, or the history's, first row."""
    if case.ring:
        row = (cursor + j) % case.rows
        return (slot, slice(None), row), (slot, slice(None), row), (slot, slice(None), row)
    x = (slot, cursor, j) if case.history == "double_x" else (slot, j)
    return x, (slot, cursor, j), (slot, cursor, slice(None), j)


def slots_of(case: Case, call: dict) -> list[tuple[int, int, int]]:
    """(slot, accepted, cursor) of every sequence, as the call says."""
    count = case.batch
    if case.items:
        rows = {int(item[0]): tuple(item[1:].tolist()) for item in call["work_items"]}
        return [rows[b] for b in range(count)]
    slots = call["state_batch_indices"].tolist() if case.indices is not None else range(count)
    accepted, cursor = call["prev_num_accepted_tokens"], call[case.names[4]]
    return [(s, int(accepted[s]), int(cursor[s])) if s != PAD else (PAD, 0, 0) for s in slots]


# --------------------------------------------------------------------------------------------------------------- oracle
def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def stored_state(case: Case, call: dict, slot: int) -> np.ndarray:
    state = numpy(call["state"][slot].float())
    return state * numpy(call["state_scale"][slot])[..., None] if case.state in LARGEST else state


@dataclass
class Value:
    """A state, or outputs, with the sizes of what they are sums of: of the stored state's part, and of the tokens'."""

    value: np.ndarray
    of_state: np.ndarray
    of_tokens: np.ndarray
    exponent: np.ndarray  # (nheads,), sum of |A dt'|: float32 rounds exponents

    def token(self, A, dt, x, B) -> Value:
        """After one more token: A, dt (nheads,), x (nheads, dim), B (nheads, dstate)."""
        decay = np.exp(A * dt)[:, None, None]
        added = (dt[:, None] * x)[:, :, None] * B[:, None, :]
        return Value(
            decay * self.value + added,
            decay * self.of_state,
            decay * self.of_tokens + np.abs(added),
            self.exponent + np.abs(A * dt),
        )

    def times(self, C) -> Value:
        """The product with C (nheads, dstate)."""
        products = (np.einsum("hpn,hn->hp", s, c) for s, c in ((self.value, C), (self.of_state, np.abs(C))))
        return Value(*products, np.einsum("hpn,hn->hp", self.of_tokens, np.abs(C)), self.exponent)


@dataclass
class Sequence:
    """The stored state of a slot, and the tokens that were accepted since: (x, B, dt') each."""

    stored: np.ndarray
    pending: list[tuple] = field(default_factory=list)

    @classmethod
    def of(cls, case: Case, call: dict, slot: int, accepted: int, cursor: int) -> Sequence:
        names, pending = case.names, []
        for j in range(accepted):
            at = place(case, slot, cursor, j)
            pending.append(tuple(numpy(call[names[i]][at[i]]) for i in range(3)))
        return cls(stored_state(case, call, slot), pending)

    def state(self, A, pending=None) -> Value:
        value = Value(self.stored, np.abs(self.stored), np.zeros_like(self.stored), np.zeros(len(A)))
        for x, B, dt in self.pending if pending is None else pending:
            value = value.token(A, dt, x, np.repeat(B, len(x) // len(B), 0))
        return value


@dataclass
class Step:
    """What a call must do to one sequence."""

    outputs: list[Value]
    projections: list[tuple]  # C (nheads, dstate) of each token, and what its product with the stored state counts
    state: Value  # after the pending tokens
    tokens: list[tuple]  # the new (x, B, dt')
    raw: np.ndarray  # (tokens, nheads): dt' before softplus

    @classmethod
    def of(cls, call: dict, b: int, sequence: Sequence) -> Step:
        A = numpy(call["A"])[:, 0, 0]
        x, B, C, dt = (numpy(tokens_of(call, name, b)) for name in ("x", "B", "C", "dt"))
        raw = dt[..., 0] + (0 if call["dt_bias"] is None else numpy(call["dt_bias"])[:, 0])
        steps = np.where(raw > 20, raw, np.log1p(np.exp(np.minimum(raw, 20)))) if call["dt_softplus"] else raw
        first = running = sequence.state(A)
        per_group, outputs, projections = x.shape[1] // B.shape[1], [], []
        for t in range(len(x)):
            running = running.token(A, steps[t], x[t], np.repeat(B[t], per_group, 0))
            projection, gate = np.repeat(C[t], per_group, 0), 1.0
            y = running.times(projection)
            if call["D"] is not None:
                skip = numpy(call["D"]) * x[t]
                y = Value(y.value + skip, y.of_state, y.of_tokens + np.abs(skip), y.exponent)
            if call["z"] is not None:
                z = numpy(tokens_of(call, "z", b)[t])
                gate = z / (1 + np.exp(-z))
                y = Value(y.value * gate, *(np.abs(gate) * size for size in (y.of_state, y.of_tokens)), y.exponent)
            outputs.append(y)
            projections.append((projection, np.exp(-y.exponent)[:, None] * np.abs(gate)))
        return cls(outputs, projections, first, [(x[t], B[t], steps[t]) for t in range(len(x))], raw)


# --------------------------------------------------------------------------------------------------------------- checks
def noise(case: Case, value: Value, compiled: bool) -> np.ndarray:
    """What a computation may err by before it is rounded.

    That is float32, and for the kernel the roundings of what its tensor-core products multiply: coefficients of tokens
    as two 16-bit numbers, but as one of the type of x (11 bits for float16) for new states that are no more exact
    themselves; and, for outputs, a float32 state as a number of 11 bits; and what tensor cores cut off sums.
    """
    of_state = of_tokens = 2.0**-21 * (4 + value.exponent.reshape(-1, *[1] * (value.value.ndim - 1)))
    if compiled:
        is_state = value.value.ndim == 3
        # products of B and C, and two or three parts of coefficients for each eight positions
        steps = 2 + 3 * case.window // 8 if is_state else case.dstate // 16 + (case.window + case.tokens) // 4 + 4
        of_state = of_tokens = of_state + tensor_sums.in_use().most(steps, 16)
        of_tokens = of_tokens + (HALF[case.io] if is_state and case.state in COARSE[case.io] else 2.0**-15)
        if case.state == "f32" and not is_state:
            of_state = of_state + 2.0**-11
    return of_state * value.of_state + of_tokens * value.of_tokens + 1e-30


def check_rms(got, want, rounded, more, what):
    """The error is, in root mean square, about that of rounding what is right: ``1.1 * more`` times that."""
    error, least = (np.sqrt(np.mean(np.square(values - want))) for values in (got, rounded))
    limit = 1.1 * more * least + 2.0**-13 * np.sqrt(np.mean(np.square(want))) + 1e-30
    rms_within(error, limit, what)


def product_noise(case: Case, call: dict, slot: int, stored: np.ndarray, projection: tuple) -> np.ndarray:
    """What products of a stored state with C lose by tensor cores: see `tensor_sums.state_products`."""
    C, factor = (torch.from_numpy(np.asarray(part)) for part in projection)
    scale = call["state_scale"][slot].double() if case.state in LARGEST else torch.ones(())
    codes = torch.from_numpy(stored) / scale[..., None]
    return numpy(tensor_sums.state_products(tensor_sums.in_use(), case.state, codes, C)[0] * scale * factor)


def check_outputs(case: Case, got: torch.Tensor, step: Step, b: int, compiled: bool, products: list) -> None:
    """`products`: what products of the stored state with C lose, for each token."""
    values = numpy(got)
    rms = np.sqrt(np.mean([np.square(y.value) for y in step.outputs]))
    for t, y in enumerate(step.outputs):
        rounding = 1.01 * np.maximum(HALF[case.io] * np.abs(y.value), SUBNORMAL[case.io] / 2)
        what = f"out of sequence {b}, token {t}"
        within(values[t], y.value, rounding + noise(case, y, compiled) + products[t], what)
        within(values[t], y.value, CLOSE[case.io] * (np.abs(y.value) + rms) + 1e-30, what)
    wanted = np.stack([y.value for y in step.outputs])
    check_rms(values, wanted, numpy(torch.from_numpy(wanted).to(got.dtype)), 1.0, f"out of sequence {b}")


def check_state(case: Case, call: dict, slot: int, want: Value, compiled: bool) -> None:
    unrounded = noise(case, want, compiled)
    got, share = numpy(call["state"][slot].float()), 1.0 if case.rounds else 0.5  # of the distance between neighbours
    if case.state in LARGEST:
        scale = numpy(call["state_scale"][slot])[..., None]
        largest = np.abs(want.value).max(-1, keepdims=True)
        limit = 1e-6 * largest + unrounded.max(-1, keepdims=True)
        within(scale * LARGEST[case.state], largest, limit, f"largest value of slot {slot}, by its scale")
        got = got * scale
        step = np.broadcast_to(scale, got.shape)
        if case.state == "f8":
            step = np.maximum(np.abs(want.value) * ULP["f8"], scale * SUBNORMAL["f8"])
    else:
        step = np.maximum(np.abs(want.value) * ULP[case.state], SUBNORMAL[case.state])
    within(got, want.value, 1.01 * share * step + unrounded, f"state of slot {slot}")
    unit = scale if case.state in LARGEST else 1.0
    exact = torch.from_numpy(want.value / unit)
    nearest = exact.round() if case.state in ("i16", "i8") else exact.float().to(STATES[case.state]).double()
    # a stochastic rounding errs by the square root of two more; few rounds of Philox are not random
    more = 1.0 if not case.rounds else 1.5 if case.rounds >= 5 else 3.4
    check_rms(got, want.value, nearest.numpy() * unit, more, f"state of slot {slot}")


def check(case: Case, before: dict, after: dict, sequences: list[Sequence | None], compiled: bool) -> list[Step | None]:
    """Outputs, written states and appended rows are the oracle's, and no other byte changed; ``before`` is used up."""
    steps: list[Step | None] = []
    for b, (slot, accepted, cursor) in enumerate(slots_of(case, before)):
        n = len(tokens_of(before, "x", b))
        if slot == PAD or n == 0:
            steps.append(None)
            continue
        step = Step.of(before, b, sequences[b])
        steps.append(step)
        stored = sequences[b].stored
        lost = [product_noise(case, before, slot, stored, p) if compiled else 0.0 for p in step.projections]
        check_outputs(case, tokens_of(after, "out", b), step, b, compiled, lost)
        tokens_of(before, "out", b).copy_(tokens_of(after, "out", b))
        writes = accepted + n > case.window
        if writes and accepted:
            check_state(case, after, slot, step.state, compiled)
            before["state"][slot] = after["state"][slot]
            if case.state in LARGEST:
                before["state_scale"][slot] = after["state_scale"][slot]
        check_rows(case, before, after, slot, accepted, cursor, writes, step, b)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")
    return steps


def check_rows(case, before, after, slot, accepted, cursor, writes, step, b) -> None:
    """Rows of the history that take new tokens."""
    x_name, B_name, dt_name, sums_name, _ = case.names
    if case.ring:
        base, first, kept = cursor, accepted, len(step.tokens)
    else:
        base, first = (1 - cursor, 0) if writes else (cursor, accepted)
        kept = min(len(step.tokens), case.window)
    A = numpy(before["A"])[:, 0, 0]
    sums = np.zeros(len(A)) if writes else -step.state.exponent
    for t in range(kept):
        at = place(case, slot, base, first + t)
        before[x_name][at[0]] = tokens_of(before, "x", b)[t]
        before[B_name][at[1]] = tokens_of(before, "B", b)[t]
        dt, allowed = step.tokens[t][2], 2.0**-21 * (1 + np.abs(step.raw[t]))
        within(numpy(after[dt_name][at[2]]), dt, allowed * dt + 1e-38, f"{dt_name} of token {t}, head")
        before[dt_name][at[2]] = after[dt_name][at[2]]
        if sums_name is not None:
            sums = sums + A * dt
            allowed = 2.0**-19 * (4 + np.abs(step.raw).max())
            bound = allowed * np.abs(sums) + 1e-38
            within(numpy(after[sums_name][at[2]]), sums, bound, f"{sums_name} of token {t}, head")
            before[sums_name][at[2]] = after[sums_name][at[2]]


def run(case: Case, call: dict, device: str = "cpu") -> bool:
    """Call the operator; return whether a compiled kernel ran."""
    there = call if device == "cpu" else moved(call, device)
    operator = cute_ssm.checkpointing_ssu_ring if case.ring else cute_ssm.checkpointing_ssu
    assert operator(**there) is there["out"]
    if there is not call:
        for name, value in there.items():
            if isinstance(value, torch.Tensor):
                storage(call[name]).copy_(storage(value))
    return device != "cpu" or runtime.emulator() is not None


def verify(case: Case, seed: int = 0, device: str = "cpu") -> dict:
    """Run one step, check it against the oracle, and return its arguments."""
    call = arguments(case, seed)
    before = copy(call)
    sequences = [None if s == PAD else Sequence.of(case, before, s, *rest) for s, *rest in slots_of(case, before)]
    check(case, before, call, sequences, run(case, call, device))
    return call


def verify_many(case: Case, steps: int = 40, seed: int = 0, device: str = "cpu") -> None:
    """Run many steps with random acceptance and check each.

    The sequences come in another order in every step, some as padding, and the oracle keeps their pending tokens, and
    the state that it must be, itself.  Of narrow states it goes on from what was stored, which has been checked.
    """
    g, rng = torch.Generator().manual_seed(seed + 1), np.random.default_rng(seed)
    accepted = tuple(rng.integers(0, case.window + 1, case.batch).tolist())
    start = dataclasses.replace(case, pads=(), accepted=accepted, items=False)
    call = arguments(start, seed)
    cursors = {"prev_num_accepted_tokens": call["prev_num_accepted_tokens"], case.names[4]: call[case.names[4]]}
    found = slots_of(start, call)
    held = {slot: Sequence.of(start, call, slot, *rest) for slot, *rest in found}
    A = numpy(call["A"])[:, 0, 0]
    true = {slot: sequence.state(A) for slot, sequence in held.items()}
    writes = dict.fromkeys(held, 0)
    for _ in range(steps):
        slots = [s for s, *_ in found]
        lengths = [case.tokens] * case.batch
        if case.indices is not None:
            slots = rng.permutation(slots).tolist()
            slots = [PAD if rng.random() < 0.1 else s for s in slots]
        if case.lengths is not None:
            lengths = rng.integers(0, case.tokens + 1, case.batch).tolist()
        call |= new_tokens(case, g, lengths)
        call |= cursors
        if case.rounds:
            call["rand_seed"] = call["rand_seed"] + 1
        assign(case, call, slots)
        before = copy(call)
        sequences = [held.get(slot) for slot in slots]
        results = check(case, before, call, sequences, run(case, call, device))
        for b, (slot, result) in enumerate(zip(slots, results)):
            if result is None:
                continue
            sequence, n = held[slot], lengths[b]
            taken = int(rng.integers(0 if rng.random() < 0.1 else 1, min(n, case.window) + 1))
            count, cursor = len(sequence.pending), cursors[case.names[4]]
            if count + n > case.window:
                writes[slot] += 1
                sequence.stored = stored_state(case, call, slot)
                sequence.pending = []
                cursors["prev_num_accepted_tokens"][slot] = 0
                cursor[slot] = (int(cursor[slot]) + count) % case.rows if case.ring else 1 - int(cursor[slot])
            sequence.pending = sequence.pending + result.tokens[:taken]
            cursors["prev_num_accepted_tokens"][slot] += taken
            for x, B, dt in result.tokens[:taken]:
                true[slot] = true[slot].token(A, dt, x, np.repeat(B, len(x) // len(B), 0))
    expected = steps * case.tokens / 2 / case.window
    assert min(writes.values()) >= min(expected / 2, steps / 4), writes
    if case.state == "f32":  # whose roundings do not add up to anything
        for slot, sequence in held.items():
            size = true[slot].of_state + true[slot].of_tokens
            within(sequence.state(A).value, true[slot].value, 2.0**-14 * size + 1e-30, f"true state of slot {slot}")

"""Calls of `selective_scan` and `selective_scan_fn`: random arguments, the oracle, the bounds of errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import approximations
import torch
from bits import same_memory
from bounds import like_float32
from cases import Named
from memory import copy
from step_cases import DTYPES

import cute_ssm
from cute_ssm.ops.selective_scan.reference import selective_scan as mathematics

NULL = 0
# e^(A delta') near 1, as trained models have it, and near 0
DECAYS = {"slow": (-1e-3, -4.0), "typical": (-1.0, -1.0), "fast": (-16.0, 2.0)}
SEQUENCE_ARGUMENTS = ("query_start_loc", "cache_indices", "has_initial_state")


@dataclass(frozen=True)
class Case(Named):
    """One call; the defaults are the base that tests vary one factor of at a time."""

    lengths: tuple[int, ...] = (21, 21, 21)  # of the sequences
    varlen: bool = False
    dim: int = 40
    dstate: int = 16
    ngroups: int = 1
    grouped: bool = True  # B and C have an axis of groups
    io: str = "bf16"
    state: str | None = "f32"
    softplus: bool = True
    has_z: bool = True
    has_D: bool = True
    has_bias: bool = True
    indices: torch.dtype | None = torch.int32
    initial: bool = True  # has_initial_state is given, and true for all sequences but the second
    nulls: tuple[int, ...] = (1,)
    in_place: bool = True  # selective_scan_fn
    give_out: bool = True
    layout: str = "pitched"  # pitched: rows are aligned and apart | odd: apart, not aligned | packed: contiguous
    slot_gap: int = 16  # elements between slots
    decay: str = "typical"
    block_size: int = 0  # prefix caching
    chunks: bool = True  # with prefix caching: chunks are described
    computed: tuple[int, ...] = ()  # with prefix caching: tokens of each sequence before this call


def spread(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, rows in wider ones whose rest is NaN."""
    if layout == "packed":
        return values.clone()
    length = values.shape[-1]
    head, pitch = (8, -(-length // 8) * 8 + 16) if layout == "pitched" else (3, (length | 1) + 6)
    wide = torch.full((*values.shape[:-1], pitch), float("nan"), dtype=values.dtype)
    wide[..., head : head + length] = values
    return wide[..., head : head + length]


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments.  Gaps, slots that no sequence reads, and ``out`` are NaN."""
    g = torch.Generator().manual_seed(seed)
    batch, dim, dstate, total = len(case.lengths), case.dim, case.dstate, sum(case.lengths)
    A_scale, shift = DECAYS[case.decay]
    io = DTYPES[case.io]
    if not case.varlen:
        assert len(set(case.lengths)) <= 1

    def tokens(*shape, transform=lambda t: t):
        sizes = (*shape, total) if case.varlen else (batch, *shape, case.lengths[0])
        return spread(transform(torch.randn(sizes, generator=g)).to(io), case.layout)

    groups = (case.ngroups,) if case.grouped else ()
    call = {
        "u": tokens(dim),
        "ssm_states": None,
        "delta": tokens(dim, transform=(lambda t: t) if case.softplus else (lambda t: t.abs() * 0.3)),
        "A": A_scale * (0.1 + torch.rand(dim, dstate, generator=g)),
        "B": tokens(*groups, dstate),
        "C": tokens(*groups, dstate),
        "D": torch.randn(dim, generator=g) if case.has_D else None,
        "z": tokens(dim) if case.has_z else None,
        "delta_bias": (torch.randn(dim, generator=g) + shift if case.softplus else torch.rand(dim, generator=g) * 0.1)
        if case.has_bias
        else None,
        "delta_softplus": case.softplus,
        "null_block_id": NULL,
    }
    if case.varlen:
        call["query_start_loc"] = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32)
    if case.state is not None:
        _add_states(case, call, g)
    if not case.in_place and case.give_out:
        call["out"] = spread(torch.full(call["u"].shape, float("nan"), dtype=io), case.layout)
    return call


def _add_states(case: Case, call: dict, g: torch.Generator) -> None:
    batch, dim, dstate = len(case.lengths), case.dim, case.dstate
    columns = 1 + max((n + c) // case.block_size for n, c in zip(case.lengths, case.computed)) if case.block_size else 1
    slots = 1 + 2 * batch * columns if case.indices is not None else batch
    dtype = DTYPES[case.io if case.state == "io" else case.state]
    pool = torch.full((slots, dim * dstate + case.slot_gap), float("nan"), dtype=dtype)
    call["ssm_states"] = states = pool[:, : dim * dstate].unflatten(1, (dim, dstate))
    table = torch.arange(batch)[:, None]
    if case.indices is not None:
        table = 1 + torch.randperm(slots - 1, generator=g)[: batch * columns].view(batch, columns)
    start = [c > 0 if case.block_size else b != 1 for b, c in enumerate(case.computed or [0] * batch)]
    first_column = [max(0, c - 1) // case.block_size if case.block_size else 0 for c in case.computed or [0] * batch]
    for b in range(batch):
        states[table[b, first_column[b]]] = torch.randn(dim, dstate, generator=g).to(dtype)
    if case.indices is not None:
        for b in case.nulls:
            table[b % batch, first_column[b % batch]] = NULL
        call["cache_indices"] = (table if case.block_size else table[:, 0]).to(case.indices)
    if case.initial:
        call["has_initial_state"] = torch.tensor(start)
    if not case.block_size:
        return
    size, ends, lasts = case.block_size, [0], []
    for length, computed in zip(case.lengths, case.computed):
        stop, origin = computed + length, ends[-1] - computed
        ends += [origin + min(stop, (n + 1) * size) for n in range(computed // size, -(-stop // size))]
        lasts.append(len(ends) - 2)
    metadata = {
        "block_idx_first_scheduled_token": [c // size for c in case.computed],
        "block_idx_last_scheduled_token": [(c + n - 1) // size for n, c in zip(case.lengths, case.computed)],
        "initial_state_idx": first_column,
        **({"cu_chunk_seqlen": ends, "last_chunk_indices": lasts} if case.chunks else {}),
    }
    call["block_size"] = size
    call.update({name: torch.tensor(value).to(case.indices) for name, value in metadata.items()})


def segments(case: Case, call: dict) -> list:
    """Of each sequence that is not null: (batch index of its tokens, first token, initial slot, [(end, slot)])."""
    found, begin = [], 0
    for b, length in enumerate(case.lengths):
        start = begin if case.varlen else 0
        begin += length
        if case.state is None:
            found.append((b, start, None, [(start + length, None)]))
            continue
        cache = call.get("cache_indices", torch.arange(len(case.lengths)))
        row = cache[b].tolist() if cache.dim() == 2 else [int(cache[b])]
        computed = case.computed[b] if case.block_size else 0
        slot = row[max(0, computed - 1) // case.block_size if case.block_size else 0]
        if "cache_indices" in call and slot == NULL:
            continue
        ends = [(start + length, slot)] if length else []
        if case.block_size:
            positions = [p for p in range(computed + 1, computed + length) if p % case.block_size == 0]
            positions.append(computed + length)
            targets = [row[(p - 1) // case.block_size] for p in positions]
            ends = [(start + p - computed, None if t == NULL else t) for p, t in zip(positions, targets)]
        has = call.get("has_initial_state")
        found.append((b, start, slot if has is not None and has[b] else None, ends))
    return found


def expected(
    case: Case, call: dict, dtype: torch.dtype, absolute: bool = False, compute: Callable = mathematics
) -> tuple[list, list]:
    """([(tokens, y, gated)], [(slot, state)]) of a call; `absolute`: the sizes of the terms that these are sums of.

    `compute` is called like the operator's mathematics.
    """

    def sized(tensor):
        return tensor.abs() if absolute and tensor is not None else tensor

    outputs, saved = [], []
    for b, begin, slot, ends in segments(case, call):
        state = None if slot is None else sized(call["ssm_states"][slot])[None].to(dtype)
        for stop, target in ends:
            part = (..., slice(begin, stop)) if case.varlen else (slice(b, b + 1), ..., slice(begin, stop))

            def tokens(name, part=part, lead=case.varlen):
                tensor = call[name]
                if tensor is None:
                    return None
                tensor = tensor[part][None] if lead else tensor[part]
                return tensor.unsqueeze(1) if name in "BC" and tensor.dim() == 3 else tensor

            u, B, C = (sized(tokens(n)) for n in ("u", "B", "C"))
            args = (u, tokens("delta"), call["A"], B, C, sized(call["D"]), tokens("z"), call["delta_bias"])
            y, gated, state = compute(*args, call["delta_softplus"], state, dtype)
            outputs.append((part, sized(y)[0], sized(gated)[0]))
            if target is not None:
                saved.append((target, state[0]))
            begin = stop
    return outputs, saved


def approximate(errors: approximations.Errors, u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, dtype):
    """What approximate functions may change the results of `mathematics` by; u, B, C and D are positive.

    With e_d the error of delta' (`Errors.softplus`), that of the states, and with |h| that of the terms of h, is

        e <- a e + |h| (e_a + a |A| e_d) + e_d |u B|,     a = e^(A delta'),     |h| <- a |h| + delta' |u B|

    with e_a that of a power.  A scan in parts takes one more power, of up to twice the relative error, for each part of
    at least eight tokens: hence 5/4.  Outputs err by the sum of |C| e, and by the relative error of the gate.  The
    state that is returned has |h| and e as its last axis.
    """
    state = torch.zeros(*u.shape[:2], A.shape[1], 2, dtype=dtype) if state is None else state
    h, e = state.unbind(-1) if state.dim() == 4 else (state, torch.zeros_like(state))
    raw = delta.to(dtype) + (0 if delta_bias is None else delta_bias.to(dtype)[:, None])
    step = torch.nn.functional.softplus(raw) if delta_softplus else raw
    step_error = errors.softplus(raw, fast=True) if delta_softplus else torch.zeros_like(raw)
    rates, y, y_error = A.to(dtype), [], []
    for t in range(u.shape[-1]):
        of_B, of_C = (x[..., t].to(dtype).repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
        d, d_error, token = step[..., t, None], step_error[..., t, None], u[..., t, None].to(dtype) * of_B
        a = torch.exp(rates * d)
        e = a * e + h * (5 / 4 * errors.decay(a) + a * rates.abs() * d_error) + d_error * token
        h = a * h + d.abs() * token
        y.append((h * of_C).sum(-1))
        y_error.append((e * of_C).sum(-1))
    if not y:
        return u.to(dtype), u.to(dtype), torch.stack([h, e], -1)
    of_y, error = torch.stack(y, -1) + (0 if D is None else D.to(dtype)[:, None] * u), torch.stack(y_error, -1)
    if z is None:
        return error, error, torch.stack([h, e], -1)
    gate = torch.nn.functional.silu(z.to(dtype)).abs()
    return error, gate * (error + of_y * errors.silu(z)), torch.stack([h, e], -1)


def check(case: Case, before: dict, after: dict, out: torch.Tensor) -> None:
    """Outputs and saved states against the oracle, everything else bit for bit as it was."""
    outputs, saved = expected(case, before, torch.float64)
    outputs32, saved32 = expected(case, before, torch.float32)
    sizes, saved_sizes = expected(case, before, torch.float64, absolute=True)
    tiny = torch.finfo(out.dtype).tiny
    errors, changed, changed_states = approximations.in_use(), None, None
    if errors.any():
        changed, changed_states = expected(case, before, torch.float64, True, partial(approximate, errors))

    def compare(tensor, column, what):
        got = [tensor[part[0]].view(part[column].shape) for part in outputs]
        rounded = [part[column].to(tensor.dtype) for part in outputs32]
        want = [part[column] for part in outputs]
        names = [f"{what}, part {i}" for i in range(len(got))]
        more = None if changed is None else [part[column] for part in changed]
        like_float32(got, rounded, want, [part[column] + tiny for part in sizes], names, more)

    if outputs:
        compare(out, 2, "out")
        if case.in_place and case.has_z:
            compare(after["delta"], 1, "delta, which holds the outputs before the gate")
    if saved:
        states = after["ssm_states"]
        rounded = [state.to(states.dtype) for _, state in saved32]
        size = [state + torch.finfo(states.dtype).tiny for _, state in saved_sizes]
        got, names = [states[slot] for slot, _ in saved], [f"ssm_states[{slot}]" for slot, _ in saved]
        more = None if changed_states is None else [state[..., 1] for _, state in changed_states]
        like_float32(got, rounded, [state for _, state in saved], size, names, more)

    # what must not change: other slots, gaps, tokens of null sequences, inputs
    for slot, _ in saved:
        before["ssm_states"][slot] = after["ssm_states"][slot]
    written = (("delta", "z") if case.has_z else ("delta",)) if case.in_place else ("out",)
    untouched = torch.ones(out.shape, dtype=torch.bool)
    for part, *_ in outputs:
        untouched[part] = False
        for name in written:
            if before.get(name) is not None:
                before[name][part] = after[name][part]
    if not case.in_place and before.get("out") is None:
        assert not out[untouched].any(), "tokens of no sequence in an allocated out are zero"
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")


def scan(case: Case, call: dict) -> torch.Tensor:
    """Call the operator of a case."""
    return (cute_ssm.selective_scan_fn if case.in_place else cute_ssm.selective_scan)(**call)


def verify(case: Case, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Call the operator on a case, check it against the oracle, and return its arguments and result."""
    call = arguments(case, seed)
    before = copy(call)
    out = scan(case, call)
    if case.in_place:
        assert out is call["z" if case.has_z else "delta"]
    elif case.give_out:
        assert out is call["out"]
    check(case, before, call, out)
    return call, out

"""Calls of `selective_state_update`: random arguments in awkward memory, the oracle, and the bounds of errors."""

from __future__ import annotations

from dataclasses import dataclass

import approximations
import torch
from bits import same_memory
from bounds import like_float32
from cases import Named
from memory import copy

import cute_ssm
from cute_ssm.ops.selective_state_update.reference import selective_state_update as mathematics

PAD = -1
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# e^(A dt') near 1, as trained models have it, and near 0
DECAYS = {"slow": (-1e-3, -4.0), "typical": (-1.0, -1.0), "fast": (-16.0, 2.0)}


@dataclass(frozen=True)
class Case(Named):
    """One call; the defaults are the base that tests vary one factor of at a time."""

    batch: int = 3
    nheads: int = 4
    dim: int = 64
    dstate: int = 128
    ngroups: int = 2
    state: str = "f16"
    io: str = "bf16"
    dt: str = "f32"
    A: str = "f32"
    weights: str = "f32"  # D and dt_bias
    layout: str = "tied"  # tied | dense | dense_A | dense_dt
    softplus: bool = True
    has_z: bool = True
    has_D: bool = True
    has_bias: bool = True
    indices: torch.dtype | None = torch.int32
    separate: bool = False  # dst_state_batch_indices
    pads: tuple[int, ...] = (1,)
    update: bool = True
    give_out: bool = True
    strided: bool = False  # x, z, B, C, dt and out are slices of wider rows; B and C are not aligned
    decay: str = "typical"


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments.  The pool has gaps between slots; gaps, slots that no sequence uses, and ``out`` are NaN."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, dim, dstate, groups = case.batch, case.nheads, case.dim, case.dstate, case.ngroups
    A_log, shift = DECAYS[case.decay]

    def randn(*shape, dtype, wide=False):
        values = torch.randn(*shape, generator=g).to(dtype)
        if not wide:
            return values
        row = torch.full((*shape[:1], 3 + values[0].numel() + 5), float("nan"), dtype=dtype)
        view = row[:, 3:-5].unflatten(1, shape[1:])
        return view.copy_(values)

    io, weights = DTYPES[case.io], DTYPES[case.weights]
    slots = 2 * batch + 3
    gap = 16 if case.indices is not None else 0
    pool = torch.full((slots, heads * dim * dstate + gap), float("nan"), dtype=DTYPES[case.state])
    state = pool[:, : heads * dim * dstate].unflatten(1, (heads, dim, dstate))
    order = torch.randperm(slots, generator=g)
    src = order[:batch].clone() if case.indices is not None else torch.arange(batch)
    dst = order[batch : 2 * batch].clone() if case.separate else src
    state[src] = torch.randn(batch, heads, dim, dstate, generator=g).to(state.dtype)
    pads = case.pads if case.indices is not None else ()
    for row in pads:
        src[row % batch] = PAD
    if case.separate and batch > 2:
        dst[2] = PAD  # computed, written nowhere

    tied_dt, tied_A = case.layout in ("tied", "dense_A"), case.layout in ("tied", "dense_dt")
    dt = randn(batch, heads, *(() if tied_dt else (dim,)), dtype=DTYPES[case.dt], wide=case.strided and not tied_dt)
    bias = (torch.randn(heads, *(() if tied_dt else (dim,)), generator=g) + shift).to(weights)
    A = (A_log * (0.1 + torch.rand(heads, *(() if tied_A else (dim, dstate)), generator=g))).to(DTYPES[case.A])
    D = torch.randn(heads, *(() if tied_dt else (dim,)), generator=g).to(weights)

    def per_head(value):
        return value[..., None].expand(*value.shape, dim) if tied_dt else value

    def column():
        return randn(batch, groups, dstate, dtype=io, wide=case.strided)

    call = {
        "state": state,
        "x": randn(batch, heads, dim, dtype=io, wide=case.strided),
        "dt": per_head(dt) if case.softplus else per_head(dt.abs() * 0.3),
        "A": A[:, None, None].expand(heads, dim, dstate) if tied_A else A,
        "B": column(),
        "C": column(),
        "D": per_head(D) if case.has_D else None,
        "z": randn(batch, heads, dim, dtype=io, wide=case.strided) if case.has_z else None,
        "dt_bias": (per_head(bias) if case.softplus else per_head(bias.abs() * 0.1)) if case.has_bias else None,
        "dt_softplus": case.softplus,
        "disable_state_update": not case.update,
        "pad_slot_id": PAD,
    }
    if case.indices is not None:
        call["state_batch_indices"] = src.to(case.indices)
        if case.separate:
            call["dst_state_batch_indices"] = dst.to(case.indices)
    if case.give_out:
        call["out"] = randn(batch, heads, dim, dtype=io, wide=case.strided).fill_(float("nan"))
    return call


def expected(call: dict, compute_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(outputs, new states, and the sizes of the terms that each is a sum of) of all rows; padding counts as slot 0."""
    batch = call["x"].shape[0]
    src = call.get("state_batch_indices", torch.arange(batch)).long().clamp(min=0)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    y, new = mathematics(call["state"][src], *(call[n] for n in names), call["dt_softplus"], compute_dtype)
    absolute = {n: call[n].abs() if n in ("x", "B", "C", "D") and call[n] is not None else call[n] for n in names}
    y_size, new_size = mathematics(call["state"][src].abs(), *absolute.values(), call["dt_softplus"], compute_dtype)
    return y, new, y_size.abs(), new_size


def approximate(call: dict, y_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What approximate functions may change outputs and new states by.

    With e_d the error of dt' (`Errors.softplus`), and a = e^(A dt'), the error of a state is |h| (e_a + a |A| e_d) +
    e_d |x B|, and that of an output the sum of |C| times these, and the relative error of the gate of its terms,
    `y_size`.
    """
    errors = approximations.in_use()
    src = call.get("state_batch_indices", torch.arange(len(call["x"]))).long().clamp(min=0)
    h, A = call["state"][src].double().abs(), call["A"].double()
    x, dt, B, C = (call[name].double() for name in ("x", "dt", "B", "C"))
    raw = dt + (0 if call["dt_bias"] is None else call["dt_bias"].double())
    step = torch.nn.functional.softplus(raw, threshold=20.0) if call["dt_softplus"] else raw
    step_error = errors.softplus(raw)[..., None] if call["dt_softplus"] else torch.zeros_like(raw)[..., None]
    of_B, of_C = (t.abs().repeat_interleave(x.shape[1] // t.shape[1], dim=1)[:, :, None] for t in (B, C))
    a = torch.exp(A * step[..., None])
    new = h * (errors.decay(a) + a * A.abs() * step_error) + step_error * x.abs()[..., None] * of_B
    y = (new * of_C).sum(-1)
    if call["z"] is not None:
        z = call["z"].double()
        y = y * torch.nn.functional.silu(z).abs() + y_size * errors.silu(z)
    return y, new


def check(before: dict, after: dict, out: torch.Tensor) -> None:
    """Outputs and states within 1.5 times the errors of float32 PyTorch, everything else bit for bit as it was.

    Errors count in units of the terms that a value is a sum of; what approximate functions add is allowed besides.
    """
    batch = before["x"].shape[0]
    src = before.get("state_batch_indices", torch.arange(batch)).long()
    dst = before.get("dst_state_batch_indices", src).long()
    real = src != PAD
    y, new, y_size, new_size = expected(before, torch.float64)
    y32, new32, _, _ = expected(before, torch.float32)
    y_more, new_more = approximate(before, y_size)

    if real.any():
        tiny = torch.finfo(out.dtype).tiny
        rounded, unit = y32[real].to(out.dtype), y_size[real] + tiny
        like_float32([out[real]], [rounded], [y[real]], [unit], ["out[active rows]"], [y_more[real]])
    kept = real & (dst != PAD)
    if not before["disable_state_update"] and kept.any():
        state, tiny = after["state"], torch.finfo(after["state"].dtype).tiny
        rounded, unit = new32[kept].to(state.dtype), new_size[kept] + tiny
        like_float32([state[dst[kept]]], [rounded], [new[kept]], [unit], ["state[written slots]"], [new_more[kept]])

    # what must not change: other slots, gaps, rows of padding, inputs
    if not before["disable_state_update"]:
        before["state"][dst[kept]] = after["state"][dst[kept]]
    if before.get("out") is not None:
        before["out"][real] = after["out"][real]
    else:
        assert not out[~real].any(), "rows of padding in an allocated out are zero"
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")


def verify(case: Case, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Call the operator on a case, check it against the oracle, and return its arguments and result."""
    call = arguments(case, seed)
    before = copy(call)
    out = cute_ssm.selective_state_update(**call)
    check(before, call, out)
    return call, out

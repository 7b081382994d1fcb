"""Calls of `selective_state_update` with several tokens, every state type and every kind of destination.

The oracle here is a loop over sequences, heads and tokens in NumPy float64 that shares nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import approximations
import numpy as np
import tensor_sums
import torch
from bits import same_memory
from bounds import rms_within, within
from cases import Named
from memory import copy
from step_cases import DTYPES, PAD

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime

STATES = {**DTYPES, "i16": torch.int16, "i8": torch.int8, "f8": torch.float8_e4m3fn}
LARGEST = {"i16": 32767.0, "i8": 127.0, "f8": 448.0}
# relative step between neighbours, and the step below the normal range, of what a state is stored in
ULP = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10, "f8": 2.0**-3}
SUBNORMAL = {"f32": 0.0, "bf16": 0.0, "f16": 2.0**-24, "f8": 2.0**-9}


@dataclass(frozen=True)
class Tokens(Named):
    """One call; the defaults are the base that tests vary one factor of at a time."""

    lengths: tuple[int, ...] = (4, 4, 4)
    packed: bool = False
    nheads: int = 2
    dim: int = 64
    dstate: int = 64
    ngroups: int = 1
    state: str = "f16"
    io: str = "bf16"
    layout: str = "tied"  # tied | dense | dense_A | dense_dt
    has_z: bool = True
    decay: float = 1.0  # factor of A
    indices: torch.dtype | None = torch.int32
    destination: str = "source"  # source | vector | matrix | intermediates | none
    accepted: bool = False
    disabled: bool = False
    rows: bool = True  # intermediate_state_indices
    rounds: int = 0
    seed_per_slot: bool = False
    pads: tuple[int, ...] = (1,)
    give_out: bool = True
    cache_steps: int = 0


def arguments(case: Tokens, seed: int = 0) -> dict:
    """Random arguments; what no sequence owns is NaN, or the largest integers."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, dim, dstate, groups = len(case.lengths), case.nheads, case.dim, case.dstate, case.ngroups
    io, steps = DTYPES[case.io], max(case.lengths)
    lead = (sum(case.lengths) + 2,) if case.packed else (batch, steps)

    def randn(*shape, dtype=io):
        return torch.randn(*shape, generator=g).to(dtype)

    columns = steps + 1
    slots = batch * (columns + 1) + 2
    order = torch.randperm(slots, generator=g)
    if case.indices is None:
        order = torch.cat([torch.arange(batch), order[order >= batch]])
    src = order[:batch].clone()
    pads = case.pads if case.indices is not None else ()

    def pool(*lines):
        tensor = torch.empty(*lines, heads, dim, dstate, dtype=STATES[case.state])
        scale = torch.full((*lines, heads, dim), float("nan")) if case.state in LARGEST else None
        if case.state in ("i16", "i8"):
            tensor.fill_(int(LARGEST[case.state]))
        else:
            tensor.copy_(torch.full_like(tensor, float("nan"), dtype=torch.float32))
        return tensor, scale

    state, scale = pool(slots)
    call = {"state": state}
    every = order[: batch * columns].view(columns, batch).T.contiguous()  # a slot for each token of each sequence
    if case.accepted:
        accepted = torch.randint(0, columns, (batch,), generator=g)
        src = every[torch.arange(batch), (accepted - 1).clamp(min=0)]
        call["num_accepted_tokens"] = accepted.int()
    values = torch.randn(batch, heads, dim, dstate, generator=g)
    if scale is None:
        state[src] = values.to(state.dtype)
    else:
        scale[src] = values.abs().amax(-1) / LARGEST[case.state]
        encoded = values / scale[src][..., None]
        state[src] = (encoded.round() if case.state != "f8" else encoded.clamp(-448, 448)).to(state.dtype)
        call["state_scale"] = scale
    indices = every.clone() if case.accepted else src.clone()
    for row in pads:
        if case.accepted:
            indices[row % batch] = PAD
        else:
            indices[row % batch] = PAD
    if case.indices is not None:
        call["state_batch_indices"] = indices.to(case.indices)
    kind = case.indices or torch.int64
    if case.destination == "vector":
        call["dst_state_batch_indices"] = order[-batch:].to(kind)
    elif case.destination == "matrix":
        dst = (every if case.accepted else order[batch : batch * (columns + 1)].view(batch, columns)).clone()
        if batch > 2:
            dst[2, 1 % columns] = PAD
        call["dst_state_batch_indices"] = dst.to(kind)
    elif case.destination == "intermediates":
        lines = batch + 2 if case.rows else slots
        saved, saved_scale = pool(lines, steps + 1)
        call["intermediate_states_buffer"] = saved
        if case.rows:
            call["intermediate_state_indices"] = torch.randperm(lines, generator=g)[:batch].to(kind)
        if saved_scale is not None:
            call["intermediate_state_scales"] = saved_scale
    if case.packed:
        cu = torch.tensor([0, *np.cumsum(case.lengths)]) + 1
        call["cu_seqlens"] = cu.to(case.indices or torch.int32)

    tied_dt, tied_A = case.layout in ("tied", "dense_A"), case.layout in ("tied", "dense_dt")

    def per_head(value):
        return value[..., None].expand(*value.shape, dim) if tied_dt else value

    A = -case.decay * (0.1 + torch.rand(heads, *((1, 1) if tied_A else (dim, dstate)), generator=g))
    call |= {
        "x": randn(*lead, heads, dim),
        "dt": per_head(randn(*lead, heads, *(() if tied_dt else (dim,)), dtype=torch.float32)),
        "A": A.expand(heads, dim, dstate),
        "B": randn(*lead, groups, dstate),
        "C": randn(*lead, groups, dstate),
        "D": per_head(randn(heads, *(() if tied_dt else (dim,)), dtype=torch.float32)),
        "z": randn(*lead, heads, dim) if case.has_z else None,
        "dt_bias": per_head(randn(heads, *(() if tied_dt else (dim,)), dtype=torch.float32) - 1),
        "dt_softplus": True,
        "disable_state_update": case.disabled,
        "pad_slot_id": PAD,
        "cache_steps": case.cache_steps,
    }
    if case.rounds:
        seeds = torch.randint(-(2**62), 2**62, (slots if case.seed_per_slot else 1,), generator=g)
        call |= {"rand_seed": seeds, "philox_rounds": case.rounds}
    if case.give_out:
        call["out"] = torch.full((*lead, heads, dim), float("nan"), dtype=io)
    return call


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


class Path(NamedTuple):
    """What a call's kernel does besides the recurrence; neither by the reference.

    Attributes
    ----------
    divides : bool
        It divides inputs by running products of decays: `TokenLoop` with one decay per head.
    multiplies : bool
        Its outputs are sums of tensor cores: `TokenProducts`.
    """

    divides: bool = False
    multiplies: bool = False


PLAIN = Path()


def path_of(call: dict) -> Path:
    """The path that a call takes where kernels run now."""
    session = runtime.emulator()
    if session is None:
        return PLAIN
    with runtime.planned(archs.by_name(session.arch), session.sm_count) as plan:
        cute_ssm.selective_state_update(**call)
    for spec, config, _ in plan.kernels:
        multiplies = bool(config.matmul)
        return Path(spec.tokens != "one" and spec.decay_tied and not multiplies, multiplies)
    return PLAIN


class Oracle:
    """What a call must do: ``outputs`` {index of x: (value, size, error)}, ``stores`` [(pool, index, *these)].

    A size is that of the terms that a value is a sum of; an error is what approximate functions may change it by:

        e <- a e + |h| (e_a + a |A| e_d) + (e_d + rcp dt') |x B|,     a = e^(A dt')

    as for one token in `step_cases`, but that the term of rcp is that of kernels which divide by running products.
    """

    def __init__(self, call: dict, path: Path = PLAIN):
        self.errors = approximations.in_use()
        self.rcp = self.errors.rcp if path.divides else 0.0
        self.call, self.outputs, self.stores, self.padding = call, {}, [], []
        x = numpy(call["x"])
        cu = call.get("cu_seqlens")
        batch = len(cu) - 1 if cu is not None else x.shape[0]
        for b in range(batch):
            if cu is not None:
                at = [(row,) for row in range(int(cu[b]), int(cu[b + 1]))]
            else:
                at = [(b, t) for t in range(x.shape[1])] if x.ndim == 4 else [(b,)]
            self.sequence(b, at)

    def sequence(self, b, at):
        call = self.call
        src, accepted = call.get("state_batch_indices"), call.get("num_accepted_tokens")
        column = max(int(accepted[b]) - 1, 0) if accepted is not None else 0
        slot = b if src is None else int(src[b, column] if src.dim() == 2 else src[b])
        if src is not None and slot == PAD:
            self.padding += at
            return
        state = numpy(call["state"][slot].float())
        if "state_scale" in call:
            state = state * numpy(call["state_scale"][slot])[..., None]
        size, error = np.abs(state), np.zeros_like(state)
        for t, index in enumerate(at):
            state, size, error = self.token(index, state, size, error)
            self.keep(b, t, len(at), slot, state, size, error)

    def token(self, index, state, size, error):
        call, errors = self.call, self.errors
        heads, groups = call["x"].shape[-2], call["B"].shape[-2]
        x, dt, B, C = (numpy(call[name][index]) for name in ("x", "dt", "B", "C"))
        new, new_size, new_error = np.empty_like(state), np.empty_like(size), np.empty_like(error)
        y, y_size, y_error = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        for h in range(heads):
            g = h // (heads // groups)
            raw = dt[h] + numpy(call["dt_bias"])[h]
            step = np.where(raw > 20, raw, np.log1p(np.exp(np.minimum(raw, 20))))
            exponent = numpy(call["A"])[h] * step[:, None]
            decay = np.exp(exponent)
            new[h] = decay * state[h] + np.outer(step * x[h], B[g])
            rounded = 1 + np.abs(exponent)  # float32 rounds the exponent itself
            new_size[h] = rounded * decay * size[h] + np.abs(np.outer(step * x[h], B[g]))
            step_error, decay_error = (
                f(torch.tensor(v)).numpy() for f, v in ((errors.softplus, raw), (errors.decay, decay))
            )
            decay_error = decay_error + decay * np.abs(numpy(call["A"])[h]) * step_error[:, None]
            gain_error = np.abs(np.outer((step_error + self.rcp * step) * x[h], B[g]))
            new_error[h] = decay * error[h] + decay_error * size[h] + gain_error
            skip = numpy(call["D"])[h] * x[h]
            y[h] = new[h] @ C[g] + skip
            y_size[h] = new_size[h] @ np.abs(C[g]) + np.abs(skip)
            y_error[h] = new_error[h] @ np.abs(C[g])
        if call["z"] is not None:
            z = numpy(call["z"][index])
            gate = z / (1 + np.exp(-z))
            y, y_size, y_error = y * gate, y_size * np.abs(gate), y_error * np.abs(gate)
            y_error = y_error + y_size * errors.silu(torch.tensor(z)).numpy()
        self.outputs[index] = (y, y_size, y_error)
        return new, new_size, new_error

    def keep(self, b, t, length, slot, *state):
        call = self.call
        if "intermediate_states_buffer" in call:
            rows = call.get("intermediate_state_indices")
            line = slot if rows is None else int(rows[b])
            self.stores.append(("intermediate_states_buffer", (line, t), *state))
        if call["disable_state_update"]:
            return
        dst = call.get("dst_state_batch_indices")
        if dst is not None and dst.dim() == 2 and call["x"].dim() + ("cu_seqlens" in call) == 4:
            line = int(dst[b, t])
        elif t + 1 < length:
            return
        else:
            line = slot if dst is None else int(dst[b] if dst.dim() == 1 else dst[b, 0])
        if dst is None or line != PAD:
            self.stores.append(("state", (line,), *state))


def check(case: Tokens, before: dict, after: dict, out: torch.Tensor) -> None:
    """Every output and state within the error of its rounding, of float32, of approximate functions and tensor cores.

    No other byte has changed.
    """
    path = path_of(before)
    oracle = Oracle(before, path)
    n = max(case.lengths) + 4
    half = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11}[case.io]
    smallest = SUBNORMAL[case.io] / 2
    # `TokenProducts`: dstate / 8 instructions for products with C, and two for those with x
    most, mean = 0.0, 0.0
    if path.multiplies:
        most, mean = tensor_sums.in_use().within(torch.ones((), dtype=torch.float64), case.dstate // 8 + 2, 8).tolist()
    together = []  # in units of the sizes: error, rounding, and what approximate functions and tensor cores add
    for index, (want, size, error) in oracle.outputs.items():
        bound = 1.01 * np.maximum(half * np.abs(want), smallest) + n * 2.0**-22 * size + 1e-30
        within(out[index], want, bound + 1.01 * (error + most * size), f"out{list(index)}")
        rounded = numpy(torch.from_numpy(want).to(out.dtype))
        parts = (numpy(out[index]) - want, rounded - want, error + mean * size)
        together.append(np.stack(parts) / (size + 1e-30))
    if together:
        got, rounding, more = np.sqrt(np.mean(np.square(np.stack(together)), axis=(0, 2, 3)))
        rms_within(got, 1.1 * rounding + 2.0**-22 + more, "out (in units of what it is a sum of)")
    share = 1.0 if case.rounds else 0.5  # of the distance between neighbours
    for pool, index, want, size, error in oracle.stores:
        got, noise = numpy(after[pool][index].float()), n * 2.0**-22 * size + 1.01 * error
        if case.state in LARGEST:
            scales = "state_scale" if pool == "state" else "intermediate_state_scales"
            scale = numpy(after[scales][index])[..., None]
            largest = np.abs(want).max(-1, keepdims=True)
            bound = 1e-4 * largest + 1e-30
            within(scale * LARGEST[case.state], largest, bound, f"{scales}{list(index)} * {LARGEST[case.state]}")
            got = got * scale
            step = scale if case.state != "f8" else np.maximum(np.abs(want) * ULP["f8"], scale * SUBNORMAL["f8"])
        else:
            step = np.maximum(np.abs(want) * ULP[case.state], SUBNORMAL[case.state])
        within(got, want, 1.01 * share * step + noise + 1e-30, f"{pool}{list(index)}")
        for name in (pool, {"state": "state_scale"}.get(pool, "intermediate_state_scales")):
            if before.get(name) is not None:
                before[name][index] = after[name][index]
    if before.get("out") is not None:
        for index in oracle.outputs:
            before["out"][index] = after["out"][index]
    else:
        for index in oracle.padding:
            assert not out[index].any(), "rows of padding in an allocated out are zero"
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")


def verify(case: Tokens, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Call the operator on a case, check it against the oracle, and return its arguments and result."""
    call = arguments(case, seed)
    before = copy(call)
    out = cute_ssm.selective_state_update(**call)
    check(case, before, call, out)
    return call, out

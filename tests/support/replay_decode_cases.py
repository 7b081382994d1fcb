"""Calls of vLLM's one-token ReplaySSM function: random arguments, and the recurrence token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass

import approximations
import numpy as np
import torch
from bits import same_bits
from bounds import like_float32, within
from cases import Named, vary
from memory import copy
from step_oracle import token, wide

from cute_ssm.compat import vllm
from cute_ssm.ops.replay_decode import reference
from cute_ssm.reference import rounding

NAN = float("nan")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NULL = 0


@dataclass(frozen=True)
class Case(Named):
    """A call; the defaults are the base that tests vary one factor of at a time."""

    state: str = "f32"
    inputs: str = "bf16"
    A: torch.dtype = torch.float32
    dt: torch.dtype = torch.bfloat16
    rows: int = 8
    heads: int = 4
    groups: int = 2
    dim: int = 64
    dstate: int = 128
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    flags: torch.dtype = torch.bool
    indices: torch.dtype | None = torch.int32
    columns: int = 0  # of state_batch_indices
    views: bool = False  # of a fused projection, at odd addresses
    rate: float = 1.0
    seed: int | None = None


BASE = Case()
FEW = [
    BASE,
    *vary(BASE, state=("bf16",), rows=(1,), dstate=(96,), views=(True,), rate=(300.0,), indices=(None,)),
    Case(rows=40),
    Case(state="bf16", inputs="f32", dim=80, dstate=16),
    Case(state="f16", dstate=64, seed=7, dim=24),
    Case(inputs="f32", views=True, z=False, dstate=256, columns=3),
]
MORE = [
    *vary(BASE, state=("f16",), inputs=("f16", "f32"), A=(torch.bfloat16,), dt=(torch.float32,), rows=(3,)),
    *vary(BASE, heads=(2, 6), dim=(8, 80, 128), dstate=(8, 16, 32, 256), D=(False,), z=(False,), bias=(False,)),
    *vary(BASE, softplus=(False,), flags=(torch.int8,), indices=(torch.int64,), columns=(3,), rate=(0.0,)),
]


def arguments(case: Case, seed: int = 0, positions: list[int] | None = None) -> dict:
    """Random arguments; slots without a sequence, and rows of the caches that hold no token, are NaN."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    dtype, heads, groups, dim, dstate = DTYPES[case.inputs], case.heads, case.groups, case.dim, case.dstate
    last = case.rows - 1
    places = positions or [0, 0, last, last, last // 2, min(1, last)]
    flush = torch.tensor([b % 2 == 1 for b in range(len(places))])
    batch, slots = len(places), len(places) + 3
    order = torch.randperm(slots - 1, generator=g)[:batch] + 1
    if case.indices is None:
        order = torch.arange(batch)
    state = torch.full((slots, heads, dim, dstate), NAN).to(DTYPES[case.state])
    x_cache = torch.full((slots, heads, case.rows, dim), NAN, dtype=dtype)
    B_cache = torch.full((slots, groups, case.rows, dstate), NAN, dtype=dtype)
    dt_cache = torch.full((slots, heads, case.rows), NAN)
    state[order] = randn(batch, heads, dim, dstate).to(state.dtype)
    for slot, k in zip(order.tolist(), places):
        x_cache[slot, :, :k], B_cache[slot, :, :k] = randn(heads, k, dim).to(dtype), randn(groups, k, dstate).to(dtype)
        dt_cache[slot, :, :k] = torch.rand(heads, k, generator=g) * 0.5

    def rows(of, columns):
        if not case.views:
            return randn(batch, of, columns).to(dtype)
        return randn(batch, of * columns + 3).to(dtype)[:, 1:-2].unflatten(1, (of, columns))

    step, bias = randn(batch, heads), randn(heads)
    if not case.softplus:  # step sizes are positive
        step, bias = step.abs(), bias.abs()
    call = {
        "state": state,
        "x": rows(heads, dim),
        "dt": step.to(case.dt)[..., None].expand(batch, heads, dim),
        "A": (-case.rate * torch.rand(heads, generator=g)).to(case.A)[:, None, None].expand(heads, dim, dstate),
        "B": rows(groups, dstate),
        "C": rows(groups, dstate),
        "D": randn(heads, dim) if case.D else None,
        "dt_bias": bias[:, None].expand(heads, dim) if case.bias else None,
        "z": rows(heads, dim) if case.z else None,
        "dt_softplus": case.softplus,
        "x_cache": x_cache,
        "dt_cache": dt_cache,
        "B_cache": B_cache,
        "write_pos": torch.tensor(places, dtype=torch.int32),
        "is_flush": flush.to(case.flags),
        "max_cache_len": case.rows,
        "out": torch.full((batch, heads, dim), 42.0).to(dtype),
    }
    if case.indices is not None:
        order[batch // 2] = NULL  # padding, whose position and inputs mean nothing
        call["write_pos"][batch // 2] = -9
        call["state_batch_indices"] = order.to(case.indices)
        if case.columns:
            others = torch.full((batch, case.columns - 1), -5, dtype=case.indices)
            call["state_batch_indices"] = torch.cat([call["state_batch_indices"][:, None], others], 1)
    if case.seed is not None and case.state == "f16":
        call |= {"enable_stochastic_rounding": True, "rand_seed": torch.tensor([case.seed])}
    return call


def sequences(call: dict) -> list[tuple[int, int]]:
    """The place in the batch and the slot of each sequence that is not padding."""
    indices = call.get("state_batch_indices")
    if indices is None:
        return [(b, b) for b in range(len(call["x"]))]
    indices = indices[:, 0] if indices.dim() == 2 else indices
    return [(b, slot) for b, slot in enumerate(indices.tolist()) if slot != NULL]


def outcome(call: dict, b: int, slot: int, magnitudes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The state after all tokens and the last output, in float64; or the sums of the magnitudes of their terms."""

    def given(tensor):
        value = wide(tensor)
        return np.abs(value) if magnitudes else value

    k, A = int(call["write_pos"][b]), wide(call["A"])
    h = given(call["state"][slot])
    for j in range(k):
        step = wide(call["dt_cache"][slot, :, j])[:, None]
        x, B = given(call["x_cache"][slot, :, j]), given(call["B_cache"][slot, :, j])
        h, _ = token(h, x, np.broadcast_to(step, x.shape), A, B, B)
    weights = {"D": None if call["D"] is None else given(call["D"])}
    weights["dt_bias"] = None if call["dt_bias"] is None else wide(call["dt_bias"])
    rows = (given(call["x"][b]), wide(call["dt"][b]), A, given(call["B"][b]), given(call["C"][b]))
    h, y = token(h, *rows, **weights, dt_softplus=call["dt_softplus"])
    if call["z"] is not None:
        z = wide(call["z"][b])
        gate = z / (1 + np.exp(-z))
        y = y * (np.abs(gate) if magnitudes else gate)
    return h, y


def float32(call: dict, b: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What float32 PyTorch computes, rounded to the types of ``out`` and ``state``, at random if the call is."""
    k, dtype = int(call["write_pos"][b]), call["state"].dtype
    x, B = (
        torch.cat([call[cache][slot, :, :k].transpose(0, 1), call[new][b, None]])
        for cache, new in (("x_cache", "x"), ("B_cache", "B"))
    )
    dt = torch.cat([call["dt_cache"][slot, :, :k], processed(call, b, torch.float32)[:, None]], 1)
    weights = reference.Weights(call["A"][:, 0, 0], call["D"])
    z = None if call["z"] is None else call["z"][b]
    out, state = reference.replay_decode(call["state"][slot].float(), x, B, dt, call["C"][b], z, weights)
    bits = None
    if "rand_seed" in call:
        places = torch.meshgrid(*(torch.arange(size) for size in state.shape), indexing="ij")
        bits = rounding.random_bits(call["rand_seed"][0], 10, slot, *places, state.shape[-1], k)
    return out.to(call["out"].dtype), rounding.store(state, dtype, bits=bits)[0]


def processed(call: dict, b: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """dt' of the new token."""
    step = logits(call, b).to(dtype)
    return torch.nn.functional.softplus(step) if call["dt_softplus"] else step


def logits(call: dict, b: int) -> torch.Tensor:
    """dt and its bias, in float64."""
    step = call["dt"][b][:, 0].double()
    return step if call["dt_bias"] is None else step + call["dt_bias"][:, 0].double()


def approximate(call: dict, b: int) -> torch.Tensor:
    """How much of the terms of a head the hardware's functions may change: decays, dt' in a product, dt' in decays."""
    errors = approximations.in_use()
    step = errors.softplus(logits(call, b)) if call["dt_softplus"] else torch.zeros(len(call["A"])).double()
    return errors.ex2 + step / processed(call, b) + call["A"][:, 0, 0].double().abs() * step


def verify(case: Case, seed: int = 0) -> None:
    """Call; outputs and stored states are right, and every other byte is what it was or the token appended."""
    call = arguments(case, seed)
    before = copy(call)
    assert vllm.selective_state_update_replayssm_output_only(**call) is call["out"]
    want = {name: before[name].clone() for name in ("state", "x_cache", "B_cache", "dt_cache", "out")}
    for b, slot in sequences(before):
        h, y = map(torch.from_numpy, outcome(before, b, slot))
        h_sum, y_sum = map(torch.from_numpy, outcome(before, b, slot, magnitudes=True))
        y_rounded, h_rounded = float32(before, b, slot)
        changed = approximate(before, b)[:, None] * y_sum
        if before["z"] is not None:
            changed += y.abs() * approximations.in_use().silu(before["z"][b])
        like_float32([call["out"][b]], [y_rounded], [y], [y_sum + 1e-30], [f"out[{b}]"], [changed])
        want["out"][b] = call["out"][b]
        k = int(before["write_pos"][b])
        if bool(before["is_flush"][b]):
            changed = approximate(before, b)[:, None, None] * h_sum
            like_float32([call["state"][slot]], [h_rounded], [h], [h_sum + 1e-30], [f"state[{slot}]"], [changed])
            want["state"][slot] = call["state"][slot]
        else:
            want["x_cache"][slot, :, k], want["B_cache"][slot, :, k] = before["x"][b], before["B"][b]
            step = processed(before, b)
            bound = approximations.in_use().softplus(logits(before, b)) + 6 * 2.0**-24 * step
            within(call["dt_cache"][slot, :, k], step, bound, f"dt_cache[{slot}]")
            want["dt_cache"][slot, :, k] = call["dt_cache"][slot, :, k]
    for name, tensor in want.items():
        same_bits(call[name], tensor, name)

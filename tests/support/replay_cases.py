"""Calls of `gated_delta_rule_replay`: random arguments with rings of NaN around the pending tokens, and the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import bounds
import gdn_cases
import tensor_sums
import torch
from bits import same_memory
from gdn_cases import DTYPES, NAN, within
from memory import copy

import cute_ssm
from cute_ssm.ops._gated_delta.reference import gates
from cute_ssm.ops.gated_delta_rule_replay.reference import gated_delta_rule_replay as mathematics

RINGS = ("k_cache", "v_cache", "g_cache", "beta_cache")
ULP = 2.0**-23


@dataclass(frozen=True)
class Case(gdn_cases.Case):
    """One call.  `pending` counts tokens of requests, and repeats; `spare` rows of a ring are never used."""

    batch: int = 4
    mode: str = "verify"
    window: int = 16
    pending: tuple[int, ...] = (5, 16, 0, 13)
    spare: int = 3
    start: int | None = None  # of all rings; None: random


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments.  Everything that must not be read is NaN, or a cursor out of range."""
    call = gdn_cases.arguments(case, seed)
    for name in ("disable_state_update",):
        del call[name]
    g = torch.Generator().manual_seed(seed + 1000)
    fields = {name: getattr(case, name) for name in gdn_cases.Case.__dataclass_fields__}
    past = gdn_cases.arguments(gdn_cases.Case(**{**fields, "tokens": case.window}), seed + 1)
    past_g, past_beta = gates(past["a"], past["b"], past["A_log"], past["dt_bias"])
    slots, value_heads = call["initial_state"].shape[:2]
    length = case.window + case.tokens + case.spare

    def ring(heads, size, dtype):
        if not case.strided:
            return torch.full((slots, heads, length, size), NAN, dtype=dtype)
        return torch.full((slots + 1, length, heads, size + 8), NAN, dtype=dtype)[1:, ..., :size].transpose(1, 2)

    io = DTYPES[case.io]
    k_cache, v_cache = ring(case.heads, case.K, io), ring(value_heads, case.V, io)
    g_cache, beta_cache = (ring(value_heads, 1, torch.float32)[..., 0] for _ in range(2))
    ring_start = torch.full((slots,), -7, dtype=torch.int32)
    counts = torch.full((slots,), 10**6, dtype=torch.int32)
    for i, slot in enumerate(call["initial_state_indices"].tolist()):
        if slot < 0:
            continue
        start = int(torch.randint(length, (), generator=g)) if case.start is None else case.start
        count = case.pending[i % len(case.pending)]
        ring_start[slot], counts[slot] = start, count
        rows = (start + torch.arange(count)) % length
        for cache, values in zip((k_cache, v_cache, g_cache, beta_cache), (past["k"], past["v"], past_g, past_beta)):
            cache[slot][:, rows] = values[i, :count].transpose(0, 1)
    call |= {"k_cache": k_cache, "v_cache": v_cache, "g_cache": g_cache, "beta_cache": beta_cache}
    return {**call, "ring_start": ring_start, "prev_num_accepted_tokens": counts, "window": case.window}


def expected(call: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and advanced states of all requests; those of padding are of slot 0, and mean nothing."""
    window, length = call["window"], call["k_cache"].shape[2]
    src = call["initial_state_indices"].long()
    slots = src.clamp(min=0)
    start, counts = (call[n][slots].long() for n in ("ring_start", "prev_num_accepted_tokens"))
    rows = (start[:, None] + torch.arange(window)) % length
    pending = [call[name][slots[:, None], :, rows].transpose(1, 2) for name in RINGS]
    g, beta = gates(call["a"], call["b"], call["A_log"], call["dt_bias"], dtype)
    new = (call["k"], call["v"], g, beta)
    scale = call["scale"] if call["scale"] is not None else call["q"].shape[-1] ** -0.5
    state = call["initial_state"][slots]
    return mathematics(state, pending, counts, call["q"], new, scale, call["use_qk_l2norm"], dtype)


def losses(call: dict) -> tuple[tensor_sums.Loss, tensor_sums.Loss] | None:
    """What tensor cores lose of outputs, and of states after the pending tokens; None: nothing."""
    sums = tensor_sums.in_use()
    if not sums.any():
        return None
    q, k, v = (call[name].double().transpose(1, 2) for name in ("q", "k", "v"))
    ratio = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(ratio, dim=1) for x in (q, k))
    g, beta = (x.transpose(1, 2) for x in gates(*(call[n] for n in ("a", "b", "A_log", "dt_bias")), torch.float64))
    scale = call["scale"] if call["scale"] is not None else q.shape[-1] ** -0.5
    _, folded = expected(call, torch.float64)
    outputs, states = [], []
    for i, slot in enumerate(call["initial_state_indices"].long().clamp(min=0).tolist()):
        start, count = (max(int(call[n][slot]), 0) for n in ("ring_start", "prev_num_accepted_tokens"))
        rows = (start + torch.arange(min(count, call["window"]))) % call["k_cache"].shape[2]
        keys, *rest = (call[name][slot][:, rows].double() for name in RINGS)
        keys, norm = keys.repeat_interleave(ratio, dim=0), call["use_qk_l2norm"]
        states.append(tensor_sums.gated_delta_fold(sums, call["initial_state"][slot].double(), keys, *rest, norm))
        new = (q[i], k[i], v[i], g[i], beta[i])
        outputs.append(tensor_sums.gated_delta_chunk(sums, folded[i], states[-1], *new, scale, norm).outputs)
    return torch.stack(outputs, 1).transpose(2, 3), torch.stack(states, 1)


def check(before: dict, after: dict, out: torch.Tensor) -> None:
    """Outputs and flushed states within 1.5 times the errors of float32, the ring appended, all else bit for bit."""
    tokens, window, length = before["q"].shape[1], before["window"], before["k_cache"].shape[2]
    src = before["initial_state_indices"].long()
    real = src >= 0
    (want, folded), (want32, folded32) = (expected(before, dtype) for dtype in (torch.float64, torch.float32))
    lost_out, lost_states = losses(before) or (None, None)
    if real.any():
        lost = None if lost_out is None else lost_out[:, real]
        within(out[real], want32[real].to(out.dtype), want[real], (-1,), "out", lost)
    g, beta = gates(before["a"], before["b"], before["A_log"], before["dt_bias"], torch.float64)
    # an exponent's relative error is its argument's absolute one, and the sum of a and dt_bias has been rounded
    x = (before["a"].double() + before["dt_bias"].double()).abs().maximum(before["b"].double().abs())
    for i in real.nonzero().flatten().tolist():
        slot = src[i]
        start, count = (int(before[n][slot]) for n in ("ring_start", "prev_num_accepted_tokens"))
        state = after["initial_state"][slot]
        if count + tokens > window and count > 0:
            rounded = folded32[i].to(state.dtype)
            lost = None if lost_states is None else lost_states[:, i]
            within(state, rounded, folded[i], (-2, -1), f"state of request {i}, {count} pending", lost)
            before["initial_state"][slot] = state
        rows = (start + count + torch.arange(tokens)) % length
        for name, values in (("k_cache", before["k"]), ("v_cache", before["v"])):
            before[name][slot][:, rows] = values[i].transpose(0, 1)
        for name, values in (("g_cache", g.clamp(min=-1e4)), ("beta_cache", beta)):
            got = after[name][slot][:, rows].T.double()
            bounds.within(got, values[i], (4 + x[i]) * ULP * (values[i].abs() + 1e-30), f"{name} of request {i}")
            before[name][slot][:, rows] = after[name][slot][:, rows]

    # what must not change: states that are not flushed, other slots and rows, gaps, rows of padding, inputs
    if before.get("output") is not None:
        before["output"][real] = after["output"][real]
    else:
        assert not out[~real].any(), "rows of padding in an allocated output are zero"
        assert out.dtype == before["q"].dtype
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")


def verify(case: Case, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Call the operator on a case, check it against the oracle, and return its arguments and result."""
    call = arguments(case, seed)
    before = copy(call)
    out, pool = cute_ssm.gated_delta_rule_replay(**call)
    assert pool is call["initial_state"]
    check(before, call, out)
    return call, out

"""What a call of each operator does, for references of flashinfer-bench (`tools/make_traces.py`).

A reference is one text that needs PyTorch alone: the functions of the package's own reference that are listed in
`EMBEDDED`, and behind them the function of this module that has the operator's name and arguments.  It calls the former
for the mathematics, gathers and scatters states, and returns what the call writes, by argument, as new tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cute_ssm.ops._gated_delta.reference import EPSILON, Tokens, gates, heads, recurrence
from cute_ssm.ops.checkpointing_ssu.reference import outputs, step_sizes
from cute_ssm.ops.gated_delta_rule_replay.reference import MIN_G
from cute_ssm.ops.gated_delta_rule_replay.reference import gated_delta_rule_replay as fold_and_verify
from cute_ssm.ops.replay_decode.reference import Weights
from cute_ssm.ops.replay_decode.reference import replay_decode as decode
from cute_ssm.ops.selective_scan.reference import selective_scan as scan
from cute_ssm.ops.selective_state_update.reference import selective_state_update as advance
from cute_ssm.reference.history import fold, running_sums

# operator -> functions and classes of the package, by the name that its function here calls them, and constants
EMBEDDED: dict[str, dict[str, Any]] = {
    "selective_state_update": {"advance": advance},
    "selective_scan": {"scan": scan},
    "gated_delta_rule_mtp": {"EPSILON": EPSILON, "gates": gates, "heads": heads, "recurrence": recurrence},
    "gated_delta_rule_replay": {
        "EPSILON": EPSILON,
        "MIN_G": MIN_G,
        "Tokens": Tokens,
        "gates": gates,
        "heads": heads,
        "recurrence": recurrence,
        "fold_and_verify": fold_and_verify,
    },
    "checkpointing_ssu": {
        "running_sums": running_sums,
        "fold": fold,
        "outputs": outputs,
        "step_sizes": step_sizes,
    },
    "replay_decode": {
        "Weights": Weights,
        "running_sums": running_sums,
        "fold": fold,
        "decode": decode,
        "step_sizes": step_sizes,
    },
}


def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state_batch_indices: Tensor,
    state: Tensor,
    dt_softplus: bool,
    disable_state_update: bool,
    z: Tensor | None = None,
) -> dict[str, Tensor]:
    """States stay in float32 between the tokens of a call."""
    slots = state_batch_indices.long()
    current, results = state[slots], []
    for t in range(x.shape[1]) if x.dim() == 4 else (slice(None),):
        at = (slice(None), t)
        gate = None if z is None else z[at]
        y, current = advance(current, x[at], dt[at], A, B[at], C[at], D, gate, dt_bias, dt_softplus)
        results.append(y)
    new_state = state.clone()
    if not disable_state_update:
        new_state[slots] = current.to(state.dtype)
    out = torch.stack(results, 1) if x.dim() == 4 else results[0]
    return {"out": out.to(x.dtype), "state": new_state}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    ssm_states: Tensor,
    delta_softplus: bool,
    z: Tensor | None = None,
    query_start_loc: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sequences are packed, or of equal length."""
    states, out = ssm_states.clone(), torch.empty_like(u)
    starts = None if query_start_loc is None else query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        packed = ... if starts is None else (..., slice(starts[i], starts[i + 1]))
        row = slice(i, i + 1) if starts is None else None  # adds the axis of the batch

        def tokens(tensor: Tensor, packed: Any = packed, row: Any = row) -> Tensor:
            return tensor[packed][row]

        first = ssm_states[slot][None] if has_initial_state[i] else None
        gate = None if z is None else tokens(z)
        _, y, last = scan(tokens(u), tokens(delta), A, tokens(B), tokens(C), D, gate, delta_bias, delta_softplus, first)
        tokens(out).copy_(y)
        states[slot] = last[0].to(states.dtype)
    return {"out": out, "ssm_states": states}


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    disable_state_update: bool,
) -> dict[str, Tensor]:
    """q and k are normalised, and q scaled by 1 / sqrt(K)."""
    slots = initial_state_indices.long()
    g, beta = gates(a, b, A_log, dt_bias)
    out, states = recurrence(initial_state[slots], q, k, v, g, beta, q.shape[-1] ** -0.5, True)
    new_state = initial_state.clone()
    if not disable_state_update:
        new_state[slots] = states[:, -1].to(new_state.dtype)
    return {"output": out.to(q.dtype), "initial_state": new_state}


def gated_delta_rule_replay(
    initial_state: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    g_cache: Tensor,
    beta_cache: Tensor,
    ring_start: Tensor,
    prev_num_accepted_tokens: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    window: int,
) -> dict[str, Tensor]:
    """A state is written if the new tokens do not fit into the window behind the pending ones, which it then holds."""
    slots, tokens, length = initial_state_indices.long(), q.shape[1], k_cache.shape[2]
    start, pending = ring_start[slots].long(), prev_num_accepted_tokens[slots].long()
    rings = {"k_cache": k_cache, "v_cache": v_cache, "g_cache": g_cache, "beta_cache": beta_cache}
    rings = {name: ring.clone() for name, ring in rings.items()}
    g, beta = gates(a, b, A_log, dt_bias)
    new = (k, v, g.clamp(min=MIN_G), beta)
    rows = (start[:, None] + torch.arange(window, device=q.device)) % length
    old = [ring[slots[:, None], :, rows].transpose(1, 2) for ring in rings.values()]
    scale = q.shape[-1] ** -0.5
    out, folded = fold_and_verify(initial_state[slots], old, pending, q, new, scale, True)
    new_state = initial_state.clone()
    writes = (pending + tokens > window) & (pending > 0)
    new_state[slots[writes]] = folded[writes].to(new_state.dtype)
    rows = (start[:, None] + pending[:, None] + torch.arange(tokens, device=q.device)) % length
    for ring, values in zip(rings.values(), new):
        ring[slots[:, None], :, rows] = values
    return {"output": out.to(q.dtype), "initial_state": new_state, **rings}


def checkpointing_ssu(
    state: Tensor,
    old_x: Tensor,
    old_B: Tensor,
    old_dt: Tensor,
    old_cumAdt: Tensor,
    cache_buf_idx: Tensor,
    prev_num_accepted_tokens: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state_batch_indices: Tensor,
    dt_softplus: bool,
) -> dict[str, Tensor]:
    """A sequence whose new tokens do not fit behind the pending ones writes its state, and starts the other buffer."""
    written = {"state": state, "old_x": old_x, "old_B": old_B, "old_dt": old_dt, "old_cumAdt": old_cumAdt}
    written = {name: tensor.clone() for name, tensor in written.items()}
    out, window, rates = torch.empty_like(x), old_x.shape[1], A[:, 0, 0].float()
    for i, slot in enumerate(state_batch_indices.tolist()):
        count, buffer = int(prev_num_accepted_tokens[slot]), int(cache_buf_idx[slot])
        past = (old_x[slot, :count], old_B[slot, buffer, :count], old_dt[slot, buffer, :, :count])
        new_dt = step_sizes(dt[i, ..., 0], dt_bias[:, 0].float(), dt_softplus)
        all_dt = torch.cat([past[2], new_dt], 1)
        y = outputs(state[slot].float(), torch.cat([past[0], x[i]]), torch.cat([past[1], B[i]]), all_dt, rates, C[i])
        out[i] = (y + D * x[i].float()).to(out.dtype)
        writes = count + x.shape[1] > window
        if writes and count:
            written["state"][slot] = fold(state[slot].float(), *past, rates).to(state.dtype)
        target, first = (1 - buffer, 0) if writes else (buffer, count)
        stored = min(x.shape[1], window)
        rows, sums = slice(first, first + stored), running_sums(rates, new_dt if writes else all_dt)[:, -x.shape[1] :]
        written["old_x"][slot, rows] = x[i, :stored]
        written["old_B"][slot, target, rows] = B[i, :stored]
        written["old_dt"][slot, target, :, rows] = new_dt[:, :stored]
        written["old_cumAdt"][slot, target, :, rows] = sums[:, :stored]
    return {"out": out, **written}


def replay_decode(
    state: Tensor,
    x_cache: Tensor,
    dt_cache: Tensor,
    B_cache: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    write_pos: Tensor,
    is_flush: Tensor,
    state_batch_indices: Tensor,
    dt_softplus: bool,
    max_cache_len: int,
    null_block_id: int,
    enable_stochastic_rounding: bool,
    z: Tensor | None = None,
) -> dict[str, Tensor]:
    """A sequence stores its state, or appends its token to the caches."""
    written = {"state": state, "x_cache": x_cache, "dt_cache": dt_cache, "B_cache": B_cache}
    written = {name: tensor.clone() for name, tensor in written.items()}
    out, weights = torch.empty_like(x), Weights(A[:, 0, 0], D)
    new_dt = step_sizes(dt[..., 0], dt_bias[:, 0], dt_softplus)
    for b, slot in enumerate(state_batch_indices.tolist()):
        if slot == null_block_id:
            continue
        k = int(write_pos[b])
        xs = torch.cat([x_cache[slot, :, :k].transpose(0, 1), x[b, None]])
        Bs = torch.cat([B_cache[slot, :, :k].transpose(0, 1), B[b, None]])
        dts = torch.cat([dt_cache[slot, :, :k], new_dt[:, b, None]], 1)
        y, new = decode(state[slot].float(), xs, Bs, dts, C[b], None if z is None else z[b], weights)
        out[b] = y.to(out.dtype)
        if is_flush[b]:
            written["state"][slot] = new.to(state.dtype)
        else:
            written["x_cache"][slot, :, k], written["B_cache"][slot, :, k] = x[b], B[b]
            written["dt_cache"][slot, :, k] = new_dt[:, b]
    return {"out": out, **written}

"""Calls of `gated_delta_rule_mtp`: random arguments in awkward memory, the oracle, and the bounds of errors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import tensor_sums
import torch
from bits import same_bits, same_memory
from bounds import like_float32
from cases import Named
from memory import copy

import cute_ssm
from cute_ssm.ops._gated_delta.reference import gates
from cute_ssm.ops.gated_delta_rule_mtp.reference import gated_delta_rule as mathematics

NAN = float("nan")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
REGIMES = ("typical", "slow", "fast", "cut", "extreme", "collinear", "zero")
MODES = ("verify", "update", "split", "buffer", "buffer_update", "scatter", "accepted", "accepted_split")


@dataclass(frozen=True)
class Case(Named):
    """One call; the defaults are the base that tests vary one factor of at a time."""

    batch: int = 3
    tokens: int = 4
    heads: int = 1
    ratio: int = 2
    K: int = 128
    V: int = 64
    state: str = "f32"
    io: str = "bf16"
    out: str | None = "f32"  # None: allocated by the operator, in the type of q
    gate: str = "bf16"
    bias: str = "f32"
    mode: str = "update"
    indices: torch.dtype = torch.int32
    pads: tuple[int, ...] = (1,)
    l2norm: bool = True
    scale: float | None = None
    lengths: tuple[int, ...] | None = None  # of packed requests, as many as batch; tokens is max_seqlen
    strided: bool = False  # slots, heads and rows of the pool lie apart; inputs and output are slices of wider rows
    regime: str = "typical"


def arguments(case: Case, seed: int = 0) -> dict:
    """Random arguments.  Gaps, slots that no request reads, what is written, and a buffer's spare rows are NaN.

    So are packed tokens of padding, before the first request, and after the last.
    """
    g = torch.Generator().manual_seed(seed)
    batch, tokens, K, V = case.batch, case.tokens, case.K, case.V
    value_heads = case.heads * case.ratio
    io = DTYPES[case.io]

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    def rows(values, dtype):
        """(batch, tokens, heads, size), as a slice of wider rows if asked for."""
        values = values.to(dtype)
        if not case.strided:
            return values
        wide = torch.full((batch, tokens, 8 + values[0, 0].numel() + 8), NAN, dtype=dtype)
        return wide[..., 8:-8].unflatten(2, values.shape[2:]).copy_(values)

    def images(*outer):
        """States of NaN, (*outer, value_heads, V, K)."""
        dtype = DTYPES[case.state]
        if not case.strided:
            return torch.full((*outer, value_heads, V, K), NAN, dtype=dtype)
        flat = torch.full((*outer, 2 * value_heads, V * (K + 8) + 16), NAN, dtype=dtype)
        return flat[..., ::2, : V * (K + 8)].unflatten(-1, (V, K + 8))[..., :K]

    slots = batch * (tokens + 2) + 2
    order = torch.randperm(slots, generator=g)
    src, dst = order[:batch].clone(), order[batch : 2 * batch].clone()
    state = images(slots)
    state[src] = randn(batch, value_heads, V, K).to(state.dtype)
    scatter = order[2 * batch : 2 * batch + batch * tokens].reshape(batch, tokens).clone()
    if case.mode == "scatter":  # the slot that was read may be written, and entries may be absent
        scatter[0, 0], scatter[0, -1] = src[0], -1
    for row in case.pads:
        src[row % batch] = -1 - row
    if batch > 2:
        dst[2] = -3  # computed, written nowhere

    q, k, v = (
        randn(batch, tokens, case.heads, K),
        randn(batch, tokens, case.heads, K),
        randn(batch, tokens, value_heads, V),
    )
    a, b = randn(batch, tokens, value_heads), randn(batch, tokens, value_heads)
    A_log, dt_bias = randn(value_heads) * 0.5, randn(value_heads)
    if case.regime == "slow":
        A_log -= 10
    elif case.regime == "fast":
        A_log, a = A_log + 5, a + 5
    elif case.regime == "cut":  # one token forgets everything, the others nothing
        A_log, a = A_log * 0 + 5, a * 0 - 30
        a[:, tokens // 2] = 30
    elif case.regime == "extreme":
        choices = torch.tensor([-100.0, 19.9, 20.1, 100.0])
        a = choices[torch.randint(4, a.shape, generator=g)]
        b = 40 * torch.sign(b)
        A_log -= 4
    elif case.regime == "collinear":  # all entries of the triangular system are as large as they can be
        k, b, A_log = k[:, :1].expand_as(k), b * 0 + 40, A_log - 10
    elif case.regime == "zero":
        k[:, 0], q[:, -1] = 0, 0
    call = {
        "q": rows(q, io),
        "k": rows(k, io),
        "v": rows(v, io),
        "initial_state": state,
        "initial_state_indices": src.to(case.indices),
        "A_log": A_log,
        "a": a.to(DTYPES[case.gate]),
        "dt_bias": dt_bias.to(DTYPES[case.bias]),
        "b": b.to(DTYPES[case.gate]),
        "scale": case.scale,
        "use_qk_l2norm": case.l2norm,
        "disable_state_update": case.mode in ("verify", "buffer"),
    }
    if case.out is not None:
        call["output"] = rows(torch.full((batch, tokens, value_heads, V), NAN), DTYPES[case.out])
    if case.mode in ("split", "accepted_split"):
        call["output_state_indices"] = dst.to(case.indices)
    if case.mode.startswith("accepted"):
        call["accepted_steps"] = torch.tensor([i * 2 % (tokens + 1) for i in range(batch)], dtype=case.indices)
    if case.mode.startswith("buffer"):
        call["intermediate_states_buffer"] = images(batch + 1, tokens + 1)
    if case.mode == "scatter":
        call["ssm_state_indices"] = scatter.to(case.indices)
    return call if case.lengths is None else packed(call, case)


TOKENS = ("q", "k", "v", "a", "b", "output")  # tensors with a row for each token


def packed(call: dict, case: Case) -> dict:
    """The call with the first tokens of every request, as many as `lengths` says, packed."""
    offsets = torch.tensor([2, *case.lengths]).cumsum(0)
    active = call["initial_state_indices"] >= 0
    found = dict(call, cu_seqlens=offsets.to(case.indices), max_seqlen=case.tokens)
    for name in set(TOKENS) & set(call):
        old = call[name]
        new = torch.full((1, int(offsets[-1]) + 3, 8 + old[0, 0].numel() + 8), NAN, dtype=old.dtype)
        new = new[..., 8:-8] if case.strided else new[..., 16:].contiguous()
        found[name] = new.unflatten(2, old.shape[2:])
        for i in active.nonzero().flatten().tolist():
            found[name][0, offsets[i] : offsets[i + 1]] = old[i, : case.lengths[i]]
    if "accepted_steps" in call:
        found["accepted_steps"] = call["accepted_steps"].clamp(max=torch.tensor(case.lengths))
    return found


def dense(call: dict) -> dict:
    """A packed call with the tokens of every request in rows of their own, zeros after them; others as they are."""
    if call.get("cu_seqlens") is None:
        return call
    offsets, found = call["cu_seqlens"].tolist(), dict(call)
    for name in set(TOKENS) & set(call):
        rows = torch.zeros(len(offsets) - 1, call["max_seqlen"], *call[name].shape[2:], dtype=call[name].dtype)
        for i, (first, last) in enumerate(itertools.pairwise(offsets)):
            rows[i, : last - first] = call[name][0, first:last]
        found[name] = rows
    return found


def lengths(call: dict) -> torch.Tensor:
    """Numbers of tokens of the requests."""
    if call.get("cu_seqlens") is None:
        return torch.full((len(call["initial_state_indices"]),), call["q"].shape[1])
    return call["cu_seqlens"].long().diff()


def expected(call: dict, compute_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of all requests, and their states after 0, 1, .. tokens; padding counts as slot 0."""
    call = dense(call)
    first = call["initial_state"][call["initial_state_indices"].long().clamp(min=0)]
    scale = call["scale"] if call["scale"] is not None else call["q"].shape[-1] ** -0.5
    names = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
    out, states = mathematics(first, *(call[n] for n in names), scale, call["use_qk_l2norm"], compute_dtype)
    return out, torch.cat([first.to(compute_dtype)[:, None], states], 1)


def losses(call: dict) -> tuple[tensor_sums.Loss, tensor_sums.Loss] | None:
    """What tensor cores lose of outputs, and of states after 0, 1, .. tokens; None: nothing."""
    sums = tensor_sums.in_use()
    if not sums.any():
        return None
    call = dense(call)
    first = call["initial_state"][call["initial_state_indices"].long().clamp(min=0)].double()
    q, k, v = (call[name].double().transpose(1, 2) for name in ("q", "k", "v"))
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    g, beta = (x.transpose(1, 2) for x in gates(*(call[n] for n in ("a", "b", "A_log", "dt_bias")), torch.float64))
    scale = call["scale"] if call["scale"] is not None else q.shape[-1] ** -0.5
    none = torch.zeros(2, *first.shape, dtype=first.dtype)
    found = tensor_sums.gated_delta_chunk(sums, first, none, q, k, v, g, beta, scale, call["use_qk_l2norm"])
    outputs, states = found.outputs.transpose(2, 3), found.states.transpose(2, 3)
    return outputs, torch.cat([none[:, :, None], states], 2)


def within(got, rounded, want, dims: tuple[int, ...], what: str, lost: tensor_sums.Loss | None = None) -> None:
    """Assert that errors, in units of the largest value along `dims`, are at most 1.5 times those of `rounded`.

    Values that cancel to less than a 32nd of the largest of all are measured by that: it is chance how well a sum
    cancels.  What tensor cores lose is allowed besides.
    """
    unit = want.abs().amax(dims, keepdim=True).clamp(min=want.abs().max().item() / 32 + 1e-30)
    like_float32([got], [rounded], [want], [unit], [what], lost=None if lost is None else [lost])


def check(before: dict, after: dict, out: torch.Tensor) -> None:
    """Outputs and states within 1.5 times the errors of sequential float32, all else bit for bit as it was."""
    counts = lengths(before)
    src = before["initial_state_indices"].long()
    real = (src >= 0) & (counts > 0)
    want, states = expected(before, torch.float64)
    want32, states32 = expected(before, torch.float32)
    lost_out, lost_states = losses(before) or (None, None)
    used = real[:, None] & (torch.arange(want.shape[1]) < counts[:, None])
    if real.any():
        lost = None if lost_out is None else lost_out[:, used]
        got = dense({**before, "output": out})["output"]
        within(got[used], want32[used].to(out.dtype), want[used], (-1,), "out", lost)

    def check_state(got, request, count, what):
        if count == 0:
            same_bits(got, before["initial_state"][src[request]], "no token: the state moves as it is")
        else:
            rounded = states32[request, count].to(got.dtype)
            lost = None if lost_states is None else lost_states[:, request, count]
            within(got, rounded, states[request, count], (-2, -1), what, lost)

    written = []  # (request, tokens, slot)
    for i in real.nonzero().flatten().tolist():
        if before.get("intermediate_states_buffer") is not None:
            for t in range(int(counts[i])):
                check_state(after["intermediate_states_buffer"][i, t], i, t + 1, "buffer")
                before["intermediate_states_buffer"][i, t] = after["intermediate_states_buffer"][i, t]
        if before.get("ssm_state_indices") is not None:
            slots = before["ssm_state_indices"][i, : int(counts[i])]
            written += [(i, t + 1, int(slot)) for t, slot in enumerate(slots)]
        elif not before["disable_state_update"]:
            slots, accepted = before.get("output_state_indices", src), before.get("accepted_steps")
            written.append((i, int((counts if accepted is None else accepted)[i]), int(slots[i])))
    written = [item for item in written if item[2] >= 0]
    for i, count, slot in written:
        check_state(after["initial_state"][slot], i, count, "state")
    for _, _, slot in written:
        before["initial_state"][slot] = after["initial_state"][slot]

    # what must not change: other slots, gaps, rows of padding, inputs
    if before.get("cu_seqlens") is None:
        rows = (real,)
    else:
        starts = before["cu_seqlens"].tolist()
        places = [t for i in real.nonzero().flatten().tolist() for t in range(starts[i], starts[i + 1])]
        rows = (0, torch.tensor(places, dtype=torch.long))
    if before.get("output") is not None:
        before["output"][rows] = after["output"][rows]
    else:
        spare = out.clone()
        spare[rows] = 0
        assert not spare.any(), "rows of padding in an allocated output are zero"
        assert out.dtype == before["q"].dtype
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            same_memory(after[name], value, f"{name} changed where it must not")


def verify(case: Case, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Call the operator on a case, check it against the oracle, and return its arguments and result."""
    call = arguments(case, seed)
    before = copy(call)
    out, pool = cute_ssm.gated_delta_rule_mtp(**call)
    assert pool is call["initial_state"]
    check(before, call, out)
    return call, out


def odd_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 2, dtype=tensor.dtype)[..., : tensor.shape[-1]]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT

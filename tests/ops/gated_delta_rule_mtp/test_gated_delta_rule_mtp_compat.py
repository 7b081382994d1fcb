"""`compat.flashinfer.gdn_decode` and `compat.fla` against the operator and against the recurrence."""

from __future__ import annotations

import itertools

import pytest
import torch
from bits import equal, same_memory
from gdn_cases import Case, arguments, check
from kernel_backends import both
from memory import copy

import cute_ssm
from cute_ssm.compat import fla
from cute_ssm.compat.fla import fused_recurrent_gated_delta_rule
from cute_ssm.compat.flashinfer.gdn_decode import gated_delta_rule_mtp
from cute_ssm.errors import UnsupportedSpecError

POSITIONAL = (
    "q", "k", "v", "initial_state", "initial_state_indices", "A_log", "a", "dt_bias", "b", "scale", "output",
    "intermediate_states_buffer", "ssm_state_indices", "disable_state_update", "use_qk_l2norm", "output_state_indices",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["verify", "split", "buffer", "scatter"])
def test_flashinfer_by_position(mode):
    call = arguments(Case(mode=mode, K=64))
    before = copy(call)
    out, pool = gated_delta_rule_mtp(*(call.get(name) for name in POSITIONAL))
    assert out is call["output"]
    assert pool is call["initial_state"]
    check(before, call, out)


def test_flashinfer_converts_write_slots():
    call = arguments(Case(mode="split", K=64))
    twin = copy(call)
    twin["output_state_indices"] = twin["output_state_indices"].long()
    cute_ssm.gated_delta_rule_mtp(**call)
    gated_delta_rule_mtp(**twin)
    same_memory(call["initial_state"], twin["initial_state"])


def recurrence(q, k, v, g, beta, scale, state, l2norm):
    """fla's conventions, in float64: states are [K, V], g and beta are given."""
    q, k, v, g, beta, state = (x.double() for x in (q, k, v, g, beta, state))
    if l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    ratio = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(ratio, 2) for x in (q, k))
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * scale))
    return torch.stack(outs, 1), state


@both
@pytest.mark.parametrize(("tokens", "l2norm"), [(1, True), (3, False)])
def test_fla(tokens, l2norm, backend):
    torch.manual_seed(0)
    batch, heads, value_heads, K, V = 2, 1, 2, 64, 64
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, heads, K), dim=-1).bfloat16() for _ in "qk")
    v = torch.randn(batch, tokens, value_heads, V).bfloat16()
    g = -torch.rand(batch, tokens, value_heads) * torch.tensor([1e-3, 5.0])
    g[0, 0] = torch.tensor([0.0, -200.0])
    beta = torch.rand(batch, tokens, value_heads)
    beta[1, 0] = torch.tensor([0.0, 1.0])
    state = torch.randn(batch, value_heads, K, V)
    want, final = recurrence(q, k, v, g, beta, 0.25, state, l2norm)
    options = {"scale": 0.25, "initial_state": state, "use_qk_l2norm_in_kernel": l2norm}
    with backend(checks=False):
        out, got = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, output_final_state=True, **options)
        again, none = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, **options)
        bare, _ = fused_recurrent_gated_delta_rule(q, k, v, use_qk_l2norm_in_kernel=l2norm)
    assert (out - want).abs().max() < 2**-8 * want.abs().max()
    assert (got - final).abs().max() < 2e-6 * final.abs().max()
    assert none is None
    equal(again, out)
    zero, one = torch.zeros(batch, tokens, value_heads), torch.ones(batch, tokens, value_heads)
    want, _ = recurrence(q, k, v, zero, one, K**-0.5, state * 0, l2norm)
    assert (bare - want).abs().max() < 2**-8 * want.abs().max()


@both
@pytest.mark.parametrize("tokens", [1, 3])
def test_fla_gates_that_no_logits_have(tokens, backend):
    """Decays above 1, steps above 1 (negative eigenvalues) and below 0; NaN stays NaN, from its token on."""
    torch.manual_seed(tokens)
    q, k = (torch.nn.functional.normalize(torch.randn(1, tokens, 1, 64), dim=-1).bfloat16() for _ in "qk")
    v, state = torch.randn(1, tokens, 2, 64).bfloat16(), torch.randn(1, 2, 64, 64)
    g, beta = torch.rand(1, tokens, 2) - 0.5, torch.rand(1, tokens, 2) * 3 - 1
    beta[0, 0], g[0, 0] = torch.tensor([2.0, 1.5]), torch.tensor([0.75, -0.25])
    want, final = recurrence(q, k, v, g, beta, 0.25, state, False)
    options = {"scale": 0.25, "initial_state": state, "output_final_state": True}
    with backend(checks=False):
        out, got = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, **options)
        poisoned = g.clone()
        poisoned[0, -1] = float("nan")
        later, lost = fused_recurrent_gated_delta_rule(q, k, v, poisoned, beta=beta, **options)
    assert (out - want).abs().max() < 2**-8 * want.abs().max()
    assert (got - final).abs().max() < 2e-6 * final.abs().max()
    equal(later[:, :-1], out[:, :-1])
    assert later[:, -1].isnan().all()
    assert lost.isnan().all()


def test_fla_refusals():
    q, v = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
    for name in ("gk", "gv"):
        with pytest.raises(UnsupportedSpecError, match=f"{name}: expected None, got a tensor"):
            fused_recurrent_gated_delta_rule(q, q, v, **{name: q})
    for name, value in (("g", q), ("beta", q), ("initial_state", q)):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            fused_recurrent_gated_delta_rule(q, q, v, **{name: value})
    with pytest.raises(ValueError, match="v: expected a tensor of 4 dimensions"):
        fused_recurrent_gated_delta_rule(q, q, v[0])
    with pytest.raises(TypeError, match="speed: expected an argument of fla"):
        fused_recurrent_gated_delta_rule(q, q, v, speed=1)
    with pytest.raises(ValueError, match="A_log: expected a tensor with use_gate_in_kernel, got None"):
        fused_recurrent_gated_delta_rule(q, q, v, v[..., 0], use_gate_in_kernel=True)
    for offsets in ([0, 2], [1, 1], [0, 2, 1], []):
        with pytest.raises(ValueError, match="cu_seqlens: expected offsets that rise from 0 to 1 tokens"):
            fused_recurrent_gated_delta_rule(q, q, v, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match="q: expected a batch of 1 with cu_seqlens, got 2"):
        two = [torch.cat([x, x]) for x in (q, q, v)]
        fused_recurrent_gated_delta_rule(*two, cu_seqlens=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_fla_gates_in_the_call_and_states_with_values_first(kind):
    torch.manual_seed(2)
    batch, tokens, value_heads, K, V = 2, 5, 2, 32, 48
    q, k = (torch.nn.functional.normalize(torch.randn(batch, tokens, 1, K), dim=-1) for _ in "qk")
    v = torch.randn(batch, tokens, value_heads, V).to(kind)
    raw, logits = torch.randn(batch, tokens, value_heads), torch.randn(batch, tokens, value_heads)
    A_log, dt_bias = torch.rand(value_heads), torch.randn(value_heads)
    state = torch.randn(batch, value_heads, V, K)
    rounded = [x.half() for x in (q, k, v)]
    g = -A_log.exp() * torch.nn.functional.softplus(raw + dt_bias)
    want, final = recurrence(*rounded, g, 2 * logits.sigmoid(), K**-0.5, state.mT, False)
    out, got = fused_recurrent_gated_delta_rule(
        q, k, v, raw, beta=logits, initial_state=state, output_final_state=True, use_gate_in_kernel=True, A_log=A_log,
        dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True, state_v_first=True,
    )  # fmt: skip
    assert out.dtype is kind and got.shape == state.shape
    assert (out - want).abs().max() < 2**-10 * want.abs().max()
    assert (got.mT - final).abs().max() < 1e-5 * final.abs().max()
    with pytest.raises(ValueError, match="allow_neg_eigval: expected False without use_beta_sigmoid_in_kernel"):
        fused_recurrent_gated_delta_rule(q, k, v, raw, beta=logits, allow_neg_eigval=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is called state_v_first"):
        old, _ = fused_recurrent_gated_delta_rule(q, k, v, initial_state=state, transpose_state_layout=True)
    new, _ = fused_recurrent_gated_delta_rule(q, k, v, initial_state=state, state_v_first=True)
    equal(old, new)
    with pytest.raises(ValueError, match="transpose_state_layout: expected not both names"):
        fused_recurrent_gated_delta_rule(q, k, v, state_v_first=True, transpose_state_layout=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("A_log", torch.zeros(1)), ("dt_bias", torch.zeros(3, 2)), ("dt_bias", torch.zeros(1)), ("g", torch.zeros(1, 3))],
)
def test_fla_gates_have_one_weight_per_head(name, value):
    """Others would spread over heads or tokens."""
    q, v = torch.randn(1, 3, 1, 32), torch.randn(1, 3, 2, 32)
    weights = {"g": torch.zeros(1, 3, 2), "A_log": torch.zeros(2), "dt_bias": torch.zeros(2), name: value}
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        fused_recurrent_gated_delta_rule(q, q, v, use_gate_in_kernel=True, **weights)
    with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got list"):
        fused_recurrent_gated_delta_rule(q, q, v, use_gate_in_kernel=True, **{**weights, name: value.tolist()})


@both
def test_fla_sizes_that_are_no_multiples_of_sixteen(backend):
    torch.manual_seed(4)
    batch, tokens, K, V = 2, 3, 20, 36
    q, k, v = (torch.randn(batch, tokens, 1, size) for size in (K, K, V))
    g, beta = -torch.rand(batch, tokens, 1), torch.rand(batch, tokens, 1)
    state = torch.randn(batch, 1, K, V)
    want, last = recurrence(q.half(), k.half(), v.half(), g, beta, K**-0.5, state, True)
    with backend(checks=False):
        out, final = fused_recurrent_gated_delta_rule(
            q, k, v, g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    assert out.shape == v.shape and final.shape == state.shape and out.dtype is torch.float32
    assert (out - want).abs().max() < 2**-10 * want.abs().max()
    assert (final - last).abs().max() < 1e-5 * last.abs().max()


def test_fla_values_beyond_float16_are_refused():
    q = torch.zeros(1, 1, 1, 16)
    for name in ("q", "k", "v"):
        with pytest.raises(ValueError, match=f"{name}: expected values up to 65504, got 70000"):
            fused_recurrent_gated_delta_rule(**{n: q + 7e4 if n == name else q for n in ("q", "k", "v")})


@both
@pytest.mark.parametrize("lengths", [(35, 0, 1, 16), (67, 0, 3, 130)], ids=["one launch", "a launch for every 64"])
def test_fla_long_and_packed_sequences(lengths, backend, monkeypatch):
    """More tokens than a call of the operator takes; a sequence without tokens keeps its state."""
    torch.manual_seed(3)
    value_heads, K, V = 2, 16, 16
    calls = []
    monkeypatch.setattr(
        fla, "gated_delta_rule_mtp", lambda *a, **k: calls.append(a) or cute_ssm.gated_delta_rule_mtp(*a, **k)
    )
    total = sum(lengths)
    q, k = (torch.nn.functional.normalize(torch.randn(1, total, 1, K), dim=-1).bfloat16() for _ in "qk")
    v = torch.randn(1, total, value_heads, V).bfloat16()
    g, beta = -torch.rand(1, total, value_heads), torch.rand(1, total, value_heads)
    state = torch.randn(len(lengths), value_heads, K, V)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with backend(checks=False):
        out, final = fused_recurrent_gated_delta_rule(
            q, k, v, g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
            cu_seqlens=offsets,
        )  # fmt: skip
    assert len(calls) == -(-max(lengths) // 64)
    equal(final[1], state[1], "no tokens")
    for i, (first, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end > first:
            own = [x[:, first:end] for x in (q, k, v, g, beta)]
            want, last = recurrence(*own, K**-0.5, state[i : i + 1], True)
            assert (out[:, first:end] - want).abs().max() < 2**-8 * want.abs().max(), i
            assert (final[i] - last).abs().max() < 1e-5 * last.abs().max(), i

"""The integration of vLLM, on stand-ins with vLLM's signatures: what calls reach, ways back, and what is left alone."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import types
from pathlib import Path

import engine_doubles
import kernel_backends
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm import env
from cute_ssm.errors import CompileError, UnsupportedSpecError
from cute_ssm.integrations import vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(monkeypatch):
    yield engine_doubles.vllm(monkeypatch)
    vllm.unregister()


def config(dispatch, backend="TRITON", rounding=False):
    return types.SimpleNamespace(
        backend=dispatch.MambaBackendEnum[backend],
        enable_stochastic_rounding=rounding,
        stochastic_rounding_philox_rounds=0,
    )


def start(engine, backend="TRITON", **options):
    engine.layer.initialize_mamba_ssu_backend(config(engine.dispatch, backend), None, **options)
    return engine.dispatch._mamba_ssu_backend


def decode(engine, call, state, slots, out):
    engine.dispatch.selective_state_update(
        state, **call, state_batch_indices=slots, dst_state_batch_indices=slots, out=out
    )


@pytest.mark.parametrize("name", ["TRITON", "FLASHINFER"])
def test_a_decode_step_of_the_dispatch_runs_by_the_kernel(engine, name):
    assert vllm.register("ssu") == ("ssu",)
    backend = start(engine, name)
    call, state, slots = tokens(rows=3), states(5), torch.tensor([4, 0, 2], dtype=torch.int32)
    before, out = state.clone(), torch.full_like(call["x"], float("nan"))
    with kernel_backends.kernel() if name == "TRITON" else kernel_backends.reference() as session:
        decode(engine, call, state, slots, out)
    assert engine.own == [] and backend.cute_ssm.calls == 1 and backend.name == f"cute_ssm, else {name.lower()}"
    if name == "TRITON" and not kernel_backends.gpu:
        assert len(session.launches) == 1, "one launch for a step, padding included"
    for row, slot in ((0, 4), (2, 2)):
        new, want = token(wide(before[slot]), **at_row(call, row))
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "rows of padding are finite"
    for slot in (0, 1, 3):
        same_bits(state[slot], before[slot], "a slot of no request")


def test_a_call_without_a_kernel_runs_by_the_backend_of_vllm_with_one_reason_in_the_log(engine, caplog):
    vllm.register("ssu")
    backend = start(engine)
    call, state = tokens(rows=2, dim=12), states(3, dim=12)
    for _ in range(2):
        decode(engine, call, state, torch.tensor([1, 2]), torch.empty_like(call["x"]))
    assert engine.own.names() == ["triton", "triton"] and backend.cute_ssm.calls == 0
    assert engine.own[0][1]["state"] is state and engine.own[0][1]["dt_softplus"] is True
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "vLLM's selective_state_update (triton) runs by the engine" in record.getMessage()
    assert "multiple of 8" in record.getMessage()


def test_strict_raises_the_error_of_the_operator(engine):
    vllm.register("ssu", strict=True)
    start(engine)
    call = tokens(rows=2, dim=12)
    with pytest.raises(ValueError, match="multiple of 8"):
        decode(engine, call, states(3, dim=12), torch.tensor([1, 2]), torch.empty_like(call["x"]))
    assert engine.own == []


def test_after_an_error_of_the_compiler_no_call_tries_again(engine, monkeypatch, caplog):
    tried = []

    def fails(*args, **kwargs):
        tried.append(args)
        raise CompileError("ptxas is missing")

    monkeypatch.setattr(vllm.compat, "selective_state_update", fails)
    vllm.register("ssu")
    start(engine)
    call = tokens(rows=1)
    for _ in range(3):
        decode(engine, call, states(2), torch.tensor([1]), torch.empty_like(call["x"]))
    assert len(tried) == 1 and engine.own.names() == ["triton"] * 3
    assert "ptxas is missing" in caplog.text and "from now on" in caplog.text


def test_other_parameters_leave_the_engine_as_it_was(engine, monkeypatch, caplog):
    before = dict(engine.dispatch._BACKEND_REGISTRY)
    packed_before = engine.layer.fused_recurrent_gated_delta_rule_packed_decode
    monkeypatch.setattr(engine.dispatch, "selective_state_update", lambda state, x, dt, fused_gate=None: None)
    monkeypatch.delattr(f"{engine_doubles.VLLM_FLA}.fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update")
    assert vllm.register() == ("replay", "gdn")
    assert engine.dispatch._BACKEND_REGISTRY == before
    start(engine)
    assert engine.layer.fused_recurrent_gated_delta_rule_packed_decode is packed_before
    first, second = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "cute_ssm is not used by vllm for ssu" in first and "fused_gate" in first
    assert "for gdn" in second and "fused_sigmoid_gating_delta_rule_update" in second


def replay_call(dtype=torch.float32):
    """One token per request with histories of a window of 4: L = 5 rows."""
    heads, dim, dstate, slots, length = 2, 64, 64, 4, 5
    call = tokens(rows=2, heads=heads, dim=dim, dstate=dstate, groups=1, dtype=torch.bfloat16)
    state = states(slots, heads=heads, dim=dim, dstate=dstate)
    history = {
        "x_cache": torch.zeros(slots, heads, length, dim, dtype=torch.bfloat16),
        "B_cache": torch.zeros(slots, 1, length, dstate, dtype=torch.bfloat16),
        "dt_cache": torch.zeros(slots, heads, length),
        "ring_start": torch.zeros(slots, dtype=torch.int32),
        "prev_num_accepted_tokens": torch.zeros(slots, dtype=torch.int32),
    }
    return call, state, history


def run_replay(kernel, call, state, history, slots, out):
    return kernel(
        state, *history.values(), *(call[n][:, None] for n in ("x", "dt")), call["A"],
        *(call[n][:, None] for n in ("B", "C")), out, D=call["D"], dt_bias=call["dt_bias"], dt_softplus=True,
        state_batch_indices=slots, pad_slot_id=0,
    )  # fmt: skip


def test_replay_of_flashinfer_runs_by_our_ring_and_what_it_refuses_by_flashinfer(engine, caplog):
    assert vllm.register("replay") == ("replay",)
    start(engine, "FLASHINFER", use_replayssm=True)
    kernel = engine.dispatch._flashinfer_replayssm_kernel
    engine.dispatch.theirs = kernel  # as it stays when a draft model has no Mamba layers
    start(engine, "FLASHINFER", use_replayssm=True)
    assert engine.dispatch._flashinfer_replayssm_kernel is kernel, "it is replaced once"
    call, state, history = replay_call()
    slots = torch.tensor([2, 3], dtype=torch.int32)
    before, out = state.clone(), torch.empty_like(call["x"][:, None])
    run_replay(kernel, call, state, history, slots, out)
    assert engine.own == []
    same_bits(state, before, "no window is full")
    for row, slot in enumerate(slots.tolist()):
        _, want = token(wide(before[slot]), **{**at_row(call, row), "z": None})
        assert close(out[row, 0], want)
        same_bits(history["x_cache"][slot, :, 0], call["x"][row], "the token is pending")
    history["dt_cache"] = history["dt_cache"].double()
    run_replay(kernel, call, state, history, slots, out)
    assert engine.own.names() == ["checkpointing_ssu"] and "dt_cache" in caplog.text


def test_replay_of_triton_runs_by_our_step_and_what_it_refuses_by_vllm(engine, caplog):
    vllm.register("replay")
    call, state, history = replay_call()
    slots, out = torch.tensor([2, 0], dtype=torch.int32), torch.full_like(call["x"], -77.0)
    before, given = state.clone(), {**call, "z": None, "state_batch_indices": slots[:, None], "out": out}
    given |= {name: history[name] for name in ("x_cache", "dt_cache", "B_cache")}
    given |= {"write_pos": torch.zeros(2, dtype=torch.int32), "is_flush": torch.zeros(2, dtype=torch.int8)}
    step = engine.layer.selective_state_update_replayssm_output_only
    assert step(state, **given, max_cache_len=5) is out and engine.own == []
    same_bits(state, before, "nothing is flushed")
    _, want = token(wide(before[2]), **{**at_row(call, 0), "z": None})
    assert close(out[0], want) and bool((out[1] == -77).all()), "padding is left as it is"
    assert step(state, **given, max_cache_len=7) == "out" and "x_cache" in caplog.text
    assert engine.own.names() == ["selective_state_update_replayssm_output_only"]


def test_replay_without_replayssm_or_with_another_flashinfer_is_left_alone(engine, caplog):
    vllm.register("replay")
    start(engine)
    assert engine.dispatch._flashinfer_replayssm_kernel is None
    engine.dispatch.theirs = lambda state, old_x, old_B: None
    start(engine, "FLASHINFER", use_replayssm=True)
    assert engine.dispatch._flashinfer_replayssm_kernel is engine.dispatch.theirs
    assert "old_x" in caplog.text and "for replay" in caplog.text


def test_gated_delta_layers_that_imported_the_functions_before_decode_by_the_operator(engine):
    original = engine.layer.fused_recurrent_gated_delta_rule_packed_decode
    assert vllm.register("gdn") == ("gdn",)
    assert engine.layer.fused_recurrent_gated_delta_rule_packed_decode is original, "no module is imported for it yet"
    for _ in range(2):  # a target and its draft
        start(engine)
    call, state, slots = rows(3), pool(4), torch.tensor([3, 0, 1])
    before, out = state.clone(), torch.full((3, 1, 4, 32), float("nan"), dtype=torch.bfloat16)
    weights = {name: call[name] for name in ("a", "b", "A_log", "dt_bias")}
    engine.layer.fused_recurrent_gated_delta_rule_packed_decode(
        mixed_qkv=packed(call), **weights, scale=32**-0.5, initial_state=state, out=out, ssm_state_indices=slots,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    for row, slot in ((0, 3), (2, 1)):
        new, want = step(wide(before[slot]), call, row)
        assert close(out[row, 0], want) and close(state[slot], new)
    assert not out[1].any() and engine.own == []
    result = engine.layer.fused_sigmoid_gating_delta_rule_update(
        **weights, **{n: call[n][None] for n in ("q", "k", "v")}, initial_state=state, ssm_state_indices=slots,
        cu_seqlens=torch.arange(4), is_kda=True,
    )  # fmt: skip
    assert result == ("out", "state") and engine.own.names() == ["fused_sigmoid_gating_delta_rule_update"]
    vllm.unregister()
    assert engine.layer.fused_recurrent_gated_delta_rule_packed_decode is original


def test_registering_twice_wraps_once_and_unregistering_restores(engine):
    before = dict(engine.dispatch._BACKEND_REGISTRY)
    vllm.register("ssu")
    once = dict(engine.dispatch._BACKEND_REGISTRY)
    assert vllm.register("ssu") == ("ssu",) and engine.dispatch._BACKEND_REGISTRY == once != before
    vllm.unregister()
    assert engine.dispatch._BACKEND_REGISTRY == before


@pytest.mark.parametrize(
    ("value", "parts"), [("", ()), ("ssu", ("ssu",)), ("gdn, ssu", ("ssu", "gdn")), ("all", ("ssu", "replay", "gdn"))]
)
def test_the_plugin_registers_what_the_variable_names_and_nothing_by_default(monkeypatch, value, parts):
    asked = []
    monkeypatch.setattr(vllm, "register", lambda *names, strict: asked.append((names, strict)))
    monkeypatch.setenv("CUTE_SSM_VLLM", value)
    vllm.plugin()
    monkeypatch.setenv("CUTE_SSM_STRICT", "1")
    vllm.plugin()
    assert asked == ([(parts, False), (parts, True)] if parts else [])


def test_a_wrong_value_of_the_variable_registers_nothing_and_says_so(engine, monkeypatch, caplog):
    monkeypatch.setenv("CUTE_SSM_VLLM", "sssu")
    before = dict(engine.dispatch._BACKEND_REGISTRY)
    vllm.plugin()
    assert engine.dispatch._BACKEND_REGISTRY == before and "CUTE_SSM_VLLM" in caplog.text and "sssu" in caplog.text
    with pytest.raises(ValueError, match="parts: expected some of ssu, replay, gdn"):
        vllm.register("mamba")


def test_without_vllm_a_warning_says_what_is_missing(caplog, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert vllm.register("ssu") == ()
    assert "cute_ssm is not used by vllm for ssu" in caplog.text


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_entry_points_of_the_package_are_functions(group):
    text = (ROOT / "pyproject.toml").read_text()
    (value,) = re.findall(rf'^\[project.entry-points."{re.escape(group)}"\]\ncute_ssm = "(.*)"$', text, re.M)
    assert callable(importlib.metadata.EntryPoint("cute_ssm", value, group).load())


def test_the_parts_of_the_variable_are_those_of_the_integration():
    assert tuple(vllm._INSTALL) == env.VLLM_PARTS
    assert issubclass(UnsupportedSpecError, vllm._engines.CALLER_ERRORS)

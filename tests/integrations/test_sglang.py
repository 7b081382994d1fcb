"""The integration of SGLang, on stand-ins with SGLang's signatures: options, calls, ways back, what is left alone."""

from __future__ import annotations

import argparse
import logging
import sys

import engine_doubles
import kernel_backends
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import at_row, close, states, token, tokens, wide

from cute_ssm.errors import CuteSsmError, UnsupportedSpecError
from cute_ssm.integrations import sglang


@pytest.fixture
def engine(monkeypatch):
    return engine_doubles.sglang(monkeypatch)


def hook_of(engine, target):
    ((hook, kind),) = ((hook, kind) for name, hook, kind in engine.layer.hooks if name.endswith(target))
    assert kind.name == "AFTER"
    return hook


def start(engine, **options):
    """Select the backend as ``--mamba-backend cute_ssm`` does."""
    engine.dispatch._mamba_ssu_backend = engine.dispatch._BACKEND_REGISTRY["cute_ssm"](**options)
    return engine.dispatch._mamba_ssu_backend


def test_registration_adds_names_and_selects_nothing(engine):
    before = dict(engine.dispatch._BACKEND_REGISTRY)
    init = engine.layer.GDNKernelDispatcher.__init__
    assert sglang.register() == ("ssu", "gdn") == sglang.register()
    assert engine.layer.known == ["triton", "flashinfer", "cute_ssm"]
    added = dict(engine.dispatch._BACKEND_REGISTRY)
    assert added.pop("cute_ssm") and added == before
    assert engine.layer.GDNKernelDispatcher.__init__ is init and len(engine.layer.hooks) == 2
    hook = hook_of(engine, "linear.utils.resolve_linear_attn_backends")
    assert hook(engine.layer.utils.resolve_linear_attn_backends()) is None
    assert engine.layer.GDNKernelDispatcher.__init__ is init, "no option selects the backend"


def test_a_process_without_the_dispatch_does_not_import_it(engine, monkeypatch):
    monkeypatch.delitem(sys.modules, engine_doubles.SGLANG_DISPATCH)
    assert sglang.register() == ("ssu", "gdn")
    assert "cute_ssm" not in engine.dispatch._BACKEND_REGISTRY and hook_of(engine, "ServerArgs.add_cli_args")


def test_the_option_takes_the_name_and_refuses_others(engine):
    sglang.register()
    parser = argparse.ArgumentParser(exit_on_error=False)
    engine.layer.arguments.add_cli_args(parser)
    hook_of(engine, "ServerArgs.add_cli_args")(None, parser)
    assert parser.parse_args([]).mamba_backend == "triton"
    assert parser.parse_args(["--mamba-backend", "cute_ssm"]).mamba_backend == "cute_ssm"
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--mamba-backend", "cute_ssn"])


def test_a_decode_step_of_the_dispatch_runs_by_the_operator_and_trees_by_triton(engine, caplog):
    sglang.register()
    backend = start(engine)
    call, state, slots = tokens(rows=3), states(5), torch.tensor([4, -1, 2], dtype=torch.int32)
    before, out = state.clone(), torch.full_like(call["x"], float("nan"))
    engine.dispatch.selective_state_update(state, **call, state_batch_indices=slots, out=out)
    assert engine.own == [] and backend.cute_ssm.calls == 1 and backend.name == "cute_ssm"
    for row, slot in ((0, 4), (2, 2)):
        new, want = token(wide(before[slot]), **at_row(call, row))
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "rows of padding are finite"
    for _ in range(2):
        engine.dispatch.selective_state_update(state, **call, out=out, retrieve_parent_token=torch.zeros(3, 1))
    assert engine.own.names() == ["triton", "triton"]
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "retrieve_parent_token" in record.getMessage()


def test_rounding_of_the_options_reaches_the_operator(engine):
    sglang.register(strict=True)
    start(engine, enable_stochastic_rounding=True)
    call, out = tokens(rows=1), torch.empty(1, 4, 64)
    with pytest.raises(TypeError, match="float16"):
        engine.dispatch.selective_state_update(states(2), **call, out=out)
    engine.dispatch.selective_state_update(states(2, dtype=torch.float16), **call, out=out)


def dispatcher(engine, decode="cute_ssm", **selected):
    """What a model runner does: resolve the backends, then build the dispatcher of gated delta layers."""
    vars(engine.layer.mamba).update(linear_attn_decode_backend=decode, **selected)
    backends = engine.layer.utils.resolve_linear_attn_backends()
    hook_of(engine, "resolve_linear_attn_backends")(backends)
    return engine.layer.GDNKernelDispatcher(backends.decode, backends.prefill, None)


def test_gated_delta_layers_decode_by_the_kernel_and_prefill_by_triton(engine):
    sglang.register()
    for _ in range(2):  # a target and its draft
        kernels = dispatcher(engine)
    assert kernels.supports_packed_decode and kernels.verify_kernel is kernels.decode_kernel
    call, state, slots = rows(), pool(6), torch.tensor([3, -1, 5, 0], dtype=torch.int32)
    before = state.clone()
    weights = {name: call[name] for name in ("a", "b", "A_log", "dt_bias")}
    given = {"ssm_states": state, "cache_indices": slots}
    with kernel_backends.kernel() as session:
        out = kernels.decode_kernel.packed_decode(
            packed(call), **weights, scale=32**-0.5, num_v_heads=4, head_v_dim=32, **given
        )
    if not kernel_backends.gpu:
        assert len(session.launches) == 1
    assert out.shape == (1, 4, 4, 32) and engine.own == [] and kernels.decode_kernel.cute_ssm.calls == 1
    for row, slot in ((0, 3), (2, 5), (3, 0)):
        new, want = step(wide(before[slot]), call, row)
        assert close(out[0, row], want) and close(state[slot], new)
    assert not out[0, 1].any()
    separate = {name: call[name][None] for name in ("q", "k", "v")}
    state.copy_(before)
    again = kernels.decode_kernel.decode(**separate, **weights, **given, query_start_loc=torch.arange(5))
    assert close(again[0, 0], wide(out[0, 0]))
    assert kernels.decode_kernel.extend(g=None) == "extend" and engine.own.names() == ["extend"]


def test_verification_stores_states_by_request_and_a_tree_goes_to_triton(engine):
    sglang.register()
    kernel = dispatcher(engine).verify_kernel
    call, state, slots = rows(4), pool(3), torch.tensor([2, 0])
    before, buffer = state.clone(), torch.zeros(3, 2, 4, 32, 32)
    given = {
        **call, **{name: call[name][None] for name in ("q", "k", "v")}, "ssm_states": state, "cache_indices": slots,
        "query_start_loc": torch.tensor([0, 2, 4]), "intermediate_states_buffer": buffer, "cache_steps": 2,
        "intermediate_state_indices": torch.tensor([0, 1]), "stable_rows": False,
    }  # fmt: skip
    out = kernel.target_verify(**given, retrieve_parent_token=None)
    same_bits(state, before, "the pool")
    for i in range(2):
        h = wide(before[slots[i]])
        for t in range(2):
            h, want = step(h, call, 2 * i + t)
            assert close(out[0, 2 * i + t], want) and close(buffer[i, t], h)
    assert kernel.target_verify(**given, retrieve_parent_token=torch.zeros(2, 2)) == "target_verify"


@pytest.mark.parametrize("strict", [False, True])
def test_rings_of_sglang_stay_with_sglang(engine, caplog, strict):
    sglang.register(strict=strict)
    kernel = dispatcher(engine).decode_kernel
    ring = dict.fromkeys(sglang.REPLAYSSM, torch.zeros(1))
    given = dict.fromkeys(("A_log", "dt_bias", "scale", "ssm_states", "cache_indices", "num_v_heads", "head_v_dim"))
    if strict:
        with pytest.raises(UnsupportedSpecError, match="--enable-linear-replayssm"):
            kernel.packed_decode(None, None, None, **given, **ring)
        return
    assert kernel.packed_decode(None, None, None, **given, **ring) == "packed_decode"
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert "--enable-linear-replayssm" in record.getMessage()


def test_another_verify_backend_stays_selected(engine):
    sglang.register()
    kernels = dispatcher(engine, linear_attn_verify_backend="triton")
    assert kernels.verify_kernel is not kernels.decode_kernel
    kernels = dispatcher(engine, decode=None, linear_attn_verify_backend="cute_ssm")
    assert hasattr(kernels.verify_kernel, "cute_ssm") and not hasattr(kernels.decode_kernel, "cute_ssm")


def test_other_parameters_leave_the_options_as_they_were_and_say_why(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine.dispatch.TritonSSUBackend, "__init__", lambda self, server_args: None)
    monkeypatch.setattr(engine.layer.utils, "resolve_linear_attn_backends", lambda prefill=None: None)
    before = dict(engine.dispatch._BACKEND_REGISTRY)
    sglang.plugin()
    assert engine.dispatch._BACKEND_REGISTRY == before and engine.layer.hooks == []
    assert engine.layer.known == ["triton", "flashinfer"]
    first, second = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "server_args" in first and "prefill_default" in second


def test_another_dispatcher_stops_the_start_with_the_reason(engine, monkeypatch):
    sglang.register()
    monkeypatch.setattr(engine.layer.GDNKernelDispatcher, "__init__", lambda self, backends: None)
    with pytest.raises(CuteSsmError, match=r"GDNKernelDispatcher\.__init__: expected"):
        dispatcher(engine)


def test_a_backend_for_prefill_is_refused_with_the_option_to_use(engine):
    sglang.register()
    engine.layer.mamba.linear_attn_backend = "cute_ssm"
    with pytest.raises(ValueError, match="--linear-attn-decode-backend cute_ssm"):
        dispatcher(engine)

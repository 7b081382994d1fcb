"""SGLang's own modules with the integration: options, dispatch and kernels of layers, in the emulator, on CPU tensors.

Run with ``-m peers`` where SGLang 0.5.23 is on the path.  Stand-ins: third-party packages that are absent
(`engines.ABSENT`), and the options that a running server has resolved.
"""

from __future__ import annotations

import argparse
import importlib
import types

import engines
import kernel_backends
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import at_row, close, states, token, tokens, wide

pytestmark = pytest.mark.peers
LINEAR = "sglang.srt.layers.attention.linear"


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """SGLang, after it has loaded the plugin by its entry point."""
    if not engines.available("sglang"):
        pytest.skip("SGLang is not on the path")
    names = {
        "arguments": "sglang.srt.server_args", "dispatch": "sglang.kernels.ops.mamba.triton_ops.ssu_dispatch",
        "gdn": f"{LINEAR}.gdn_backend", "utils": f"{LINEAR}.utils", "hooks": "sglang.srt.plugins.hook_registry",
        "layer": "sglang.srt.layers.attention.mamba.mamba",
    }  # fmt: skip
    with engines.stand_ins():
        found = types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(engines.installed(tmp_path_factory.mktemp("installed")))
            patch.setenv("CUTE_SSM_STRICT", "1")
            importlib.import_module("sglang.srt.plugins").load_plugins()
    return found


def parse(modules, *words):
    parser = argparse.ArgumentParser()
    modules.arguments.ServerArgs.add_cli_args(parser)
    return parser.parse_args(["--model-path", "model", *words])


def test_the_options_of_the_server_have_our_backends_and_select_none(modules):
    assert parse(modules).mamba_backend == "triton"
    chosen = parse(modules, "--mamba-backend", "cute_ssm", "--linear-attn-decode-backend", "cute_ssm")
    assert chosen.mamba_backend == chosen.linear_attn_decode_backend == "cute_ssm"
    with pytest.raises(SystemExit):
        parse(modules, "--mamba-backend", "cute_ssn")


@pytest.fixture
def started(modules):
    given = parse(modules, "--mamba-backend", "cute_ssm")
    modules.dispatch.initialize_mamba_selective_state_update_backend(given)
    return modules


def test_the_dispatch_of_a_mamba_2_layer_decodes_by_our_kernel(started):
    call = tokens(rows=3, dtype=torch.bfloat16)
    call["dt"] = call["dt"][..., 0].bfloat16()[..., None].expand_as(call["x"])  # as the layer expands them
    call |= {"z": None, "D": call["D"].bfloat16(), "dt_bias": call["dt_bias"].bfloat16()}
    state, slots = states(5), torch.tensor([4, -1, 2], dtype=torch.int32)
    before, out = state.clone(), torch.full_like(call["x"], float("nan"))
    with kernel_backends.kernel() as session, torch.inference_mode():
        started.layer.selective_state_update(state, **call, state_batch_indices=slots, out=out)
    assert len(session.launches) == 1
    for row, slot in ((0, 4), (2, 2)):
        new, want = token(wide(before[slot]), **at_row(call, row))
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "padding"


def test_the_dispatch_of_a_mamba_1_layer_decodes_by_our_kernel(started):
    dim, dstate = 64, 16
    call = tokens(rows=2, heads=1, dim=dim, dstate=dstate, groups=1, tied=False)
    state, slots = states(3, heads=1, dim=dim, dstate=dstate), torch.tensor([2, 0], dtype=torch.int32)
    want = [token(wide(state[slot]), **at_row(call, row)) for row, slot in enumerate((2, 0))]
    theirs, out = state.transpose(1, 2).contiguous(), torch.empty(2, dim, 1)
    with kernel_backends.kernel() as session, torch.inference_mode():
        started.layer.selective_state_update(
            theirs, *(call[n].view(2, dim, 1) for n in ("x", "dt")), call["A"].transpose(0, 1), call["B"], call["C"],
            call["D"].view(dim, 1), z=call["z"].view(2, dim, 1), dt_bias=call["dt_bias"].view(dim, 1),
            dt_softplus=True, state_batch_indices=slots, out=out,
        )  # fmt: skip
    assert len(session.launches) == 1
    for row, slot in enumerate((2, 0)):
        assert close(theirs[slot, :, 0], want[row][0][0]) and close(out[row, :, 0], want[row][1][0])


@pytest.fixture
def kernels(modules, monkeypatch):
    """The dispatcher of a gated delta runner, after SGLang has resolved its backends."""
    mamba = types.SimpleNamespace(
        linear_attn_backend="triton", linear_attn_decode_backend="cute_ssm", linear_attn_prefill_backend=None,
        linear_attn_verify_backend=None,
    )  # fmt: skip
    monkeypatch.setattr(modules.utils, "get_exec", lambda: types.SimpleNamespace(mamba=mamba))
    monkeypatch.setattr(modules.utils, "rank0_log", lambda text: None)
    monkeypatch.setattr(modules.gdn, "rank0_log", lambda text: None)
    backends = modules.utils.resolve_linear_attn_backends()
    return modules.gdn.GDNKernelDispatcher(backends.decode, backends.prefill, backends.verify)


def test_the_dispatcher_of_gated_delta_layers_decodes_by_our_kernel(kernels):
    assert type(kernels.extend_kernel).__name__ == "TritonGDNKernel"
    call, state, slots = rows(3), pool(6), torch.tensor([3, -1, 0], dtype=torch.int32)
    before = state.clone()
    weights = {name: call[name] for name in ("a", "b", "A_log", "dt_bias")}
    given = {"ssm_states": state, "cache_indices": slots}
    with kernel_backends.kernel() as session, torch.inference_mode():
        out = kernels.packed_decode(
            mixed_qkv=packed(call), **weights, scale=32**-0.5, **given, num_v_heads=4, head_v_dim=32
        )
        new = state.clone()
        state.copy_(before)
        inputs = {name: call[name][None] for name in ("q", "k", "v")}
        again = kernels.decode(**inputs, **weights, **given, query_start_loc=torch.arange(4, dtype=torch.int32))
    assert len(session.launches) == 2
    same_bits(new, state, "both forms of a step")
    for row, slot in ((0, 3), (2, 0)):
        want_state, want = step(wide(before[slot]), call, row)
        assert close(out[0, row], want) and close(again[0, row], want) and close(state[slot], want_state)
    assert not out[0, 1].any() and not again[0, 1].any(), "padding"


def test_the_dispatcher_of_gated_delta_layers_verifies_by_our_kernel(kernels):
    call, state, slots = rows(4), pool(3), torch.tensor([2, 0], dtype=torch.int32)
    before, buffer = state.clone(), torch.zeros(4, 2, 4, 32, 32)
    with kernel_backends.kernel() as session, torch.inference_mode():
        out = kernels.target_verify(
            **{**call, **{name: call[name][None] for name in ("q", "k", "v")}}, ssm_states=state, cache_indices=slots,
            query_start_loc=torch.tensor([0, 2, 4], dtype=torch.int32), intermediate_states_buffer=buffer,
            intermediate_state_indices=torch.tensor([0, 1]), cache_steps=2, retrieve_parent_token=None,
            stable_rows=False,
        )  # fmt: skip
    assert len(session.launches) == 1
    same_bits(state, before, "the pool")
    for i in range(2):
        h = wide(before[slots[i]])
        for t in range(2):
            h, want = step(h, call, 2 * i + t)
            assert close(out[0, 2 * i + t], want) and close(buffer[i, t], h)

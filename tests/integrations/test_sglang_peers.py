"""SGLang's own modules with the integration: options, dispatch and kernels of layers, in the emulator, on CPU tensors.

Run with ``-m peers`` where SGLang 0.5.23 is on the path.  Stand-ins: third-party packages that are absent
(`engines.ABSENT`); convolutions of a layer, which are kernels of a GPU, by the identity, as are its projections and its
norm; weights; and the options that a running server has resolved.
"""

from __future__ import annotations

import argparse
import importlib
import types

import engines
import kernel_backends
import numpy as np
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


HEADS, DIM, GROUPS, DSTATE = 4, 64, 2, 64


def forward(modules, monkeypatch, projected, slots, state, **verify):
    """Run a `MambaMixer2` with random weights on projected rows: its outputs (tokens, heads, dim), and the layer."""
    mixer = modules.layer
    g = torch.Generator().manual_seed(3)
    layer = mixer.MambaMixer2.__new__(mixer.MambaMixer2)
    torch.nn.Module.__init__(layer)
    vars(layer).update(
        in_proj=lambda rows: (rows, None), out_proj=lambda rows: (rows, None), norm=lambda rows, gate: rows,
        intermediate_size=HEADS * DIM, conv_dim=HEADS * DIM + 2 * GROUPS * DSTATE, num_heads=HEADS, head_dim=DIM,
        n_groups=GROUPS, groups_ssm_state_size=GROUPS * DSTATE, ssm_state_size=DSTATE, tp_size=1, activation="silu",
        conv1d=types.SimpleNamespace(weight=torch.zeros(8, 1, 4), bias=None),
        A=-torch.exp(torch.rand(HEADS, generator=g)), D=torch.randn(HEADS, generator=g),
        dt_bias=torch.randn(HEADS, generator=g).bfloat16(),
    )  # fmt: skip
    for name in ("causal_conv1d_update", "causal_conv1d_update_triton"):
        monkeypatch.setattr(mixer, name, lambda rows, *args, **kwargs: rows, raising=False)
    pool = importlib.import_module("sglang.srt.mem_cache.memory_pool").MambaPool
    cache = object.__new__(pool.SpeculativeState if verify else pool.State)
    held = {"conv": [torch.zeros(1, 8, 3)], "temporal": state, "intermediate_conv_window": [None]}
    for name, value in (held | verify).items():
        object.__setattr__(cache, name, value)
    steps = len(projected) // len(slots)
    metadata = types.SimpleNamespace(
        mamba_cache_indices=slots, query_start_loc=torch.arange(len(slots) + 1), num_prefills=0, num_prefill_tokens=0,
        num_decodes=len(slots), is_target_verify=bool(verify), draft_token_num=steps, retrieve_next_token=None,
        retrieve_next_sibling=None, retrieve_parent_token=None, has_mamba_track_mask=False,
    )  # fmt: skip
    with torch.inference_mode():
        result = layer.forward(
            hidden_states=projected, layer_cache=cache, metadata=metadata, use_triton_causal_conv=bool(verify)
        )
    return result[0].unflatten(1, (HEADS, DIM)), layer


def rows_of(count):
    columns = 2 * HEADS * DIM + 2 * GROUPS * DSTATE + HEADS
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def expected(layer, h, row):
    """One token of a projected row, in float64."""
    _, x, B, C, dt = torch.split(row, [HEADS * DIM, HEADS * DIM, GROUPS * DSTATE, GROUPS * DSTATE, HEADS])
    dt, D, bias = (np.repeat(wide(value)[:, None], DIM, 1) for value in (dt, layer.D, layer.dt_bias))
    A = np.broadcast_to(wide(layer.A)[:, None, None], (HEADS, DIM, DSTATE))
    B, C = (wide(value).reshape(GROUPS, DSTATE) for value in (B, C))
    return token(h, wide(x).reshape(HEADS, DIM), dt, A, B, C, D, None, bias, True)


def test_a_mamba_2_layer_decodes_by_our_kernel(started, monkeypatch):
    state, slots = states(5, HEADS, DIM, DSTATE), torch.tensor([4, -1, 2], dtype=torch.int32)
    before, projected = state.clone(), rows_of(3)
    with kernel_backends.kernel() as session:
        out, layer = forward(started, monkeypatch, projected, slots, state)
    assert len(session.launches) == 1
    for row, slot in ((0, 4), (2, 2)):
        new, want = expected(layer, wide(before[slot]), projected[row])
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "padding"


def test_a_mamba_2_layer_verifies_drafts_by_our_kernel(started, monkeypatch):
    state, slots = states(4, HEADS, DIM, DSTATE), torch.tensor([1, 3], dtype=torch.int32)
    before, projected = state.clone(), rows_of(4)
    buffer = torch.zeros(3, 2, HEADS, DIM, DSTATE)
    with kernel_backends.kernel() as session:
        out, layer = forward(started, monkeypatch, projected, slots, state, intermediate_ssm=buffer)
    assert len(session.launches) == 1
    same_bits(state, before, "the pool")
    for i in range(2):
        h = wide(before[slots[i]])
        for t in range(2):
            h, want = expected(layer, h, projected[2 * i + t])
            assert close(out[2 * i + t], want) and close(buffer[i, t], h)


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

"""vLLM's own modules with the integration: its layers decode by our kernels, in the emulator, on CPU tensors.

Run with ``-m peers`` where vLLM 0.33 is on the path.  Stand-ins: third-party packages that are absent
(`engines.ABSENT`); ``vllm._C``, which vLLM does without; the convolution of decode steps, a Triton kernel, by the
identity; FlashInfer's functions, by functions with its signatures; and the weights and options of a layer.
"""

from __future__ import annotations

import importlib
import json
import types

import engines
import kernel_backends
import numpy as np
import peer_doubles
import peer_signatures
import pytest
import torch
from bits import same_bits
from gated_loop import packed, pool, rows, step
from step_oracle import close, states, token, wide

from cute_ssm.integrations import vllm

pytestmark = pytest.mark.peers
HEADS, DIM, GROUPS, DSTATE = 4, 64, 2, 64
MAMBA = "vllm.model_executor.layers.mamba"


@pytest.fixture(scope="module")
def modules():
    if not engines.available("vllm"):
        pytest.skip("vLLM is not on the path")
    names = {"mixer": f"{MAMBA}.mamba_mixer2", "dispatch": f"{MAMBA}.ops.ssu_dispatch", "config": "vllm.config.mamba"}
    names |= {"gdn": f"{MAMBA}.gdn.qwen_gdn_linear_attn", "cache": "vllm.v1.kv_cache_interface"}
    with engines.stand_ins():
        return types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


@pytest.fixture
def registered(modules, monkeypatch):
    """All parts, in modules that have been imported before; vLLM's own kernels count as faults."""
    table = json.loads(peer_signatures.TABLE.read_text())["flashinfer-python"]
    functions = {path.rpartition("::")[2]: peer_doubles.function(table, path) for path in table["functions"]}
    package = types.ModuleType("flashinfer")
    mamba, ring = types.ModuleType("flashinfer.mamba"), types.ModuleType("flashinfer.mamba.checkpointing_ssu")
    mamba.selective_state_update = functions["selective_state_update"]
    ring.checkpointing_ssu = functions["checkpointing_ssu"]
    for module in (package, mamba, ring):
        monkeypatch.setitem(importlib.sys.modules, module.__name__, module)
    assert vllm.register(strict=True) == ("ssu", "replay", "gdn")
    start(modules, "triton")  # replaces the functions of gated delta layers
    yield modules
    vllm.unregister()


def start(modules, backend, **options):
    """What a model runner does once it knows its cache."""
    spec = modules.cache.MambaSpec(block_size=16, shapes=((1,),), dtypes=(torch.float32,))
    groups = types.SimpleNamespace(kv_cache_groups=[types.SimpleNamespace(kv_cache_spec=spec)])
    config = modules.config.MambaConfig(backend=backend)
    modules.dispatch._mamba_ssu_backend = None  # as in a new process
    modules.dispatch.initialize_mamba_ssu_backend(config, groups, **options)
    return config


def layer_of(modules, config, monkeypatch, *caches, replay=False, spec=0):
    """A `MambaMixer2` with random weights."""
    mixer = modules.mixer
    g = torch.Generator().manual_seed(3)
    layer = mixer.MambaMixer2.__new__(mixer.MambaMixer2)
    torch.nn.Module.__init__(layer)
    inner, sizes = HEADS * DIM, [HEADS * DIM, GROUPS * DSTATE, GROUPS * DSTATE]
    vars(layer).update(
        prefix="layer", kv_cache=(torch.zeros(1, 3, 8), *caches), num_spec=spec, use_replayssm=replay,
        replayssm_buffer_len=4 if replay else None, cache_config=object(), mamba_config=config, is_blackwell=False,
        tped_intermediate_size=inner, tped_conv_size=sum(sizes), tped_dt_size=HEADS, num_heads=HEADS, head_dim=DIM,
        n_groups=GROUPS, ssm_state_size=DSTATE, tp_size=1, conv_weights=None, activation="silu",
        conv1d=types.SimpleNamespace(bias=None), split_hidden_states_B_C_fn=lambda x: torch.split(x, sizes, dim=-1),
        A=-torch.exp(torch.rand(HEADS, generator=g)), D=torch.randn(HEADS, generator=g),
        dt_bias=torch.randn(HEADS, generator=g).bfloat16(), _commits_replayssm_trackers=False,
        _updates_replayssm_trackers=False,
    )  # fmt: skip
    monkeypatch.setattr(mixer, "causal_conv1d_update", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(mixer, "is_conv_state_dim_first", lambda: True)
    return layer


def decode(modules, layer, monkeypatch, projected, slots, **more):
    """Run the layer's decode step on projected rows (tokens, columns); the outputs (tokens, heads, dim)."""
    mixer, count = modules.mixer, len(projected)
    fields = {
        "num_prefills": 0, "num_prefill_tokens": 0, "num_decodes": len(slots), "num_decode_tokens": count,
        "num_reqs": len(slots), "has_initial_states_p": None, "query_start_loc_p": None,
        "state_indices_tensor_p": None, "state_indices_tensor_d": slots, "query_start_loc_d": None,
        "num_accepted_tokens": None, "seq_lens": torch.ones(len(slots)),
    }  # fmt: skip
    metadata = mixer.Mamba2AttentionMetadata(**{**fields, **more})
    context = types.SimpleNamespace(attn_metadata={"layer": metadata})
    monkeypatch.setattr(mixer, "get_forward_context", lambda: context)
    out = torch.full((count, HEADS * DIM), float("nan"), dtype=projected.dtype)
    with torch.inference_mode():
        layer.conv_ssm_forward(projected, out)
    return out.unflatten(1, (HEADS, DIM))


def rows_of(count, seed=0):
    columns = 2 * HEADS * DIM + 2 * GROUPS * DSTATE + HEADS
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(layer, h, row):
    """One token of a projected row, in float64."""
    parts = torch.split(row, [HEADS * DIM, HEADS * DIM, GROUPS * DSTATE, GROUPS * DSTATE, HEADS])
    x, B, C = wide(parts[1]).reshape(HEADS, DIM), wide(parts[2]), wide(parts[3])
    per_head = (np.repeat(wide(value)[:, None], DIM, 1) for value in (parts[4], layer.D, layer.dt_bias))
    dt, D, bias = per_head
    A = np.broadcast_to(wide(layer.A)[:, None, None], (HEADS, DIM, DSTATE))
    return token(h, x, dt, A, B.reshape(GROUPS, -1), C.reshape(GROUPS, -1), D, None, bias, True)


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_a_mamba_2_layer_decodes_by_our_kernel(registered, monkeypatch, backend):
    config = start(registered, backend)
    assert registered.dispatch.get_mamba_ssu_backend().name == f"cute_ssm, else {backend}"
    state = states(6, HEADS, DIM, DSTATE)
    before, slots = state.clone(), torch.tensor([[4], [0], [2]], dtype=torch.int32)
    layer, projected = layer_of(registered, config, monkeypatch, state), rows_of(3)
    with kernel_backends.kernel() as session:
        out = decode(registered, layer, monkeypatch, projected, slots)
    assert len(session.launches) == 1
    for row, slot in ((0, 4), (2, 2)):
        new, want = expected(layer, wide(before[slot]), projected[row])
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "padding"
    for slot in (0, 1, 3, 5):
        same_bits(state[slot], before[slot], "a slot of no request")


def test_a_speculative_step_of_a_mamba_2_layer_stores_the_state_after_every_token(registered, monkeypatch):
    config = start(registered, "triton")
    state = states(6, HEADS, DIM, DSTATE)
    before, slots = state.clone(), torch.tensor([[4, 1], [2, 5]], dtype=torch.int32)
    layer, projected = layer_of(registered, config, monkeypatch, state, spec=1), rows_of(3)
    with kernel_backends.kernel() as session:
        out = decode(
            registered, layer, monkeypatch, projected, slots, num_accepted_tokens=torch.tensor([2, 1]).int(),
            query_start_loc_d=torch.tensor([0, 2, 3]).int(),
        )  # fmt: skip
    assert len(session.launches) == 1
    h = wide(before[1])
    for t, slot in enumerate((4, 1)):
        h, want = expected(layer, h, projected[t])
        assert close(out[t], want) and close(state[slot], h)
    new, want = expected(layer, wide(before[2]), projected[2])
    assert close(out[2], want) and close(state[2], new)
    same_bits(state[5], before[5], "the second sequence has one token")


def test_a_mamba_2_layer_replays_by_our_ring_until_the_window_is_full(registered, monkeypatch):
    config = start(registered, "flashinfer", use_replayssm=True)
    state, length = states(4, HEADS, DIM, DSTATE), 5
    caches = (
        torch.zeros(4, HEADS, length, DIM).bfloat16(), torch.zeros(4, HEADS, length),
        torch.zeros(4, GROUPS, length, DSTATE).bfloat16(),
    )  # fmt: skip
    layer = layer_of(registered, config, monkeypatch, state, *caches, replay=True)
    starts, pending = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    vars(layer).update(
        _replayssm_ring_start=starts, _replayssm_prev_num_accepted=pending, _replayssm_prev_query_len=starts.clone()
    )
    before, slots = state.clone(), torch.tensor([[3], [1]], dtype=torch.int32)
    exact = {slot: wide(before[slot]) for slot in (3, 1)}
    for number in range(6):
        projected = rows_of(2, seed=number)
        with kernel_backends.kernel() as session:
            out = decode(
                registered, layer, monkeypatch, projected, slots, replayssm_scratch=3 * (torch.empty(0),),
                replayssm_state_indices_d=slots[:, 0].contiguous(),
            )  # fmt: skip
        assert len(session.launches) == 1
        if number == 4:
            assert all(close(state[slot], exact[slot]) for slot in exact), "the fifth step writes four tokens"
        for row, slot in enumerate((3, 1)):
            exact[slot], want = expected(layer, exact[slot], projected[row])
            assert close(out[row], want), f"token {number} of slot {slot}"
        written = pending[slots[:, 0].long()] + 1 > 4  # what vLLM's Triton kernel of the trackers does
        assert bool(written.all()) == (number == 4)
        if number == 4:
            starts[slots[:, 0].long()] += 4
            pending[slots[:, 0].long()] = 0
        elif number < 4:
            same_bits(state, before, "no window is full")
        pending[slots[:, 0].long()] += 1


def test_a_mamba_2_layer_replays_by_our_step_of_vllm_s_triton_backend(registered, monkeypatch):
    config = start(registered, "triton", use_replayssm=True)
    state, length = states(4, HEADS, DIM, DSTATE), 4
    caches = (
        torch.zeros(4, HEADS, length, DIM).bfloat16(), torch.zeros(4, HEADS, length),
        torch.zeros(4, GROUPS, length, DSTATE).bfloat16(),
    )  # fmt: skip
    layer = layer_of(registered, config, monkeypatch, state, *caches, replay=True)
    before, slots = state.clone(), torch.tensor([[3], [1]], dtype=torch.int32)
    exact = {slot: wide(before[slot]) for slot in (3, 1)}
    for number in range(4):
        flush, projected = number == 3, rows_of(2, seed=number)
        position, flushes = torch.full((2,), number, dtype=torch.int32), torch.full((2,), flush).to(torch.int8)
        with kernel_backends.kernel() as session:
            out = decode(
                registered, layer, monkeypatch, projected, slots, write_pos_d=position, is_flush_d=flushes,
                bc_pre_scratch=torch.zeros(2, GROUPS, length),
            )  # fmt: skip
        assert len(session.launches) == 1
        for row, slot in enumerate((3, 1)):
            exact[slot], want = expected(layer, exact[slot], projected[row])
            assert close(out[row], want), f"token {number} of slot {slot}"
        if not flush:
            same_bits(state, before, "nothing is flushed")
    assert all(close(state[slot], exact[slot]) for slot in exact)


def test_a_gated_delta_layer_decodes_by_our_kernel(registered, monkeypatch):
    gdn = registered.gdn
    layer = gdn.QwenGatedDeltaNetAttention.__new__(gdn.QwenGatedDeltaNetAttention)
    torch.nn.Module.__init__(layer)
    call, state = rows(3), pool(6)
    vars(layer).update(
        kv_cache=(torch.zeros(1, 3, 8), state), activation="silu", head_k_dim=32, A_log=call["A_log"],
        dt_bias=call["dt_bias"], conv1d=types.SimpleNamespace(weight=torch.zeros(8, 1, 4), bias=None),
    )  # fmt: skip
    monkeypatch.setattr(gdn, "causal_conv1d_update", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(gdn, "is_conv_state_dim_first", lambda: True)
    slots = torch.tensor([3, 0, 5], dtype=torch.int32)
    metadata = types.SimpleNamespace(non_spec_state_indices_tensor=slots, num_actual_tokens=3)
    before, out = state.clone(), torch.full((4, 4, 32), float("nan"), dtype=torch.bfloat16)
    with kernel_backends.kernel() as session, torch.inference_mode():
        layer._forward_core_decode_non_spec(packed(call), call["b"], call["a"], out, metadata)
    assert len(session.launches) == 1
    for row, slot in ((0, 3), (2, 5)):
        new, want = step(wide(before[slot]), call, row)
        assert close(out[row], want) and close(state[slot], new)
    assert not out[1].any(), "padding"
    for slot in (0, 1, 2, 4):
        same_bits(state[slot], before[slot], "a slot of no request")


def test_a_speculative_step_of_a_gated_delta_layer_runs_by_our_kernel(registered):
    call, state = rows(4), pool(6)
    slots, accepted = torch.tensor([[4, 1], [2, 5]], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)
    before = state.clone()
    with kernel_backends.kernel() as session, torch.inference_mode():
        out, _ = registered.gdn.fused_sigmoid_gating_delta_rule_update(
            A_log=call["A_log"], a=call["a"], b=call["b"], dt_bias=call["dt_bias"], q=call["q"][None],
            k=call["k"][None], v=call["v"][None], initial_state=state, inplace_final_state=True,
            cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32), ssm_state_indices=slots,
            num_accepted_tokens=accepted, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
    assert len(session.launches) == 1
    for i, first in enumerate((1, 2)):
        h = wide(before[first])
        for t in range(2):
            h, want = step(h, call, 2 * i + t)
            assert close(out[0, 2 * i + t], want) and close(state[slots[i, t]], h)


def test_vllm_loads_the_plugin_which_does_nothing_until_the_variable_asks(modules, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(engines.installed(tmp_path))
    plugins = importlib.import_module("vllm.plugins")
    for value, name in (("", "triton"), ("ssu", "cute_ssm, else triton")):
        monkeypatch.setenv("CUTE_SSM_VLLM", value)
        monkeypatch.setattr(plugins, "plugins_loaded", False)
        plugins.load_general_plugins()
        start(modules, "triton")
        assert modules.dispatch.get_mamba_ssu_backend().name == name
    vllm.unregister()
    start(modules, "triton")
    assert modules.dispatch.get_mamba_ssu_backend().name == "triton"

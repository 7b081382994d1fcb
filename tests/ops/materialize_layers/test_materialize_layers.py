"""`serving.materialize_layers`: against token-by-token float64 and `serving.materialize`; what is out of range."""

from __future__ import annotations

import contextlib

import pytest
import torch
from bits import same_bits
from cases import vary
from kernel_backends import both
from materialize_layers_cases import ACTIVE, Case, made, run, verify
from memory import storage

from cute_ssm import arch as archs
from cute_ssm import runtime, serving
from cute_ssm.compat.flashinfer.mamba import replayssm_materialize
from cute_ssm.ops.materialize_layers import arguments
from cute_ssm.ops.materialize_layers.spec import MaterializeLayersSpec

BASE = Case()
CASES = [
    BASE,
    *vary(
        BASE,
        state=("f32", "f16", "i16", "i8", "f8"),
        inputs=("f16",),
        A=(torch.bfloat16,),
        groups=(1, 4),
        dim=(64, 80),
        dstate=(128, 96),
        rows=(8, 16),
        window=(1,),
        place=(True,),
    ),
    Case(rows=70, window=64),
    Case(state="i8", dim=64, dstate=128, place=True),
]


def test_reference():
    for case in CASES:
        verify(case, None)


@pytest.mark.thin(4, "state")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case, backend):
    with backend() as session:
        verify(case, session)
    assert len(session.launches) == 1, "all layers"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_for_blackwell_with_late_copies(case, backend):
    with backend("sm_100a", async_mode="late", schedule=1) as session:
        verify(case, session)


@both
@pytest.mark.parametrize("state", ["f16", pytest.param("i8", marks=pytest.mark.slow)])
def test_each_layer_has_the_bits_of_materialize(state, backend):
    """With the seed of the layer."""
    case = Case(state=state, rounds=10)
    one, other = made(case), made(case)
    with backend() as session:
        run(one, session)
        for i, layer in enumerate(other.layers):
            pending = torch.full((len(layer.state),), -9, dtype=torch.int32)
            start = pending.clone()
            requests = [b for b in ACTIVE if b >= 0]
            src, dst = (one.call[name][i, requests] for name in ("src_slots", "dst_slots"))
            pending[src.long()] = one.call["replay_prefix_len"][requests]
            start[src.long()] = one.call["ring_start"][requests]
            serving.materialize(
                layer.state, layer.x, layer.B, layer.dt, layer.A[:, None, None].expand(-1, case.dim, case.dstate),
                pending, src, dst, ring_start=start, state_scale=layer.scale,
                rand_seed=one.call["rand_seed"][i : i + 1],
            )  # fmt: skip
    for mine, theirs in zip(one.layers, other.layers):
        same_bits(storage(mine.state), storage(theirs.state))
        if mine.scale is not None:
            same_bits(storage(mine.scale), storage(theirs.scale))


def test_what_is_out_of_range_is_left_alone_on_a_gpu(backend, monkeypatch):
    """There the host looks at no contents."""
    monkeypatch.setattr(arguments, "check_contents", lambda call: None)
    for name, value in (
        ("src_slots", -2), ("dst_slots", -(2**31)), ("ring_start", BASE.rows), ("ring_start", -1),
        ("replay_prefix_len", -1), ("replay_prefix_len", BASE.window + 1), ("active_request_indices", 4),
        ("active_request_indices", -(2**31)),
    ):  # fmt: skip
        one, right = made(BASE), made(BASE)
        one.call[name][..., 1 if name == "active_request_indices" else 0] = value  # of request 0, in all layers
        right.call["active_request_indices"] = torch.tensor((2, 1, -1, -1), dtype=torch.int32)
        with backend() as session:
            run(one, session)
            run(right, session)
        for mine, theirs in zip(one.layers, right.layers):
            same_bits(storage(mine.state), storage(theirs.state), f"{name} = {value}")


def test_a_batch_without_requests_writes_nothing(backend):
    one = made(BASE)
    before = [storage(layer.state).clone() for layer in one.layers]
    one.call["active_request_indices"].fill_(-1)
    for context in (contextlib.nullcontext(), backend()):
        with context as session:
            run(one, session)
    for name in ("ring_start", "replay_prefix_len", "active_request_indices"):
        one.call[name] = one.call[name][:0]
    for name in ("src_slots", "dst_slots"):
        one.call[name] = one.call[name][:, :0]
    for context in (contextlib.nullcontext(), backend()):
        with context as session:
            run(one, session)
    for layer, then in zip(one.layers, before):
        same_bits(storage(layer.state), then)


SPECS = [
    MaterializeLayersSpec("float32", "bfloat16", "float32", 64, 128),
    MaterializeLayersSpec("int8", "bfloat16", "float32", 64, 128, 10),
    MaterializeLayersSpec("float16", "bfloat16", "bfloat16", 128, 256, 10),
    MaterializeLayersSpec("float8_e4m3fn", "float16", "float32", 80, 96),
]


@pytest.mark.thin(4)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text())
def test_nothing_spills(spec, arch):
    compiled = runtime.emulated(spec, None, archs.by_name(arch))
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


# ---------------------------------------------------------------------------------------------------------- FlashInfer
def test_flashinfers_function_derives_a_seed_for_each_layer():
    """Those of `conversion::layer_philox_seed`, computed here with Python's integers."""
    seed, wrap = -(2**60) + 12345, (1 << 64) - 1
    one, other = made(Case(state="f16")), made(Case(state="f16"))
    seeds = []
    for layer in range(2):
        z = (seed & wrap) ^ (0x9E3779B97F4A7C15 * (layer + 1) & wrap)
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wrap
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wrap
        z ^= z >> 31
        seeds.append(z - (1 << 64) if z >> 63 else z)
    replayssm_materialize(**one.call, rand_seed=torch.tensor(seed), philox_rounds=7)
    serving.materialize_layers(**other.call, rand_seed=torch.tensor(seeds), philox_rounds=7)
    nearest = made(Case(state="f16"))
    replayssm_materialize(**nearest.call, rand_seed=torch.tensor(seed))
    for mine, theirs, rounded in zip(one.layers, other.layers, nearest.layers):
        same_bits(storage(mine.state), storage(theirs.state))
        assert not torch.equal(storage(mine.state), storage(rounded.state)), "philox_rounds = 0 rounds to nearest"


# -------------------------------------------------------------------------------------------------------- bad arguments
def changed(name, change):
    return lambda call: call.__setitem__(name, change(call[name]))


def put(name, place, value):
    return lambda call: call[name].__setitem__(place, value)


BAD = {
    "state_ptrs: expected dtype": changed("state_ptrs", lambda t: t.int()),
    "state_ptrs: expected shape": changed("state_ptrs", lambda t: t[:1]),
    "state_ptrs: expected addresses that are multiples of 16": put("state_ptrs", 1, 8),
    "A_ptrs: expected addresses": put("A_ptrs", 0, 0),
    "x_cache_slot_strides: expected at least 640": put("x_cache_slot_strides", 1, 639),
    "B_cache_slot_strides: expected at least 640 elements, in multiples": put("B_cache_slot_strides", 1, 641),
    "src_slots: expected shape": changed("src_slots", lambda t: t[0]),
    "src_slots: expected 1 to 65535 layers": changed("src_slots", lambda t: t[:0]),
    "src_slots: expected slots that are not negative": put("src_slots", (1, 1), -7),
    "dst_slots: expected shape": changed("dst_slots", lambda t: t[:, :3]),
    "dst_slots: expected dtype": changed("dst_slots", lambda t: t.long()),
    "dst_slots: expected slots that no other request": put("dst_slots", (1, 2), 1),
    "ring_start: expected values from 0 to 9": put("ring_start", 1, 10),
    "replay_prefix_len: expected values from 0 to max_window = 8": put("replay_prefix_len", 0, 9),
    "active_request_indices: expected distinct indices": put("active_request_indices", 0, 1),
    "active_request_indices: expected a torch.Tensor": changed("active_request_indices", lambda t: t.tolist()),
    "state_dtype: expected a torch.dtype": changed("state_dtype", str),
    "state_dtype: expected torch.float32 or": changed("state_dtype", lambda _: torch.int32),
    "input_dtype: expected torch.bfloat16 or": changed("input_dtype", lambda _: torch.float32),
    "matrixA_dtype: expected": changed("matrixA_dtype", lambda _: torch.int8),
    "dim: expected a multiple of 8": changed("dim", lambda _: 12),
    "num_heads: expected an int": changed("num_heads", float),
    "heads_per_group: expected a divisor": changed("heads_per_group", lambda _: 3),
    "max_window: expected at most 64": lambda call: call.update(max_window=65, ring_buffer_len=70),
    "max_window: expected at least 1": changed("max_window", lambda _: 0),
    "ring_buffer_len: expected at least max_window": changed("ring_buffer_len", lambda _: 7),
    "rand_seed: expected None with float32": lambda call: call.update(
        state_dtype=torch.float32, rand_seed=torch.zeros(2, dtype=torch.int64), philox_rounds=3
    ),
    "rand_seed: expected a tensor with philox_rounds": lambda call: call.update(philox_rounds=3),
    "philox_rounds: expected 1 or more with rand_seed": lambda call: call.update(
        rand_seed=torch.zeros(2, dtype=torch.int64)
    ),
    "rand_seed: expected shape": lambda call: call.update(rand_seed=torch.zeros(3, dtype=torch.int64), philox_rounds=3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    one = made(BASE)
    BAD[message](one.call)
    before = [storage(layer.state).clone() for layer in one.layers]
    with pytest.raises((ValueError, TypeError)) as caught:
        serving.materialize_layers(**one.call)
    assert message in str(caught.value)
    for layer, then in zip(one.layers, before):
        same_bits(storage(layer.state), then)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_breaks_its_graph(compiler):
    """A graph knows nothing of the memory behind addresses: it may write back what was there before."""
    one, other = made(BASE), made(BASE)

    def step(state, call):
        state = state + 0
        serving.materialize_layers(**call)
        return state + one.layers[0].state

    torch._dynamo.reset()
    got = torch.compile(step, backend=compiler)(one.layers[0].state, one.call)
    serving.materialize_layers(**other.call)
    for mine, theirs in zip(one.layers, other.layers):
        same_bits(storage(mine.state), storage(theirs.state))
    same_bits(got, made(BASE).layers[0].state + other.layers[0].state)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"no graph can order|fullgraph"):
        torch.compile(step, fullgraph=True, backend=compiler)(one.layers[0].state, one.call)

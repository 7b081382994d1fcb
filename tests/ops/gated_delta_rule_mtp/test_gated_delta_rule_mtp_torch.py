"""`gated_delta_rule_mtp` as an operator of PyTorch, the memory of plans, and what its kernels cost."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from bits import equal, same_memory
from gdn_cases import Case, arguments
from memory import copy
from plan_doubles import Recorder, last_key
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime, tuning
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose
from cute_ssm.ops.gated_delta_rule_mtp import operator as module
from cute_ssm.ops.gated_delta_rule_mtp.spec import GatedDeltaRuleSpec

NAMES = (
    "q", "k", "v", "initial_state", "initial_state_indices", "A_log", "a", "dt_bias", "b", "scale", "output",
    "intermediate_states_buffer", "ssm_state_indices", "disable_state_update", "use_qk_l2norm", "output_state_indices",
    "accepted_steps", "cu_seqlens",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["verify", "buffer_update", "scatter", "accepted_split"])
def test_opcheck(mode):
    call = arguments(Case(mode=mode, K=64, scale=0.1))
    for name in ("initial_state", "output", "intermediate_states_buffer"):  # opcheck compares with ==
        if name in call:
            call[name].nan_to_num_(0.0)
    torch.library.opcheck(module._REGISTERED.overload, (*(call.get(name) for name in NAMES), False))


@pytest.mark.parametrize("out", [None, "f32"])
def test_compiles_to_one_graph(out):
    call = arguments(Case(out=out, K=64))
    eager = copy(call)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return cute_ssm.gated_delta_rule_mtp(**tensors)[0] + 1

    got = step(call)
    wanted = cute_ssm.gated_delta_rule_mtp(**eager)[0] + 1
    equal(torch.nan_to_num(got), torch.nan_to_num(wanted))
    same_memory(call["initial_state"], eager["initial_state"])


def test_fake_tensors_have_the_result_of_shapes_alone():
    call = arguments(Case(out=None))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out, _ = cute_ssm.gated_delta_rule_mtp(**fake)
    assert (out.shape, out.dtype) == (call["v"].shape, call["q"].dtype)


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(module._path, "plans", {})


def key_of(call):
    """The key under which a call's plan would be kept."""
    return last_key(module, lambda: cute_ssm.gated_delta_rule_mtp(**call))


def test_steady_state_is_one_look_up_and_one_call(plans):
    call = arguments(Case(mode="accepted_split", scale=0.5))
    key = key_of(copy(call))
    kernel = Recorder()
    module._path.plans = {key: (kernel, ())}
    call["output"] = arguments(Case())["output"]
    while call["output"].data_ptr() % 16 != key[-2]:
        call["output"] = call["output"].clone()
    out, _ = cute_ssm.gated_delta_rule_mtp(**call)
    assert out is call["output"]
    (got,) = kernel.calls
    for name, value in zip((*NAMES[:9], *NAMES[10:13], *NAMES[15:]), got):
        assert value is call.get(name), name
    assert got[14:] == (None, 0.5, None)


def test_a_refusing_kernel_leads_to_the_full_check(plans):
    call = arguments(Case())
    twin = copy(call)
    key = key_of(copy(call))
    module._path.plans = {key: (Recorder(refuse=True), ())}
    cute_ssm.gated_delta_rule_mtp(**call)
    module._path.plans = {}
    cute_ssm.gated_delta_rule_mtp(**twin)
    same_memory(call["initial_state"], twin["initial_state"])


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 4}, {"tokens": 5}, {"heads": 2}, {"ratio": 1}, {"K": 64}, {"V": 128}, {"state": "bf16"},
        {"io": "f16"}, {"out": "bf16"}, {"out": None}, {"gate": "f32"}, {"bias": "bf16"}, {"mode": "verify"},
        {"mode": "split"}, {"mode": "buffer"}, {"mode": "scatter"}, {"mode": "accepted"}, {"indices": torch.int64},
        {"l2norm": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_factor_is_in_the_key_of_plans(change, plans):
    assert key_of(arguments(Case(**change))) != key_of(arguments(Case()))


# ------------------------------------------------------------------------------------------------------------- kernels
BASE = GatedDeltaRuleSpec(
    state_dtype="float32",
    input_dtype="bfloat16",
    output_dtype="bfloat16",
    gate_dtype="bfloat16",
    dt_bias_dtype="float32",
    K=128,
    V=128,
    tokens=4,
    l2norm=True,
    src_dtype="int32",
    dst_dtype=None,
    scatter_dtype=None,
    accepted_dtype=None,
    write_final=False,
    write_buffer=False,
    zero_padding=False,
    vector_output=True,
)


def replaced(**fields):
    return GatedDeltaRuleSpec(**{**BASE.__dict__, **fields})


WRITE = {"write_final": True, "write_buffer": True, "accepted_dtype": "int32"}
SPECS = {
    "1-bf16": replaced(tokens=1, state_dtype="bfloat16", **WRITE),
    "1": replaced(tokens=1),
    "2": replaced(tokens=2, **WRITE),
    "1-256": replaced(tokens=1, K=256, V=256, **WRITE),
    "4": BASE,
    "8": replaced(tokens=8),
    "8-write": replaced(tokens=8, **WRITE),
    "16-write": replaced(tokens=16, **WRITE),
    "16-f16-direct": replaced(tokens=16, state_dtype="float16", output_dtype="float32", vector_output=False),
}


SIZES = [*itertools.product((64, 128, 256), (64, 256)), (96, 192), (160, 48), (192, 192), (224, 240), (256, 512)]


@pytest.mark.thin(18)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", SPECS)
def test_no_spills(name, arch):
    target = archs.by_name(arch)
    spec = SPECS[name]
    compiled = runtime.emulated(spec, choose(spec, target, 16384, target.sm_count), target)
    assert compiled.kernels, "what the compiler says of spills cannot be read"
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.registers <= 255, kernel
    assert f".target {arch}" in compiled.ptx


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16])
def test_no_spills_in_any_size(tokens, K, V, arch):
    target = archs.by_name(arch)
    for state, write in itertools.product(("float32", "bfloat16"), ({}, WRITE)):
        spec = replaced(tokens=tokens, K=K, V=V, state_dtype=state, **write)
        compiled = runtime.emulated(spec, choose(spec, target, 16384, target.sm_count), target)
        assert compiled.kernels, (state, write)
        assert not any(kernel.spill_bytes for kernel in compiled.kernels), (state, write)


def test_bundle_entry_for_the_gpu(tmp_path):
    path = runtime.compile_to(tmp_path, BASE, None, archs.SM_90A)
    assert path.stat().st_size > 10_000
    assert json.loads(path.with_suffix(".json").read_text())["spec"]["tokens"] == 4


def test_configs_fit():
    for arch, tokens, K, V, heads in itertools.product(
        archs.ARCHS.values(), (1, 2, 4, 8, 16), (16, 64, 96, 192, 256), (*range(16, 257, 16), 512), (1, 64, 10**5)
    ):
        spec = replaced(tokens=tokens, K=K, V=V)
        config = choose(spec, arch, heads, arch.sm_count)
        config.check(spec, arch)
        assert config.sequential == (tokens == 1), "chosen by the number of tokens alone, as bits depend on it"
    with pytest.raises(UnsupportedSpecError, match="config: sequential of"):
        GatedDeltaRuleConfig(128, 4, sequential=1).check(BASE, archs.SM_90A)
    assert choose(BASE, archs.SM_90A, 512, 132) == GatedDeltaRuleConfig(128, 4)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("tokens", "most"), [(4, 3030), (8, 4300)])
def test_issue_slots_and_bytes(tokens, most, backend):
    """Verification of float32 states: two tokens' worth of what a sequential kernel would need, and each byte once."""
    call = arguments(Case(tokens=tokens, V=128, batch=2, pads=(), mode="verify", out=None))
    floor = 2 * 2 * 128 * 128 * 4
    with backend(checks=False, counters=True) as session, tuning.override(rows=128, warps=4):
        out, _ = cute_ssm.gated_delta_rule_mtp(**call)
    counters = session.launches[-1].counters.as_dict()
    assert counters["instructions"]["total"] / 4 <= most
    assert counters["tensors"]["initial_state"]["dram_read_bytes"] == floor
    assert counters["tensors"]["initial_state"]["l2_read_bytes"] == floor
    assert counters["tensors"]["output"]["l2_write_bytes"] == out.numel() * 2
    assert counters["smem_excess"] / counters["smem_wavefronts"] < 0.04

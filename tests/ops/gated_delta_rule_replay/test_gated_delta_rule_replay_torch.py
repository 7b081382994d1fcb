"""`gated_delta_rule_replay` as an operator of PyTorch, the memory of plans, and what its kernels cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from bits import equal, same_memory
from memory import copy
from plan_doubles import Recorder, last_key
from replay_cases import RINGS, Case, arguments
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose
from cute_ssm.ops._gated_delta.spec import window_bucket
from cute_ssm.ops.gated_delta_rule_replay import operator as module
from cute_ssm.ops.gated_delta_rule_replay.spec import GatedDeltaRuleReplaySpec

NAMES = (
    "q", "k", "v", "initial_state", "initial_state_indices", *RINGS, "ring_start", "prev_num_accepted_tokens", "A_log",
    "a", "dt_bias", "b", "scale", "output", "use_qk_l2norm", "window",
)  # fmt: skip


def test_opcheck():
    call = arguments(Case(K=64, scale=0.1))
    for name in ("initial_state", "output", *RINGS):  # opcheck compares with ==
        call[name].nan_to_num_(0.0)
    torch.library.opcheck(module._REGISTERED.overload, (*(call[name] for name in NAMES), False))


@pytest.mark.parametrize("out", [None, "f32"])
def test_compiles_to_one_graph(out):
    call = arguments(Case(out=out, K=64))
    eager = copy(call)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tensors):
        return cute_ssm.gated_delta_rule_replay(**tensors)[0] + 1

    got = step(call)
    wanted = cute_ssm.gated_delta_rule_replay(**eager)[0] + 1
    equal(torch.nan_to_num(got), torch.nan_to_num(wanted))
    for name in ("initial_state", *RINGS):
        same_memory(call[name], eager[name], name)


def test_fake_tensors_have_the_result_of_shapes_alone():
    call = arguments(Case(out=None))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        out, _ = cute_ssm.gated_delta_rule_replay(**fake)
    assert (out.shape, out.dtype) == (call["v"].shape, call["q"].dtype)


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.setattr(module._path, "plans", {})


def key_of(call):
    """The key under which a call's plan would be kept."""
    return last_key(module, lambda: cute_ssm.gated_delta_rule_replay(**call))


def test_steady_state_is_one_look_up_and_one_call(plans):
    kernel = Recorder()
    module._path.plans = type("Any", (dict,), {"get": lambda self, key, default=None: (kernel, ())})()
    call = arguments(Case(scale=0.5))
    out, pool = cute_ssm.gated_delta_rule_replay(**call)
    assert out is call["output"]
    assert pool is call["initial_state"]
    (got,) = kernel.calls
    order = (*NAMES[:15], "output", "scale", "window")
    assert len(got) == len(order)
    for name, value in zip(order, got):
        assert value is call[name], name


def test_a_refusing_kernel_leads_to_the_full_check(plans):
    call, twin = arguments(Case()), arguments(Case())
    key = key_of(copy(call))
    assert key is not None
    refusing = (Recorder(refuse=True), ())
    module._path.plans = type("Any", (dict,), {"get": lambda self, key, default=None: refusing})()
    cute_ssm.gated_delta_rule_replay(**call)
    module._path.plans = {}
    cute_ssm.gated_delta_rule_replay(**twin)
    for name in ("initial_state", *RINGS):
        same_memory(call[name], twin[name], name)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 5}, {"tokens": 5}, {"heads": 2}, {"ratio": 1}, {"K": 64}, {"V": 128}, {"state": "bf16"},
        {"io": "f16"}, {"out": "bf16"}, {"out": None}, {"gate": "f32"}, {"bias": "bf16"}, {"spare": 4},
        {"indices": torch.int64}, {"l2norm": False}, {"strided": True}, {"window": 15, "spare": 4, "pending": (3,)},
    ],
    ids=str,
)  # fmt: skip
def test_every_factor_is_in_the_key_of_plans(change, plans):
    assert key_of(arguments(Case(**change))) != key_of(arguments(Case()))


# ------------------------------------------------------------------------------------------------------------- kernels
BASE = GatedDeltaRuleReplaySpec(
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
    zero_padding=False,
    vector_output=True,
    window=16,
)


def replaced(**fields):
    return GatedDeltaRuleReplaySpec(**{**BASE.__dict__, **fields})


SPECS = {
    "4": BASE,
    "8": replaced(tokens=8),
    "8-bf16": replaced(tokens=8, state_dtype="bfloat16"),
    "16-direct": replaced(tokens=16, window=64, state_dtype="float16", output_dtype="float32", vector_output=False),
    "16-256": replaced(tokens=16, window=64, K=256, V=256),
}


def check_spills(spec, target, most=0):
    compiled = runtime.emulated(spec, choose(spec, target, 16384, target.sm_count), target)
    assert compiled.kernels, "what the compiler says of spills cannot be read"
    for kernel in compiled.kernels:
        assert kernel.spill_bytes <= most, (spec, kernel)
    assert f".target {target.name}" in compiled.ptx


SIZES = [*itertools.product((64, 128, 256), (64, 256)), (96, 192), (160, 48), (192, 192), (224, 240), (256, 512)]


@pytest.mark.thin(10)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", SPECS)
def test_no_spills(name, arch):
    check_spills(SPECS[name], archs.by_name(arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("K", "V"), SIZES)
@pytest.mark.parametrize("tokens", [4, 8, 16])
def test_no_spills_in_any_size(tokens, K, V, arch):
    """But where a tile takes half of all registers: there ptxas for sm_100a computes addresses long before their use,
    and stores up to 12 of them."""
    most = 48 if (arch, tokens, K) == ("sm_100a", 16, 256) else 0
    for state, window, output in (
        ("float32", 16, "bfloat16"),
        ("bfloat16", 64, "bfloat16"),
        ("float32", 16, "float32"),
    ):
        types = {"state_dtype": state, "output_dtype": output, "vector_output": output == "bfloat16"}
        spec = replaced(tokens=tokens, K=K, V=V, window=window, **types)
        check_spills(spec, archs.by_name(arch), most)


def test_configs_fit():
    for arch, tokens, window, K, V, heads in itertools.product(
        archs.ARCHS.values(), (4, 16), (8, 64), (16, 64, 96, 192, 256), (*range(16, 257, 16), 512), (1, 64, 10**5)
    ):
        spec = replaced(tokens=tokens, K=K, V=V, window=window)
        spec.check()
        config = choose(spec, arch, heads, arch.sm_count)
        config.check(spec, arch)
        space = config.space(spec, arch)
        assert {name for name, values in space.items() if getattr(config, name) in values} == set(config.FREE)
    assert choose(BASE, archs.SM_90A, 512, 132) == GatedDeltaRuleConfig(128, 4)


def test_windows_share_kernels():
    assert [window_bucket(window) for window in (1, 8, 9, 16, 17, 33, 64)] == [8, 8, 16, 16, 32, 64, 64]
    with pytest.raises(UnsupportedSpecError, match="window: expected one of"):
        replaced(window=20).check()

"""`serving.materialize_gated_delta`: against token-by-token float64 on reference and emulator, and through pools."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import replay_cases
import torch
from bits import each_same_bits, same_bits, same_memory
from gdn_cases import NAN
from kernel_backends import both
from materialize_gated_cases import BASE, FEW, MANY, SPEC, TAKEN, Case, arguments, fitted, verify
from memory import copy, storage
from pool_runs import LAYERS, Run, gated, memory, started

import cute_ssm
from cute_ssm import arch as archs
from cute_ssm import runtime, serving, tuning, workloads
from cute_ssm.errors import GradientError
from cute_ssm.ops._gated_delta.config import GatedDeltaRuleConfig, choose_untuned
from cute_ssm.ops.materialize_gated_delta.spec import MaterializeGatedDeltaSpec
from cute_ssm.workloads.plan import around


@pytest.mark.parametrize("case", [*FEW, *map(fitted, MANY)], ids=str)
def test_reference(case):
    verify(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "case", [*FEW, *(pytest.param(fitted(case), marks=pytest.mark.slow) for case in MANY)], ids=str
)
def test_emulated(case, backend):
    with backend(async_mode="late") as session:
        verify(case)
    assert len(session.launches) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW, ids=str)
def test_emulated_for_blackwell(case, backend):
    with backend("sm_100a"):
        verify(case)


@pytest.mark.wide
def test_bits_are_those_of_a_step_that_flushes_whatever_the_config_and_the_order(backend):
    """The state that `gated_delta_rule_replay` stores, from the same slots."""
    case = Case(pending=(16, 14, 15), batch=3, pads=(), counts=None, V=128)
    made = replay_cases.arguments(case)
    step = copy(made)
    with backend():
        cute_ssm.gated_delta_rule_replay(**step)
        slots = made["initial_state_indices"]
        call = {name: made[name] for name in TAKEN} | {"state_batch_indices": slots}
        one, other = (torch.full_like(made["initial_state"], NAN) for _ in range(2))
        serving.materialize_gated_delta(**call, dst_state_batch_indices=slots, out=one)
        call["state_batch_indices"] = slots.flip(0)
        with tuning.override(rows=16, warps=1):
            serving.materialize_gated_delta(**call, dst_state_batch_indices=slots.flip(0), out=other)
    for slot in slots.tolist():
        same_bits(one[slot], step["initial_state"][slot])
        same_bits(one[slot], other[slot])


SIZES = [
    dataclasses.replace(SPEC, K=K, V=V, window=window, state_dtype=state, out_dtype=out)
    for K, V in ((64, 64), (128, 128), (256, 64), (256, 256))
    for window in (16, 64)
    for state, out in (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
]
SPILLS = [
    (SPEC, "sm_90a"),
    (dataclasses.replace(SPEC, K=256, V=256, window=64, out_dtype="bfloat16"), "sm_100a"),
    *(pytest.param(spec, arch, marks=pytest.mark.slow) for spec in SIZES for arch in ("sm_90a", "sm_100a")),
]


@pytest.mark.thin(2)
@pytest.mark.parametrize(("spec", "arch"), SPILLS, ids=str)
def test_nothing_spills(spec, arch):
    target = archs.by_name(arch)
    compiled = runtime.emulated(spec, choose_untuned(spec, 16384, target.sm_count), target)
    assert compiled.kernels and all(kernel.spill_bytes == 0 for kernel in compiled.kernels)


def test_configs_fit_the_steps_and_the_target():
    for K, V, window in ((64, 64, 8), (256, 256, 64), (128, 256, 32)):
        spec = dataclasses.replace(SPEC, K=K, V=V, window=window)
        spec.check()
        for target in archs.ARCHS.values():
            for units in (1, 10**5):
                config = choose_untuned(spec, units, target.sm_count)
                assert isinstance(config, GatedDeltaRuleConfig) and not config.sequential
                config.check(spec, target)


# -------------------------------------------------------------------------------------------------------- bad arguments
def changed(name, change):
    return lambda call: call.__setitem__(name, change(call[name]))


BAD = {
    "initial_state: expected shape": changed("initial_state", lambda t: t[0]),
    "initial_state: expected dtype": changed("initial_state", lambda t: t.double()),
    "initial_state: expected stride 1": changed("initial_state", lambda t: t.mT.contiguous().mT),
    "initial_state: expected value_heads": lambda call: call.update(
        {name: call[name][:, :1] for name in ("initial_state", "v_cache", "g_cache", "beta_cache")},
        k_cache=call["k_cache"].repeat(1, 2, 1, 1),
    ),
    "k_cache: expected a torch.Tensor": changed("k_cache", lambda t: None),
    "k_cache: expected shape": changed("k_cache", lambda t: t[..., :32]),
    "k_cache: expected dtype": changed("k_cache", lambda t: t.float()),
    "v_cache: expected shape": changed("v_cache", lambda t: t[:, :1]),
    "v_cache: expected dtype": changed("v_cache", lambda t: t.half()),
    "v_cache: expected an address": changed(
        "v_cache", lambda t: torch.zeros(t.numel() + 1).bfloat16()[1:].view(t.shape)
    ),
    "g_cache: expected dtype": changed("g_cache", lambda t: t.half()),
    "beta_cache: expected shape": changed("beta_cache", lambda t: t[:, :, 1:]),
    "ring_start: expected dtype": changed("ring_start", lambda t: t.long()),
    "ring_start: expected values from 0 to 22": changed("ring_start", lambda t: t + 23),
    "prev_num_accepted_tokens: expected values from 0 to 16": changed("prev_num_accepted_tokens", lambda t: t + 17),
    "state_batch_indices: expected shape": changed("state_batch_indices", lambda t: t[:, None]),
    "state_batch_indices: expected indices in": changed("state_batch_indices", lambda t: t + 99),
    "dst_state_batch_indices: expected shape": changed("dst_state_batch_indices", lambda t: t[:3]),
    "dst_state_batch_indices: expected dtype": changed("dst_state_batch_indices", lambda t: t.float()),
    "dst_state_batch_indices: expected distinct": changed("dst_state_batch_indices", lambda t: t * 0 + t[0]),
    "dst_state_batch_indices: expected slots that no other": lambda call: call.update(
        dst_state_batch_indices=call["state_batch_indices"].flip(0)
    ),
    "num_tokens: expected 0 to": changed("num_tokens", lambda t: t + 17),
    "num_tokens: expected dtype": changed("num_tokens", lambda t: t.float()),
    "out: expected shape": lambda call: call.update(out=torch.zeros(3, 2, 64, 32)),
    "out: expected elements": lambda call: call.update(out=torch.zeros(1, 2, 64, 64).expand(9, -1, -1, -1)),
    "out: expected dtype": lambda call: call.update(out=call["initial_state"].to(torch.int8)),
    "window: expected an int": changed("window", float),
    "window: expected 1 to 64": changed("window", lambda _: 65),
    "window: expected at most 23": changed("window", lambda _: 24),
    "K: expected": lambda call: call.update({n: call[n][..., :24] for n in ("initial_state", "k_cache")}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    call = arguments(BASE)
    BAD[message](call)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    with pytest.raises((ValueError, TypeError)) as caught:
        serving.materialize_gated_delta(**call)
    assert message in str(caught.value)
    each_same_bits(call, before)


def test_an_empty_batch_and_gradients(backend):
    call = arguments(BASE)
    with pytest.raises(GradientError, match=r"^initial_state: "):
        serving.materialize_gated_delta(**{**call, "initial_state": call["initial_state"].clone().requires_grad_()})
    for name in ("state_batch_indices", "dst_state_batch_indices", "num_tokens"):
        call[name] = call[name][:0]
    state = call["initial_state"].clone()
    for context in (contextlib.nullcontext(), backend()):
        with context:
            serving.materialize_gated_delta(**call)
    same_bits(storage(call["initial_state"]).clone(), storage(call["initial_state"]))
    same_bits(call["initial_state"].nan_to_num(), state.nan_to_num())


def test_registered_with_pytorch():
    call, eager = arguments(BASE), arguments(BASE)
    fixed = {name: call.pop(name) for name in ("window", "use_qk_l2norm")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(call):
        return serving.materialize_gated_delta(**call, **fixed)

    step(call)
    serving.materialize_gated_delta(**eager)
    same_memory(call["initial_state"], eager["initial_state"])


def test_what_engines_run_around_the_steps_is_warmed_up():
    declared = workloads.of_model("qwen3-next", (1,))
    kinds = {
        spec.count_dtype
        for workload in declared
        if workload.op == "gated_delta_rule_replay"
        for spec, _, _ in around(workload, archs.SM_90A)
        if isinstance(spec, MaterializeGatedDeltaSpec)
    }
    assert kinds == {None, "int32"}


# --------------------------------------------------------------------------------------------------------------- pools
@pytest.mark.parametrize("count", [None, 1])
def test_pools_of_gated_delta_nets_materialize_into_slots_and_other_pools_alike(count):
    pool, run = started(gated)
    source = run.slots[:2]
    assert pool.prev_num_accepted_tokens[source].min() >= 1
    options = {} if count is None else {"num_tokens": torch.tensor([count, count])}
    other = serving.StatePool.gated_delta(
        LAYERS, 7, heads=1, value_heads=2, K=64, V=64, window=16, tokens=3, conv_shape=(3, 4), conv_dtype=torch.float32
    )
    assert sorted(other.allocate() for _ in range(7)) == list(range(7))
    for tensor in other._tensors().values():
        tensor.fill_(3)
    frozen, rest = memory(pool.to(copy=True)), [0, 1, 2, 4, 6, 7]
    pool.materialize(None, source, torch.tensor([5, 3]), destination_pool=other, **options)
    each_same_bits(frozen, memory(pool), "the source changed")
    for name, tensor in other._tensors().items():
        assert (tensor if name.startswith("history") else tensor[:, rest]).eq(3).all(), name
    here = torch.tensor([pool.allocate(), pool.allocate()])
    pool.materialize(None, source, here, **options)
    same_bits(other.state[:, [5, 3]], pool.state[:, here])
    assert not other._cursors[:, [5, 3]].any()
    same_bits(other.conv_state[:, [5, 3]], pool.conv_state[:, here])
    assert other.conv_state[:, 5].any() == (count is None)
    with pytest.raises(ValueError, match="A: expected None for gated delta nets"):
        pool.materialize([torch.zeros(1)] * LAYERS, source, here)


@both
def test_a_sequence_goes_on_from_a_materialized_state_as_from_its_own(backend):
    """Where the pending tokens fill their chunks, and states are float32, bit for bit, in another pool."""
    with backend():
        pool, other = gated(window=16), gated(window=16)
        slots = [pool.allocate(), pool.allocate()]
        run = Run(pool, slots)
        accept(run, [3, 3, 2])  # 8 pending tokens
        assert pool.prev_num_accepted_tokens[run.slots[:2]].tolist() == [8, 8]
        there = [other.allocate(), other.allocate()][::-1]
        pool.materialize(None, run.slots[:2], torch.tensor(there), destination_pool=other)
        twin = Run(other, there)
        outputs, others = accept(run, [1, 3, 3], first=3), accept(twin, [1, 3, 3], first=3)
    each_same_bits(outputs, others)
    assert outputs[-1].float().any() and other.prev_num_accepted_tokens[twin.slots[:2]].tolist() == [7, 7]


def accept(run, counts, first=0):
    """Steps that keep so many tokens of every row; their outputs."""
    outputs = []
    for number, count in enumerate(counts, first):
        g = torch.Generator().manual_seed(number)
        outputs += [run.layer(layer, g) for layer in range(LAYERS)]
        run.pool.commit(run.slots, torch.full((3,), count))
    return outputs

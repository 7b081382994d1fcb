"""What holds of every choice of a config: bits do not depend on the work, and shared memory is what is said."""

from __future__ import annotations

import dataclasses
import itertools
import math

import checkpointing_cases
import gdn_cases
import pytest
import replay_cases
import scan_cases
import step_cases
import token_cases

import cute_ssm
import ptxsim
from cute_ssm import arch, runtime, tuning, workloads
from cute_ssm.ops import operators
from cute_ssm.ops._gated_delta import config as gated_delta_rule
from cute_ssm.ops.checkpointing_ssu import config as checkpointing_ssu
from cute_ssm.ops.selective_scan import config as selective_scan
from cute_ssm.ops.selective_state_update import config as selective_step
from cute_ssm.tuning import tables

HEADS = (1, 2, 7, 64, 131, 132, 133, 529, 1000, 4096, 100000)
SM_COUNTS = (1, 16, 78, 132, 148)


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    """The rules alone: a row of a table may set free fields only, which its own tests see to."""
    monkeypatch.setattr(tables, "rows", tuple)
    tables._nearest.cache_clear()
    yield
    tables._nearest.cache_clear()


def bits(config, free):
    """The fields of a config that results may depend on."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in free}


def step_specs():
    """Specs of which products by tensor core compute some, in each form of tokens."""
    base = {
        "state_dtype": "bfloat16", "input_dtype": "bfloat16", "A_dtype": "float32", "dt_dtype": "float32",
        "D_dtype": None, "dt_bias_dtype": None, "dim": 64, "dstate": 128, "A_tied": True, "dt_tied": True,
        "D_tied": True, "has_z": False, "dt_softplus": True, "src_dtype": "int32", "dst_dtype": None,
        "update_state": True, "zero_padding": False, "vector_inputs": True,
    }  # fmt: skip
    changes = (
        {}, {"state_dtype": "float32"}, {"state_dtype": "int8"}, {"state_dtype": "float16", "philox_rounds": 10},
        {"A_tied": False, "dt_tied": False}, {"dim": 80}, {"dim": 128, "dstate": 256}, {"dstate": 16}, {"dstate": 100},
    )  # fmt: skip
    for change, tokens in itertools.product(changes, ("one", "batched", "packed")):
        spec = cute_ssm.spec.SelectiveStateUpdateSpec(**{**base, **change, "tokens": tokens})
        try:
            spec.check()
        except cute_ssm.errors.UnsupportedSpecError:
            continue
        yield spec


@pytest.mark.parametrize("target", arch.ARCHS.values(), ids=lambda target: target.name)
def test_the_form_of_a_step_depends_only_on_the_spec_and_the_bound_of_tokens(target):
    forms = set()
    for spec in step_specs():
        for few, bounds in {True: (2, 5, 8), False: (1, 9, 16) if spec.tokens != "one" else (1,)}.items():
            if few and spec.tokens == "one":
                continue
            found = [
                bits(selective_step.choose(spec, target, *work, tokens), selective_step.SelectiveStepConfig.FREE)
                for work in itertools.product(HEADS, SM_COUNTS)
                for tokens in bounds
            ]
            assert all(one == found[0] for one in found), (spec, found)
            assert found[0].keys() == {"lanes", "matmul"}
            forms.add(tuple(found[0].values()))
    assert {matmul for _, matmul in forms} == {0, 1} and len({lanes for lanes, _ in forms}) > 1


@pytest.mark.parametrize("op", ["checkpointing_ssu", "gated_delta_rule_mtp", "gated_delta_rule_replay"])
def test_bits_of_other_operators_depend_on_the_spec_alone(op):
    """Of every declared call, at any batch and on GPUs of any size."""
    module = checkpointing_ssu if op == "checkpointing_ssu" else gated_delta_rule
    specs = {}
    for workload in workloads.of_operator(op, None):
        for keys in workload.calls():
            with runtime.planned(arch.SM_90A) as plan:
                workloads.build(op, keys, fill=False).run()
            specs |= {spec: None for spec, _, _ in plan.kernels}
    for spec, target in itertools.product(specs, arch.ARCHS.values()):
        found = []
        for work, sm_count in itertools.product((1, 3, 64, 1000), SM_COUNTS):
            found.append(bits(config := module.choose(spec, target, work, sm_count), config.FREE))
        assert all(one == found[0] for one in found), (spec, found)


def test_of_a_scan_only_the_number_of_parts_depends_on_the_work():
    spec = dataclasses.replace(scan_spec(), dstate=16)
    found = [
        bits(config := selective_scan.choose(spec, arch.SM_90A, channels, 64, length, sm_count), config.FREE)
        for channels, length, sm_count in itertools.product((64, 1024, 65536), (1, 200, 4096, 65536), SM_COUNTS)
    ]
    assert all(one.keys() == {"splits"} for one in found)
    assert len({one["splits"] for one in found}) > 1, "this exception is documented"


def scan_spec():
    with runtime.planned(arch.SM_90A) as plan:
        cute_ssm.selective_scan(**scan_cases.arguments(scan_cases.Case(in_place=False)))
    ((spec, _, _),) = plan.kernels
    return spec


@pytest.mark.parametrize("operator", [op for op in operators() if op.workload], ids=lambda operator: operator.name)
def test_free_fields_are_fields_of_the_config_and_the_space_is_of_them(operator):
    config = operator.config_class
    assert config.FREE and set(config.FREE) <= {field.name for field in dataclasses.fields(config)}
    assert set(config.KEY) <= {field.name for field in dataclasses.fields(operator.spec_class)}
    if config is selective_scan.SelectiveScanConfig:
        assert set(config.space(scan_spec(), arch.SM_90A)) <= set(config.FREE)


def test_a_persistent_grid_never_waits_for_room():
    """`fits` refuses more CTAs of a grid than an SM holds at once, and the rule never chooses so many."""
    for spec, target, heads in itertools.product(step_specs(), arch.ARCHS.values(), HEADS):
        config = selective_step.choose(spec, target, heads, target.sm_count, 4 if spec.tokens != "one" else 1)
        assert config.fits(spec, target), (spec, config)
        resident = target.shared_bytes // (config.shared_bytes(spec) + selective_step.CTA_BYTES)
        over = dataclasses.replace(config, stages=selective_step.PIPELINE_STAGES, ctas_per_sm=resident + 1)
        more = target.shared_bytes // (over.shared_bytes(spec) + selective_step.CTA_BYTES)
        assert not dataclasses.replace(over, ctas_per_sm=more + 1).fits(spec, target)
        if more:
            assert dataclasses.replace(over, ctas_per_sm=more).fits(spec, target)


# ------------------------------------------------------------------------------------------------------- shared memory
STEP, SCAN = cute_ssm.selective_state_update, cute_ssm.selective_scan
CALLS = {
    "step": (STEP, step_cases, step_cases.Case(), {}),
    "step, rings": (STEP, step_cases, step_cases.Case(), {"stages": 3, "warps": 2, "rows": 16}),
    "tokens": (STEP, token_cases, token_cases.Tokens(), {}),
    "tokens, rings": (STEP, token_cases, token_cases.Tokens(), {"stages": 3, "warps": 3, "rows": 16}),
    "checkpoint": (cute_ssm.checkpointing_ssu, checkpointing_cases, checkpointing_cases.Case(), {}),
    "checkpoint, pair": (
        *(cute_ssm.checkpointing_ssu, checkpointing_cases, checkpointing_cases.Case(items=True)),
        {"form": 2, "unit_stages": 2, "depth": 2},
    ),
    "scan": (SCAN, scan_cases, scan_cases.Case(in_place=False), {}),
    "gated delta": (cute_ssm.gated_delta_rule_mtp, gdn_cases, gdn_cases.Case(), {}),
    "replay": (cute_ssm.gated_delta_rule_replay, replay_cases, replay_cases.Case(), {}),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", CALLS)
def test_shared_memory_is_what_the_launch_allocates(name, monkeypatch):
    """To the byte, but for the slack that aligns a ring of tensor-map copies: choices count on it."""
    function, cases, case, fields = CALLS[name]
    asked = []
    real = runtime.emulated

    def spy(spec, config=None, target=None):
        asked.append((spec, config))
        return real(spec, config, target)

    monkeypatch.setattr(runtime, "emulated", spy)
    with ptxsim.emulate(arch="sm_90a") as session, tuning.override(**fields):
        function(**cases.arguments(case))
    ((spec, config),) = asked
    if isinstance(config, checkpointing_ssu.CheckpointingSSUConfig):
        said = [launch.shared_bytes(spec) - checkpointing_ssu.ALIGNMENT for launch in config.launch_configs]
    else:
        said = [config.shared_bytes(spec)]
    assert [launch.dynamic_smem for launch in session.launches] == said
    assert math.prod(fields.values() or [1]) and all(getattr(config, key) == value for key, value in fields.items())

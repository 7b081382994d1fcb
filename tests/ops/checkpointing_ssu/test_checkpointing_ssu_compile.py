"""The kernels of `checkpointing_ssu` compile for every target without spilling, and their configs fit the machine."""

from __future__ import annotations

import dataclasses

import pytest

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.errors import UnsupportedSpecError
from cute_ssm.ops.checkpointing_ssu.config import CTA_RESERVED, FLIGHT, PAIR, SM_SHARED, choose
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec

BASE = CheckpointingSSUSpec(
    state_dtype="float16",
    input_dtype="bfloat16",
    A_dtype="float32",
    dt_dtype="bfloat16",
    D_dtype="float32",
    dt_bias_dtype="float32",
    heads=16,
    groups=1,
    dim=64,
    dstate=128,
    tokens=6,
    window=16,
    history="double",
    has_z=True,
    dt_softplus=True,
    src_dtype="int32",
)
CHANGES = {
    "base": {},
    "i8-random": {"state_dtype": "int8", "philox_rounds": 10},
    "pair": {"work_items": True},
    "bf16": {"state_dtype": "bfloat16"},
    "f32": {"state_dtype": "float32"},
    "i8": {"state_dtype": "int8"},
    "f8": {"state_dtype": "float8_e4m3fn"},
    "i16": {"state_dtype": "int16"},
    "random": {"philox_rounds": 10},
    "f8-random": {"state_dtype": "float8_e4m3fn", "philox_rounds": 10},
    "ring": {"history": "ring"},
    "packed": {"cu_dtype": "int32"},
    "inputs-f16": {"input_dtype": "float16"},
    "inputs-f16-bf16": {"input_dtype": "float16", "state_dtype": "bfloat16"},
    "inputs-f16-f32": {"input_dtype": "float16", "state_dtype": "float32"},
    "inputs-f16-i8": {"input_dtype": "float16", "state_dtype": "int8"},
    "12-tokens": {"tokens": 12},
    "window-32": {"window": 32},
    "64-of-64": {"tokens": 64, "window": 64},
    "dim-80": {"dim": 80},
    "dim-128": {"dim": 128},
    "dstate-64-i8": {"dstate": 64, "state_dtype": "int8"},
    "dstate-96": {"dstate": 96},
    "dstate-256": {"dstate": 256},
    "dstate-256-f32": {"dstate": 256, "state_dtype": "float32"},
    "dstate-256-i8": {"dstate": 256, "state_dtype": "int8"},
    "largest": {"dim": 128, "dstate": 256, "state_dtype": "float32"},
    "8-groups": {"heads": 112, "groups": 8},
}
SPECS = {name: dataclasses.replace(BASE, **changes) for name, changes in CHANGES.items()}
ALWAYS = [("base", "sm_90a", 64), ("i8-random", "sm_90a", 1024), ("pair", "sm_90a", 1024), ("base", "sm_100a", 1024)]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "arch", "batch"),
    [
        pytest.param(name, arch, batch, marks=() if (name, arch, batch) in ALWAYS else pytest.mark.slow)
        for name in SPECS
        for arch in archs.ARCHS
        for batch in (1, 64, 1024)
    ],
)
def test_no_spills(name, arch, batch):
    target = archs.by_name(arch)
    config = choose(SPECS[name], target, batch, target.sm_count)
    compiled = runtime.emulated(SPECS[name], config, target)
    assert len(compiled.kernels) == len(config.launch_configs)
    for kernel, launch in zip(compiled.kernels, config.launch_configs):
        assert kernel.spill_bytes == 0, kernel
        assert kernel.registers * launch.threads * launch.ctas_per_sm <= 65536, kernel


@pytest.mark.parametrize("name", SPECS)
def test_configs_fit_the_machine(name):
    """Resident CTAs fit shared memory; where there is work for all, enough of the states is on its way."""
    spec = SPECS[name]
    for target in archs.ARCHS.values():
        for batch in (1, 7, 64, 500, 4096):
            config = choose(spec, target, batch, target.sm_count)
            config.check(spec, target)
            for launch in config.launch_configs:
                assert launch.ctas_per_sm * (launch.shared_bytes(spec) + CTA_RESERVED) <= SM_SHARED
        launch = config.launch_configs[0]
        in_flight = launch.ctas_per_sm * launch.consumers * launch.depth * launch.layout(spec).tile_bytes
        assert in_flight >= min(FLIGHT, launch.ctas_per_sm * launch.tiles * launch.layout(spec).tile_bytes)


def test_every_head_has_a_cta_where_there_is_little_work():
    for target in archs.ARCHS.values():
        config = choose(BASE, target, 1, target.sm_count)
        assert config.tiles == config.d_split


def test_two_launches_need_a_list_of_work():
    target = archs.by_name("sm_90a")
    config = choose(SPECS["pair"], target, 4096, target.sm_count)
    assert config.form == PAIR
    with pytest.raises(UnsupportedSpecError, match="work_items"):
        config.check(BASE, target)

"""The kernel of the scan compiles for every target without spilling registers, whatever the config."""

from __future__ import annotations

import dataclasses

import pytest

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.arch import WARP
from cute_ssm.ops.selective_scan import config as tuning
from cute_ssm.ops.selective_scan.spec import SelectiveScanSpec

BASE = SelectiveScanSpec(
    input_dtype="bfloat16",
    state_dtype="float32",
    dstate=16,
    has_D=True,
    has_z=True,
    has_bias=True,
    delta_softplus=True,
    query_dtype=None,
    cache_dtype="int32",
    has_initial=True,
    blocks=False,
    chunks=False,
    ungated=False,
    aligned=True,
    aligned_states=True,
)
PREFIX = {"query_dtype": "int32", "blocks": True, "chunks": True, "ungated": True}
SPECS = {
    "base": BASE,
    "f32": dataclasses.replace(BASE, input_dtype="float32"),
    "f16": dataclasses.replace(BASE, input_dtype="float16", state_dtype="float16", ungated=True),
    "prefix": dataclasses.replace(BASE, **PREFIX),
    "odd": dataclasses.replace(BASE, aligned=False, aligned_states=False, ungated=True),
    "states-1": dataclasses.replace(BASE, dstate=1, aligned_states=False),
    "states-32": dataclasses.replace(BASE, dstate=32),
    "states-64": dataclasses.replace(BASE, dstate=64),
    "states-128": dataclasses.replace(BASE, dstate=128),
    "states-256": dataclasses.replace(BASE, dstate=256, input_dtype="float32"),
    "states-256-odd": dataclasses.replace(BASE, dstate=256, aligned=False, aligned_states=False, **PREFIX),
}


# (sequence, channel) pairs and tokens of a sequence: few, few in parts, parts with the fewest lanes, many
WORK = [(4096, 1), (512, 2048), (1536, 8192), (1 << 20, 1)]


def resources(spec, work, arch):
    target = archs.by_name(arch)
    channels, length = work
    config = tuning.choose(spec, target, channels, 4096, length, target.sm_count)
    compiled = runtime.emulated(spec, config, target)
    assert len(compiled.kernels) == (1 if config.splits == 1 else 2)
    assert config.splits > 1 if work == WORK[1] else length > 1 or config.splits == 1
    return config, compiled.kernels


@pytest.mark.thin(48, "arch")
@pytest.mark.parametrize(
    ("name", "work", "arch"),
    [
        pytest.param(
            *(name, WORK[w], arch),
            marks=() if name == "base" or w == 2 + (i + a) % 2 else pytest.mark.slow,  # the last two by turns
        )
        for i, name in enumerate(SPECS)
        for w in range(len(WORK))
        for a, arch in enumerate(("sm_90a", "sm_100a"))
    ],
    ids=str,
)
def test_no_spills_and_the_resident_ctas_fit(name, arch, work):
    config, kernels = resources(SPECS[name], work, arch)
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        registers = -(-kernel.registers // 8) * 8
        assert config.ctas_per_sm * config.warps * WARP * registers <= 65536


@pytest.mark.thin(6)
@pytest.mark.parametrize("work", WORK[1:], ids=str)
@pytest.mark.parametrize("name", ["base", "prefix"])
def test_sm_103a(name, work):
    _, kernels = resources(SPECS[name], work, "sm_103a")
    assert all(kernel.spill_bytes == 0 for kernel in kernels)

"""Every kernel compiles for every target without spilling registers, in the emulator's form and in the GPU's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cute_ssm import arch as archs
from cute_ssm import runtime
from cute_ssm.ops.selective_state_update.config import bank_conflicts, choose, lanes_of
from cute_ssm.ops.selective_state_update.spec import SelectiveStateUpdateSpec

BASE = SelectiveStateUpdateSpec(
    state_dtype="float16",
    input_dtype="bfloat16",
    A_dtype="float32",
    dt_dtype="float32",
    D_dtype="float32",
    dt_bias_dtype="float32",
    dim=64,
    dstate=128,
    A_tied=True,
    dt_tied=True,
    D_tied=True,
    has_z=True,
    dt_softplus=True,
    src_dtype="int32",
    dst_dtype=None,
    update_state=True,
    zero_padding=False,
    vector_inputs=True,
)
DENSE = {"A_tied": False, "dt_tied": False, "D_tied": False}
SPECS = {
    "base": BASE,
    "f32": dataclasses.replace(BASE, state_dtype="float32", input_dtype="float32"),
    "bf16-80": dataclasses.replace(BASE, state_dtype="bfloat16", dim=80),
    "256": dataclasses.replace(BASE, dim=128, dstate=256, dst_dtype="int32"),
    "ragged": dataclasses.replace(BASE, dstate=100, vector_inputs=False, **DENSE),
    "mamba1": dataclasses.replace(BASE, state_dtype="float32", dim=4096, dstate=16, **DENSE),
}
BATCHED, PACKED = {"tokens": "batched"}, {"tokens": "packed", "cu_dtype": "int32"}
SAVED = {"intermediates": True, "intermediate_dtype": "int32"}
TABLES = {"accepted_dtype": "int32", "src_columns": True, "dst_dtype": "int32", "dst_columns": True}
MODES = {
    "batched": BATCHED,
    "batched-f32": {**BATCHED, "state_dtype": "float32"},
    "batched-dense": {**BATCHED, **DENSE},
    "batched-256": {**BATCHED, "dstate": 256, "dim": 128},
    "packed": PACKED,
    "packed-tables": {**PACKED, **TABLES},
    "tables": {**BATCHED, **TABLES},
    "saved": {**BATCHED, **SAVED},
    "saved-only": {**BATCHED, **SAVED, "update_state": False},
    "saved-packed": {**PACKED, **SAVED},
    **{name: {"state_dtype": dtype} for name, dtype in (("i8", "int8"), ("f8", "float8_e4m3fn"), ("i16", "int16"))},
    "i8-batched": {**BATCHED, "state_dtype": "int8"},
    "f8-batched": {**BATCHED, "state_dtype": "float8_e4m3fn"},
    "i8-saved": {**BATCHED, **SAVED, "state_dtype": "int8"},
    "i8-tables": {**BATCHED, **TABLES, "state_dtype": "int8"},
    "random-f16": {"philox_rounds": 10},
    "random-bf16": {"philox_rounds": 10, "state_dtype": "bfloat16"},
    "random-i8": {"philox_rounds": 10, "state_dtype": "int8"},
    "random-f8": {"philox_rounds": 10, "state_dtype": "float8_e4m3fn"},
    "random-batched": {**BATCHED, "philox_rounds": 10, "seed_per_slot": True},
    "random-saved": {**BATCHED, **SAVED, "philox_rounds": 10},
    "random-i8-saved": {**BATCHED, **SAVED, "philox_rounds": 10, "state_dtype": "int8"},
}
MODES = {name: dataclasses.replace(BASE, **changes) for name, changes in MODES.items()}
FEW, MANY = 16, 16384  # heads of a call: little work, and more than the GPU holds at once


def check_registers(compiled, config):
    """No spills; the CTAs of a persistent grid fit the 65536 registers of an SM together."""
    assert compiled.kernels
    for kernel in compiled.kernels:
        assert kernel.spill_bytes == 0, kernel
        if config.stages > 1:
            assert kernel.registers * 32 * config.warps * config.ctas_per_sm <= 65536, kernel


@pytest.mark.thin(9, "arch")
@pytest.mark.parametrize(
    ("name", "arch", "heads"),
    [
        pytest.param(name, arch, heads, marks=() if h == (i + a) % 2 else pytest.mark.slow)  # by turns
        for i, name in enumerate(SPECS)
        for a, arch in enumerate(archs.ARCHS)
        for h, heads in enumerate((FEW, MANY))
    ],
)
def test_no_spills(name, arch, heads):
    target = archs.by_name(arch)
    config = choose(SPECS[name], target, heads, target.sm_count)
    compiled = runtime.emulated(SPECS[name], config, target)
    check_registers(compiled, config)
    assert f".target {arch}" in compiled.ptx


@pytest.mark.thin(18, "arch")
@pytest.mark.parametrize(
    ("name", "arch", "heads"),
    [
        pytest.param(
            *(name, arch, heads),
            marks=() if (arch, heads) in (("sm_90a", FEW), ("sm_100a", MANY)) else pytest.mark.slow,
        )
        for name in MODES
        for arch in archs.ARCHS
        for heads in (FEW, MANY)
    ],
)
def test_no_spills_in_any_mode(name, arch, heads):
    target = archs.by_name(arch)
    config = choose(MODES[name], target, heads, target.sm_count)
    check_registers(runtime.emulated(MODES[name], config, target), config)


@pytest.mark.parametrize("arch", archs.ARCHS)
def test_bundle_entry_for_the_gpu(arch, tmp_path):
    target = archs.by_name(arch)
    path = runtime.compile_to(tmp_path, BASE, choose(BASE, target, MANY, target.sm_count), target)
    assert path.stat().st_size > 10_000
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["spec"]["state_dtype"] == "float16"


@pytest.mark.parametrize("name", [*SPECS, *MODES])
def test_shared_memory_holds_the_resident_ctas(name):
    """What the config promises to keep resident fits an SM, with the kilobyte that each CTA costs besides."""
    spec = {**SPECS, **MODES}[name]
    for target in archs.ARCHS.values():
        for heads in (1, FEW, 512, MANY):
            config = choose(spec, target, heads, target.sm_count)
            assert config.ctas_per_sm * (config.shared_bytes(spec) + 1024) <= target.shared_bytes + 1024
            config.check(spec, target)


def test_lanes_do_not_depend_on_the_amount_of_work():
    for spec in (*SPECS.values(), *MODES.values()):
        lanes = {
            choose(spec, arch, heads, arch.sm_count).lanes for arch in archs.ARCHS.values() for heads in (1, 64, 9999)
        }
        assert lanes == {lanes_of(spec)}


@pytest.mark.parametrize("dstate", [16, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_usual_shapes_have_no_bank_conflicts(dstate, state_dtype):
    for dim in (64, 80, 128):
        spec = dataclasses.replace(BASE, dstate=dstate, state_dtype=state_dtype, dim=dim)
        assert bank_conflicts(spec, lanes_of(spec)) == 0

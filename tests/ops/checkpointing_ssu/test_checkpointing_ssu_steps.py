"""Long runs of `checkpointing_ssu` with random acceptance: every slot fills its window and writes many times."""

from __future__ import annotations

import dataclasses

import pytest
from checkpointing_cases import verify_many
from checkpointing_runs import CONTRACTS, RUNS

import ptxsim
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.runtime.registry import KERNELS

kernel = pytest.mark.skipif(CheckpointingSSUSpec not in KERNELS, reason="no kernel is registered")
FEW = [
    CONTRACTS[0],
    dataclasses.replace(CONTRACTS[5], state="i8", decay="slow", items=True, rounds=10),
    dataclasses.replace(CONTRACTS[2], state="f32", io="f16", fill="garbage"),
]


@pytest.mark.thin(6, "state", "history")
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_reference(case):
    verify_many(case)


@pytest.mark.thin(3)
@kernel
@pytest.mark.parametrize("case", FEW, ids=str)
def test_kernel(case):
    with ptxsim.emulate(arch="sm_90a", racecheck=True, initcheck=True, shuffle_sync=False, async_mode="late"):
        verify_many(case, steps=16)


@kernel
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_kernel_in_long_runs(case, arch):
    with ptxsim.emulate(arch=arch, racecheck=True, initcheck=True, shuffle_sync=False, async_mode="late"):
        verify_many(case)

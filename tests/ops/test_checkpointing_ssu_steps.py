"""Long runs of `checkpointing_ssu` with random acceptance: every slot fills its window and writes many times."""

from __future__ import annotations

import dataclasses

import pytest
from checkpointing_cases import Case, verify_many

import ptxsim
from cute_ssm.ops.checkpointing_ssu.spec import CheckpointingSSUSpec
from cute_ssm.runtime.registry import KERNELS

kernel = pytest.mark.skipif(CheckpointingSSUSpec not in KERNELS, reason="no kernel is registered")
STATES = ("f32", "bf16", "f16", "i16", "i8", "f8")
CONTRACTS = [
    Case(history=history, lengths=(4,) * 3 if packed else None)
    for history in ("double", "double_x", "ring")
    for packed in (False, True)
]
RUNS = [
    *(dataclasses.replace(case, state=state) for case in CONTRACTS for state in STATES),
    *(
        dataclasses.replace(case, decay=decay, state=state)
        for case in (CONTRACTS[0], CONTRACTS[5])
        for decay in ("slow", "fast")
        for state in ("f32", "f16", "i8")
    ),
    *(dataclasses.replace(case, fill="garbage", strided=True, io="f16") for case in CONTRACTS),
    *(dataclasses.replace(case, items=True, seed_per_slot=True, rounds=10, state="i8") for case in CONTRACTS),
    *(
        Case(tokens=tokens, window=window, history=history, indices=None, pads=())
        for tokens, window in ((1, 5), (6, 6), (9, 4), (8, 24))
        for history in ("double", "double_x", "ring")
    ),
]
FEW = [
    CONTRACTS[0],
    dataclasses.replace(CONTRACTS[5], state="i8", decay="slow", items=True, rounds=10),
    dataclasses.replace(CONTRACTS[2], state="f32", io="f16", fill="garbage"),
]


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_reference(case):
    verify_many(case)


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

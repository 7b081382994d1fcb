"""Long runs of `checkpointing_ssu` with random acceptance: every slot fills its window and writes many times."""

from __future__ import annotations

import dataclasses

import pytest
from checkpointing_cases import verify_many
from checkpointing_runs import CONTRACTS, RUNS

FEW = [
    CONTRACTS[0],
    dataclasses.replace(CONTRACTS[5], state="i8", decay="slow", items=True, rounds=10),
    dataclasses.replace(CONTRACTS[2], state="f32", io="f16", fill="garbage"),
]


@pytest.mark.thin(12, "history")
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_reference(case):
    verify_many(case)


@pytest.mark.thin(3)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_kernel(case, backend):
    with backend(shuffle_sync=False, async_mode="late"):
        verify_many(case, steps=16)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_kernel_in_long_runs(case, arch, backend):
    with backend(arch, shuffle_sync=False, async_mode="late"):
        verify_many(case)

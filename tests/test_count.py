"""tools/count.py: what it counts on a call whose costs are known, and the budgets of the operators."""

from __future__ import annotations

import json

import pytest

count = pytest.importorskip("count", reason="tools/ is not on the path")

BASE = {"batch": "8", "nheads": "16", "dim": "64", "dstate": "128", "ngroups": "1", "state_dtype": "float16"}


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({}, {"sm_90a": 1600, "sm_100a": 1900}),
        ({"state_dtype": "bfloat16"}, {"sm_90a": 1600, "sm_100a": 1900}),
        ({"state_dtype": "float32"}, {"sm_90a": 1600, "sm_100a": 1900}),
        ({"batch": "64"}, {"sm_90a": 1600, "sm_100a": 1600}),
    ],
    ids=str,
)
def test_budget_of_a_single_token(keys, slots, arch):
    got = count.count("selective_state_update", {**BASE, **keys}, arch)
    assert got["issue_slots_per_unit"] <= slots[arch]
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.15
    assert got["smem_excess_fraction"] == 0
    assert got["launches"] == 1
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


def test_bytes_of_the_state_are_exact():
    got = count.count("selective_state_update", BASE)
    state = 8 * 16 * 64 * 128 * 2
    assert got["units"] == 128
    assert got["tensors"]["state"] == {
        "dram_read_bytes": state,
        "dram_write_bytes": state,
        "l2_read_bytes": state,
        "l2_write_bytes": state,
    }
    # x, out; B, C; dt; A, D, dt_bias; indices
    assert got["floor_bytes"] == 2 * state + 2 * 8 * 16 * 64 * 2 + 2 * 8 * 128 * 2 + 8 * 16 * 4 + 3 * 16 * 4 + 8 * 4


def test_a_step_that_keeps_its_state_writes_no_state():
    got = count.count("selective_state_update", {**BASE, "update": "0"})
    assert got["tensors"]["state"]["l2_write_bytes"] == 0


def test_overrides_reach_the_kernel():
    got = count.count("selective_state_update", {**BASE, "config.rows": "16"})
    assert got["grids"] == [[8 * 16 * 4, 1, 1]]


def test_command_line(capsys):
    assert count.main(["selective_state_update", "batch=1", "nheads=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] == 2
    with pytest.raises(SystemExit):
        count.main(["selective_state_update", "headdim=64"])
    assert "headdim: expected one of batch, nheads" in capsys.readouterr().err

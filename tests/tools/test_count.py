"""tools/count.py: what it counts on a call whose costs are known, and the budgets of the operators."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

from cute_ssm.ops.selective_state_update.config import SelectiveStepConfig
from cute_ssm.tuning import tables

count = pytest.importorskip("count", reason="tools/ is not on the path")
counted = functools.partial(count.count, machine_code=False)  # budgets are of PTX


@pytest.fixture(autouse=True)
def _rule_alone(monkeypatch):
    """Budgets are those of the rules' configs: a tuned one may spend instructions to have more warps."""
    monkeypatch.setattr(tables, "rows", functools.cache(lambda: ()))
    tables.forget()
    yield
    monkeypatch.undo()
    tables.forget()


HAS_MATMUL = "matmul" in {field.name for field in dataclasses.fields(SelectiveStepConfig)}
BASE = {"batch": "8", "nheads": "16", "dim": "64", "dstate": "128", "ngroups": "1", "state_dtype": "float16"}


@pytest.mark.thin(4)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({}, {"sm_90a": 1600, "sm_100a": 1600}),
        ({"state_dtype": "bfloat16"}, {"sm_90a": 1600, "sm_100a": 1600}),
        ({"state_dtype": "float32"}, {"sm_90a": 1600, "sm_100a": 1600}),
        ({"batch": "64"}, {"sm_90a": 1600, "sm_100a": 1600}),
    ],
    ids=str,
)
def test_budget_of_a_single_token(keys, slots, arch):
    got = counted("selective_state_update", {**BASE, **keys}, arch)
    assert got["issue_slots_per_unit"] <= slots[arch]
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.15
    assert got["smem_excess_fraction"] == 0
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


STOCHASTIC, VARLEN, SAVED = {"rounding": "stochastic"}, {"varlen": "1"}, {"intermediates": "1"}
SIX = {"T": "6"}
I8, F8, I16 = ({"state_dtype": name} for name in ("int8", "float8_e4m3fn", "int16"))


@pytest.mark.thin(16)
@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        (I8, 3000),
        (F8, 3000),
        (I16, 3000),
        (STOCHASTIC, None),
        ({**STOCHASTIC, "state_dtype": "bfloat16"}, None),
        ({**STOCHASTIC, **I8}, None),
        (VARLEN, None),
        ({**SIX, "config.matmul": "0"}, 5600),
        ({**SIX, **VARLEN}, None),
        ({**SIX, **SAVED}, None),
        ({**SIX, **SAVED, "update": "0"}, None),
        ({**SIX, **SAVED, **I8}, None),
        ({**SIX, **I8}, None),
        ({**SIX, **F8}, None),
        ({**SIX, **STOCHASTIC}, None),
        ({**SIX, **SAVED, **STOCHASTIC}, None),
    ],
    ids=str,
)
def test_budgets_of_modes(keys, slots):
    keys = {k: v for k, v in keys.items() if k != "config.matmul" or HAS_MATMUL}
    got = counted("selective_state_update", {**BASE, **keys})
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= (1.3 if "T" in keys else 1.15)
    assert got["issue_slots_per_unit"] <= (slots or 10**9)
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


@pytest.mark.thin(2)
@pytest.mark.parametrize(("state", "slots"), [("float32", 20300), ("bfloat16", 20800)])
def test_budget_of_rows_of_eight_columns(state, slots):
    """Mamba-1 with dstate 8: no lane is idle, so a row of 16-bit states is one lane's."""
    keys = {"batch": "16", "nheads": "1", "dim": "4096", "dstate": "8", "layout": "dense", "state_dtype": state}
    got = counted("selective_state_update", keys)
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.02
    assert got["smem_excess_fraction"] == 0
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


def test_floor_of_scales_and_intermediate_states():
    got = counted("selective_state_update", {**BASE, **SIX, **VARLEN, **SAVED, **I8, "z": "1"})
    heads, states = 8 * 16, 8 * 16 * 64 * (128 + 4)
    tokens = 3 * 6 * heads * 64 * 2 + 2 * 6 * 8 * 128 * 2 + 6 * heads * 4  # x, z, out; B, C; dt
    assert got["floor_bytes"] == (2 + 6) * states + tokens + 3 * 16 * 4 + 2 * 8 * 4 + 9 * 4
    assert got["tensors"]["state_scale"]["dram_write_bytes"] == heads * 64 * 4
    assert got["tensors"]["intermediate_states_buffer"]["dram_write_bytes"] == 6 * heads * 64 * 128
    assert got["tensors"]["intermediate_state_scales"]["l2_write_bytes"] == 6 * heads * 64 * 4


def test_bytes_of_the_state_are_exact():
    got = counted("selective_state_update", BASE)
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
    got = counted("selective_state_update", {**BASE, "update": "0"})
    assert got["tensors"]["state"]["l2_write_bytes"] == 0


def test_overrides_reach_the_kernel():
    got = counted("selective_state_update", {**BASE, "config.rows": "16"})
    assert got["grids"] == [[8 * 16 * 4, 1, 1]]


def test_command_line(capsys):
    assert count.main(["selective_state_update", "batch=1", "nheads=2", "--json", "--ptx-only"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] == 2
    with pytest.raises(SystemExit):
        count.main(["selective_state_update", "headdim=64"])
    assert "headdim: expected one of batch, T, nheads" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_MATMUL, reason="this config has no matmul form")
def test_budget_of_the_matmul_form():
    got = counted("selective_state_update", {**BASE, **SIX, "config.matmul": "1"})
    assert got["issue_slots_per_unit"] <= 3600
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.3
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


# one lane a channel, as where channels fill the GPU
SCAN = {"batch": "1", "dim": "128", "length": "1024", "dstate": "16", "config.lanes": "1", "config.warps": "4"}
WHOLE = {"config.splits": "1"}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({}, 7.7),
        ({"arch": "sm_100a"}, 7.7),
        ({"input_dtype": "float16"}, 7.8),
        ({"input_dtype": "float32"}, 7.6),
        ({"z": "0"}, 7.6),
        ({"varlen": "1", "batch": "2", "dim": "64", "config.warps": "2"}, 7.8),
    ],
    ids=str,
)
def test_budget_of_the_scan(keys, slots):
    """Instructions per (token, channel, state), of which five are the recurrence: at most 8 at 1024 tokens."""
    shapes = {k: v for k, v in keys.items() if k != "arch"}
    got = counted("selective_scan", {**SCAN, **WHOLE, **shapes}, keys.get("arch", "sm_90a"))
    assert got["issue_slots_per_unit"] <= slots <= 8
    assert got["dram_over_floor"] <= 1.05
    assert got["smem_excess_fraction"] == 0
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


@pytest.mark.wide
@pytest.mark.parametrize("splits", [2, 8])
def test_budget_of_a_scan_in_parts(splits):
    """The carry pass costs three quarters of a scan, for all parts but the last; it reads u, delta and B once more."""
    got = counted("selective_scan", {**SCAN, "length": "2048", "config.splits": str(splits)})
    again = (splits - 1) / splits
    assert 7.6 < got["issue_slots_per_unit"] <= 7.9 + 5.9 * again
    names = {"u", "delta", "B"}
    tokens = {name: size["dram_read_bytes"] for name, size in got["tensors"].items() if name in names | {"z", "C"}}
    for name in names:
        assert tokens[name] == tokens["C" if name == "B" else "z"] * (1 + again)
    assert got["dram_over_floor"] <= 1.05 + 0.5 * again + 0.01 * splits
    assert got["smem_excess_fraction"] <= 0.005  # 16 columns of B alone are staged by half warps
    assert got["launches"] == 2
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


WIDE = {"config.rows": "128", "config.warps": "8"}
GATED = {"B": "4", "config.rows": "128", "config.warps": "4"}  # the config of calls that fill a GPU


@pytest.mark.thin(5)
@pytest.mark.parametrize(
    ("op", "keys", "slots"),
    [
        ("gated_delta_rule_mtp", {"T": "1", "verify": "0"}, 5700),
        ("gated_delta_rule_mtp", {"T": "2"}, 3100),
        ("gated_delta_rule_mtp", {"T": "4"}, 3100),
        ("gated_delta_rule_mtp", {"T": "8"}, 4300),
        ("gated_delta_rule_mtp", {"T": "4", "verify": "0", "buffer": "1"}, 8500),
        ("gated_delta_rule_mtp", {"T": "4", "state_dtype": "bfloat16"}, 2400),
        ("gated_delta_rule_mtp", {"T": "4", "packed": "1"}, 3150),
        ("gated_delta_rule_mtp", {"T": "4", "K": "96", "V": "192", "config.rows": "96", "config.warps": "3"}, 4350),
        ("gated_delta_rule_replay", {"T": "4"}, 9500),
        ("gated_delta_rule_replay", {"T": "4", "pnat": "0"}, 3700),
        ("gated_delta_rule_replay", {"T": "4", "pnat": "16"}, 11500),
        ("gated_delta_rule_replay", {"T": "4", "state_dtype": "bfloat16"}, 10200),
        pytest.param("gated_delta_rule_replay", {"T": "8", "W": "24"}, 11700, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_budgets_of_the_gated_delta_rule(op, keys, slots):
    got = counted(op, {**GATED, **keys})
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.1
    assert got["smem_excess_fraction"] <= 0.05
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


@pytest.mark.wide
@pytest.mark.parametrize(
    ("keys", "slots"),
    [({"T": "64"}, 38500), pytest.param({"T": "20", "K": "256", "V": "256"}, 65500, marks=pytest.mark.slow)],
    ids=str,
)
def test_budget_of_chunks_of_tokens(keys, slots):
    """A state is read once and written once, whatever the number of tokens; one chunk's keys are staged at a time."""
    got = counted("gated_delta_rule_mtp", {"B": "1", "H": "2", "HV": "4", "verify": "0", **WIDE, **keys})
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.15
    assert got["smem_excess_fraction"] <= 0.05
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


def test_floor_of_a_replay():
    """Flushes are counted by the rows that do so, rings by what is pending and what is appended."""
    got = counted("gated_delta_rule_replay", {"B": "2", "H": "1", "HV": "2", "K": "64", "V": "64", "pnat": "13"})
    states, row = 2 * 2 * 64 * 64 * 4, (64 + 2 * 64) * 2 + 2 * 8
    tokens = 2 * 4 * (2 * 64 + 2 * 2 * 64 + 2 * 2) * 2  # q, k; v, output; a, b
    assert got["floor_bytes"] == 2 * states + tokens + 2 * (13 + 4) * row + 2 * 2 * 4 + 2 * 4 + 2 * 8
    assert got["tensors"]["initial_state"]["dram_write_bytes"] == states


def test_floor_of_a_scan():
    """Tokens of u, delta, z, out; B and C; weights; the slot's state, read and written; its index and its flag."""
    got = counted("selective_scan", {"batch": "2", "dim": "64", "length": "64", "ngroups": "2"})
    rows, columns, states = 4 * 2 * 64 * 64 * 2, 2 * 2 * 2 * 16 * 64 * 2, 2 * 64 * 16 * 4
    assert got["units"] == 2 * 64 * 64 * 16 / 32
    assert got["floor_bytes"] == rows + columns + 64 * 16 * 4 + 2 * 64 * 4 + 2 * states + 2 * (4 + 1)
    assert got["tensors"]["ssm_states"]["dram_write_bytes"] == states


REPLAY = {"batch": "64", "nheads": "16", "T": "6", "W": "16", "z": "1"}


@pytest.mark.wide
@pytest.mark.parametrize(
    ("state", "pnat", "rounding", "slots"),
    [
        ("bfloat16", 8, "nearest", 450),
        ("float16", 8, "nearest", 500),
        pytest.param("float32", 8, "nearest", 1000, marks=pytest.mark.slow),
        ("int8", 8, "nearest", 700),
        pytest.param("float8_e4m3fn", 8, "nearest", 700, marks=pytest.mark.slow),
        ("float16", 12, "nearest", 1650),
        ("float16", 12, "stochastic", 3500),
        ("bfloat16", 12, "nearest", 1300),
        ("int8", 12, "nearest", 2700),
        pytest.param("float8_e4m3fn", 12, "nearest", 2500, marks=pytest.mark.slow),
    ],
)
def test_budget_of_a_checkpointed_step(state, pnat, rounding, slots):
    """PNAT 8 keeps the state, 12 writes it."""
    keys = {**REPLAY, "state_dtype": state, "pnat": str(pnat), "rounding": rounding}
    got = counted("checkpointing_ssu", keys, "sm_90a")
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.02
    assert got["l2_over_floor"] <= 1.25
    assert got["smem_excess_fraction"] <= 0.05
    assert got["launches"] == 1
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


DECODE = {"batch": "2", "nheads": "16", "dim": "64", "dstate": "128", "ngroups": "1", "W": "16"}


@pytest.mark.parametrize(
    ("state", "cached", "slots"),
    [("bfloat16", 8, 3700), ("float16", 8, 3700), ("bfloat16", 15, 9500), ("float16", 15, 9500)],
)
def test_budget_of_a_step_that_replays_its_window(state, cached, slots):
    """With 8 tokens in the caches it keeps the state, with 15 it stores it; each quarter of a head reads every B."""
    got = counted("replay_decode", {**DECODE, "state_dtype": state, "cached": str(cached)})
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.01
    assert got["l2_over_floor"] <= 1.65
    assert got["smem_wavefronts"] == 0
    assert got["launches"] == 1
    assert got["kernels"]
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


def test_floor_of_a_step_that_replays_its_window():
    """The state, what is in the caches, and what is appended to them or, at the end of the window, the new state."""
    keys = {"batch": "2", "nheads": "4", "dim": "64", "dstate": "64", "ngroups": "2", "W": "8"}
    state, row = 2 * 4 * 64 * 64 * 2, 2 * ((4 * 64 + 2 * 64) * 2 + 4 * 4)
    tokens = 2 * (2 * 4 * 64 + 2 * 2 * 64) * 2 + 2 * 4 * 2 + 4 * (4 + 2 + 2)  # x, out, B, C; dt; A, D, dt_bias
    kept = counted("replay_decode", {**keys, "cached": "4"})
    assert kept["floor_bytes"] == state + 5 * row + tokens + 2 * (4 + 4 + 1)
    assert kept["tensors"]["state"]["dram_write_bytes"] == 0
    flushed = counted("replay_decode", {**keys, "cached": "7"})
    assert flushed["floor_bytes"] == 2 * state + 7 * row + tokens + 2 * (4 + 4 + 1)
    assert flushed["tensors"]["state"]["dram_write_bytes"] == state
    assert flushed["tensors"]["B_cache"]["dram_write_bytes"] == 0


@pytest.mark.parametrize(
    ("heads", "slots"),
    [(4, 1550), pytest.param(6, 1650, marks=pytest.mark.slow), pytest.param(5, 2200, marks=pytest.mark.slow)],
)
def test_budget_of_views_of_a_fused_projection(heads, slots):
    """Rows that are multiples of 8, 4 and 2 bytes apart; 1290 slots if they are of 16."""
    keys = {**REPLAY, "batch": "16", "nheads": str(heads), "fused": "1"}
    got = counted("checkpointing_ssu", keys, "sm_90a")
    assert got["issue_slots_per_unit"] <= slots
    assert got["dram_over_floor"] <= 1.02
    assert all(kernel["spill_bytes"] == 0 for kernel in got["kernels"])


@pytest.mark.thin(2)
@pytest.mark.parametrize("state", ["bfloat16", "float16"])
def test_one_sequence_keeps_as_many_ctas_at_work_as_it_has_heads(state):
    got = counted("checkpointing_ssu", {**REPLAY, "batch": "1", "pnat": "8", "state_dtype": state}, "sm_90a")
    assert got["issue_slots_per_unit"] <= 1000
    assert got["launches"] == 1

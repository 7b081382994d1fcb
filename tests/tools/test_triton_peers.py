"""tools/bench/triton_peers.py: a Triton kernel goes through the same model, by whatever wrapper launches it."""

from __future__ import annotations

import sys
import types

import pytest

from cute_ssm import workloads

pytest.importorskip("bench", reason="tools/ is not on the path")
from bench import triton_peers


def test_peers_without_a_triton_kernel_are_absent():
    found, absent = triton_peers.modelled("checkpointing_ssu", {"batch": 1}, "H200")
    assert not found
    assert "no Triton kernel" in absent["flashinfer"]


def test_peers_that_are_not_installed_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", None)
    found, absent = triton_peers.modelled("selective_state_update", {"batch": 1}, "H200")
    assert not found
    assert "mamba_ssm.ops.triton.selective_state_update" in absent["mamba_ssm"]


@pytest.mark.peers
@pytest.mark.parametrize("gpu", ["H200", "B200"])
def test_a_triton_kernel_has_a_modelled_time(gpu, monkeypatch):
    pytest.importorskip("triton")
    from triton_step import step

    fake = types.ModuleType("step")
    fake.selective_state_update = step
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", fake)
    keys = {"nheads": 4, "state_dtype": "float32"}
    few, many = (
        triton_peers.modelled("selective_state_update", {**keys, "batch": batch}, gpu)[0]["mamba_ssm"]
        for batch in (8, 256)
    )
    assert 1.6 < few < many
    moved = workloads.build("selective_state_update", {**keys, "batch": 256}, fill=False).floor_bytes
    assert many >= 0.5 * moved / 6e6  # microseconds: it copies the states, through a memory of a few TB/s

"""Bandwidth by direction and by bytes in flight: the model gives the curves that were published for a B200."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim

B200 = gpumodel.B200
TRACED = {"trace": gpumodel.Trace, "wave_lanes": None}

# TB/s by bytes in flight of each SM: SemiAnalysis, microbench-blackwell, ldgsts_tput and tma2d_tput
LDGSTS = {
    512: 0.175, 1024: 0.353, 2048: 0.708, 4096: 1.39, 8192: 2.68, 16384: 4.79, 24576: 5.93, 32768: 6.55, 49152: 6.69,
}  # fmt: skip
TMA = {(1, 512): 0.166, (1, 1024): 0.32, (1, 2048): 0.62, (1, 4096): 1.15, (1, 8192): 1.89, (2, 4096): 2.18,
       (2, 8192): 3.6, (2, 16384): 5.65, (4, 16384): 7.14}  # fmt: skip


def lines(n_bytes):
    """Zeros that start with a line."""
    data = np.zeros(n_bytes + 128, np.uint8)
    return data[-data.ctypes.data % 128 :][:n_bytes]


def bandwidth(text, name, threads, n_bytes, trips):
    """TB/s of a B200 on which each SM runs one CTA of a kernel that reads ``n_bytes``."""
    launch = ptxsim.run(text, name, 1, threads, [lines(n_bytes), trips], 0, **TRACED)
    launch.grid = (B200.sms, 1, 1)
    kernel = gpumodel.time_launch(launch, 32, B200)
    assert kernel.timing.dram_read == n_bytes
    return n_bytes * B200.sms / B200.microseconds(kernel.timing.clocks) / 1e6


@pytest.mark.parametrize("in_flight", LDGSTS)
def test_cp_async_has_the_published_bandwidth(in_flight):
    threads = min(256, in_flight // 16)
    stages = in_flight // (16 * threads)
    trips = max(60, 20 * stages)
    text = small_kernels.async_stream(stages, threads)
    found = bandwidth(text, "async_stream", threads, (trips + stages) * threads * 16, trips)
    assert found == pytest.approx(LDGSTS[in_flight], rel=0.1)


@pytest.mark.parametrize(("stages", "tile"), TMA)
def test_bulk_copies_have_the_published_bandwidth(stages, tile):
    trips = max(4, min(40, 400_000 // (stages * tile)))
    text = small_kernels.bulk_stream(stages, tile)
    found = bandwidth(text, "bulk_stream", 32, (trips + 1) * stages * tile, trips)
    assert found == pytest.approx(TMA[stages, tile], rel=0.1)


@pytest.mark.parametrize("machine", gpumodel.MACHINES.values(), ids=lambda machine: machine.name)
def test_bandwidth_depends_on_the_direction(machine):
    nominal = machine.dram_bytes / (machine.ghz * 1e9)
    mixes = {"reads": (8, 0), "bulk": (8, 0, 8), "copy": (4, 4), "writes": (0, 8)}
    share = {name: machine.dram_rate_of(*mix) / nominal for name, mix in mixes.items()}
    assert share["reads"] == pytest.approx(machine.dram_read_efficiency)
    assert share["bulk"] == pytest.approx(machine.dram_bulk_efficiency)
    assert share["copy"] == pytest.approx(machine.dram_efficiency)
    assert share["writes"] == pytest.approx(machine.dram_write_efficiency)
    assert machine.dram_rate_of(4, 4, 4) == pytest.approx(machine.dram_rate)


def test_mixed_directions_follow_the_published_curve():
    """QuickRunCUDA, b300_clean: TB/s of a B300 by eighths of the accesses that are writes."""
    published = {1: 7.08, 2: 7.12, 3: 6.82, 4: 6.68, 5: 6.61, 6: 6.50, 7: 6.55, 8: 7.30}
    b300 = dataclasses.replace(gpumodel.B300, dram_read_efficiency=7.29 / 8)
    for writes, want in published.items():
        found = b300.dram_rate_of(8 - writes, writes) * b300.ghz / 1e3
        assert found == pytest.approx(want, rel=0.05)

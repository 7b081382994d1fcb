"""`gpumodel`: kernels whose modelled time can be worked out from the constants, and what overlap is worth."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel.lower import Lowering
from gpumodel.model import REPLAYED, lowered

H200 = gpumodel.H200


def recorded(text, grid, block, args, shared=0, ctas=None):
    """The launch of a kernel, with its trace."""
    name = text.split(".entry ")[1].split("(")[0]
    options = {"trace": gpumodel.Trace, "wave_lanes": None, "ctas": ctas}
    return ptxsim.run(text, name, grid, block, args, shared, **options)


def modelled(launch, gpu=H200, registers=32, **options):
    return gpumodel.time_launch(launch, registers, gpu, **options)


def lines(n_bytes):
    """Zeros that start with a line."""
    data = np.zeros(n_bytes + 128, np.uint8)
    return data[-data.ctypes.data % 128 :][:n_bytes]


def crowded(launch):
    """The launch as one of CTAs that fill the GPU, of which the record has the first."""
    launch.grid = (H200.sms, 1, 1)
    return launch


def copy(warps, trips):
    n_bytes = 2 * warps * 32 * trips * 16
    return recorded(small_kernels.COPY, 1, warps * 32, [lines(n_bytes), lines(n_bytes), trips])


def test_copy_by_many_warps_reaches_the_bandwidth_of_the_memory():
    launch = copy(warps=32, trips=40)
    got = modelled(crowded(launch))
    moved = 2 * 32 * 40 * 512
    assert got.timing.dram_read == got.timing.dram_write == moved // 2
    needed = moved / (H200.dram_rate / H200.sms)
    assert needed <= got.timing.clocks <= 1.1 * needed + H200.dram_latency


def test_copy_between_lines_that_the_l2_holds_leaves_the_memory_alone():
    launch = crowded(copy(warps=1, trips=20))
    cold, warm = modelled(launch), modelled(launch, in_l2=range(1 << 60))
    assert (warm.timing.dram_read, warm.timing.dram_write) == (0, 0)
    assert warm.timing.l2_read == cold.timing.dram_read
    assert cold.timing.clocks - warm.timing.clocks >= 20 * (H200.dram_latency - H200.l2_latency)


def test_copy_by_one_warp_is_bound_by_latency():
    got = modelled(crowded(copy(warps=1, trips=20)))
    assert got.timing.clocks >= 20 * H200.dram_latency
    waited = sum(clocks for (_, why), clocks in got.timing.stalls.items() if why == "load of arg1")
    assert waited >= 0.85 * got.timing.clocks


def test_a_lone_sm_gets_more_than_its_share_but_no_more_than_its_port():
    launch = copy(warps=32, trips=40)
    alone, among = modelled(launch).timing.clocks, modelled(crowded(launch)).timing.clocks
    assert 2 * 32 * 40 * 512 / H200.l2_port <= alone < 0.6 * among


def test_dependent_operations_take_their_latency_each():
    got = modelled(recorded(small_kernels.CHAIN, 1, 32, [np.zeros(32, np.float32), 10]))
    latency = H200.pipes["fp32"].latency
    assert 640 * latency <= got.timing.clocks <= 640 * latency + 10 * 30 + 300


def test_independent_operations_issue_one_a_clock_and_scheduler():
    one = modelled(recorded(small_kernels.INDEPENDENT, 1, 32, [np.zeros(32, np.float32), 10]))
    assert 640 <= one.timing.clocks <= 640 + 10 * 30 + 300
    many = modelled(recorded(small_kernels.INDEPENDENT, 1, 512, [np.zeros(512, np.float32), 10]))
    assert 4 * 640 <= many.timing.clocks <= 4 * 640 + 800
    assert many.limits["issue"] == pytest.approx(many.timing.clocks, rel=0.3)


@pytest.mark.parametrize("instruction", ["ex2.approx.ftz.f32", "ex2.approx.f32", "lg2.approx.f32", "sqrt.rn.f32"])
def test_special_function_holds_its_pipe_once_however_many_slots_it_takes(instruction):
    got = modelled(recorded(small_kernels.special(instruction), 1, 512, [np.zeros(512, np.float32), 4]))
    assert got.timing.clocks == pytest.approx(4 * 4 * 64 * H200.pipes["sfu"].occupancy, rel=0.12)


def test_each_half_of_a_64_bit_operation_holds_its_pipe():
    text = small_kernels.INDEPENDENT.replace(".reg .f32 %g<64>;", ".reg .b64 %g<65>;").replace(
        "fma.rn.f32 %g", "add.s64 %g"
    )
    text = text.replace(", %f1, %f1, %f1;", ", %g64, %g64;").replace(
        "mov.f32 %f1, 0f3F000000;", "mov.f32 %f1, 0f3F000000; mov.u64 %g64, 7;"
    )
    got = modelled(recorded(text, 1, 512, [np.zeros(512, np.float32), 4]))
    assert got.timing.clocks == pytest.approx(4 * 4 * 64 * 2 * H200.pipes["int"].occupancy, rel=0.12)


def test_warps_hide_the_latency_of_each_other():
    few = modelled(recorded(small_kernels.CHAIN, 1, 128, [np.zeros(128, np.float32), 10]))
    more = modelled(recorded(small_kernels.CHAIN, 1, 512, [np.zeros(512, np.float32), 10]))
    assert more.timing.clocks <= 1.15 * few.timing.clocks


def ring(stages, tiles=24, ctas=1):
    data = lines(ctas * tiles * 4096)
    return recorded(small_kernels.ring(stages), ctas, 32, [data, tiles])


def test_code_is_lowered_without_the_constants_that_only_replays_read():
    launch = ring(2)
    fields = {f.name: getattr(H200, f.name) for f in dataclasses.fields(H200) if f.name not in REPLAYED}
    lowering = Lowering(launch.program, types.SimpleNamespace(**fields))
    for visit in launch.trace.warps[0]:
        lowering.block(visit.block, visit.stop)
    slower = dataclasses.replace(H200, dram_latency=900)
    assert lowered(launch.program, slower) is lowered(launch.program, H200)
    wide = dataclasses.replace(H200, pipes={**H200.pipes, "int": H200.pipes["fp32"]})
    assert lowered(launch.program, wide) is not lowered(launch.program, H200)


def test_stages_of_a_ring_overlap():
    clocks = {n: modelled(ring(n)).timing.clocks for n in (1, 2, 3, 4)}
    assert clocks[1] > 1.6 * clocks[2] > 1.6 * 1.2 * clocks[3]
    assert clocks[3] > clocks[4]
    per_tile = H200.dram_latency + H200.tma_latency + 32 * H200.pipes["fp32"].latency
    assert clocks[1] == pytest.approx(24 * per_tile, rel=0.25)
    assert clocks[4] == pytest.approx(24 * (per_tile + 4 * H200.bulk_trip) / 4, rel=0.35)


def test_bytes_in_flight_are_those_of_the_stages():
    flights = {n: modelled(ring(n)).timing.bytes_in_flight() for n in (1, 3)}
    assert 0.6 * 4096 <= flights[1] <= 4096
    assert 0.6 * 3 * 4096 <= flights[3] <= 3 * 4096


def test_ctas_fill_the_memory_as_stages_do():
    few, many = ring(2, ctas=1), ring(2, ctas=4)
    gpu = dataclasses.replace(H200, sms=1, dram_bytes=H200.dram_bytes / H200.sms)
    alone, together = modelled(few, gpu).timing.clocks, modelled(many, gpu).timing.clocks
    assert together < 2.5 * alone
    assert together >= 4 * 24 * 4096 / gpu.dram_rate


@pytest.mark.parametrize("count", [1, 2, 4])
def test_at_most_the_resident_ctas_run_at_a_time(count):
    gpu = dataclasses.replace(H200, sms=1, max_ctas=count)
    launch = recorded(small_kernels.CHAIN, 4, 32, [np.zeros(32, np.float32), 4])
    got = modelled(launch, gpu)
    assert got.resident_ctas == count
    waves = 4 // count
    alone = 4 * 64 * H200.pipes["fp32"].latency
    assert got.timing.clocks == pytest.approx(waves * alone + (waves - 1) * gpu.cta_start, rel=0.3)


def test_barrier_waits_for_the_last_warp():
    got = modelled(recorded(small_kernels.BARRIER, 1, 128, [np.zeros(1, np.float32)]))
    slow = 200 * H200.pipes["fp32"].latency
    for warp in (1, 2, 3):
        assert got.timing.stalls[warp, "barrier 0"] == pytest.approx(slow, rel=0.1)
    assert got.timing.stalls[0, "barrier 0"] <= 2 * H200.barrier


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "wanted"),
    [
        (32, 0, 64, 32),  # CTAs of an SM
        (255, 0, 256, 1),  # 8 warps of 8192 registers
        (128, 0, 128, 4),  # 4 * 4 warps of 4096
        (40, 0, 256, 6),  # 40 registers are 1280 a warp, 10240 a CTA
        (32, 100 * 1024, 32, 2),  # 228 KiB
        (16, 0, 1024, 2),  # 64 warps
        (64, 232448 - 1024, 32, 1),
    ],
)
def test_resident_ctas_follow_from_registers_shared_memory_and_threads(registers, shared, threads, wanted):
    assert gpumodel.resident_ctas(H200, registers, shared, threads) == wanted


def test_record_that_misses_an_arrival_is_refused():
    launch = ring(1)
    visits = launch.trace.warps[0]
    for visit in visits:
        for pc in [pc for pc, events in visit.events.items() if isinstance(events[0], gpumodel.trace.BulkCopy)]:
            del visit.events[pc]
    with pytest.raises(RuntimeError, match="wait for ever"):
        modelled(launch)


def test_unknown_machine_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="H200, B200"):
        gpumodel.machine_of("H9000")

"""Single mechanisms of the machine model: each time follows from the constants."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel import Conditions, MachineCode, Residency, Setting
from gpumodel.code import CodeCache

H200 = gpumodel.H200
FMA = H200.pipes["fp32"].latency
OUT = np.zeros(1, np.uint8)


def recorded(text, grid, threads, args, **options):
    """The launch of a kernel, with its trace."""
    name = text.split(".entry ")[1].split("(")[0]
    options = {"trace": gpumodel.Trace, "wave_lanes": None, **options}
    return ptxsim.run(text, name, grid, threads, args, 0, **options)


def clocks(launch, machine=H200, **options):
    return gpumodel.time_launch(launch, 32, machine, **options).timing.clocks


def session(*launches):
    """Launches of one call."""
    return types.SimpleNamespace(launches=list(launches), functions=[])


def us(conditions, *launches, machine=H200):
    return gpumodel.time_session(session(*launches), machine, conditions=conditions).us


def buffer(n_bytes):
    data = np.zeros(n_bytes + 128, np.uint8)
    return data[-data.ctypes.data % 128 :][:n_bytes]


# ------------------------------------------------------------ issue and synchronisation
@pytest.mark.parametrize("machine", [gpumodel.H200, gpumodel.B200], ids=lambda machine: machine.name)
def test_bulk_copies_of_several_lanes_are_issued_one_after_the_other(machine):
    one, many = (recorded(small_kernels.bulk_lanes(n), 1, 32, [buffer(4096)]) for n in (1, 32))
    few, all_lanes = (gpumodel.time_launch(launch, 32, machine).timing for launch in (one, many))
    assert all_lanes.clocks - few.clocks == pytest.approx(31 * machine.bulk_trip, rel=0.2)
    assert all_lanes.slots - few.slots == 31 * (machine.bulk_slots - 1)


@pytest.mark.parametrize("warps", [4, 32])
def test_a_barrier_takes_longer_with_more_warps(warps):
    found = clocks(recorded(small_kernels.BARRIERS, 1, 32 * warps, [OUT]))
    assert found == pytest.approx(100 * (H200.barrier + H200.barrier_warp * warps + warps / 4), rel=0.15)


def test_a_fence_waits_for_the_writes_before_it():
    idle, behind = (recorded(small_kernels.FENCE, 1, 32, [buffer(1 << 16), stores]) for stores in (0, 100))
    slow = dataclasses.replace(H200, store_latency=5000)
    assert clocks(idle) == pytest.approx(H200.gpu_fence, rel=0.2)
    assert clocks(idle, slow) == clocks(idle)
    assert clocks(behind, slow) >= 5000


@pytest.mark.parametrize(("instruction", "pipes"), [("add.s32", 2), ("xor.b32", 1)])
def test_additions_go_to_two_pipes_and_logic_to_one(instruction, pipes):
    text = small_kernels.INDEPENDENT.replace(".reg .f32 %g<64>;", ".reg .b32 %g<65>;")
    text = text.replace("fma.rn.f32 %g", f"{instruction} %g").replace(", %f1, %f1, %f1;", ", %r1, %r1;")
    found = clocks(recorded(text, 1, 512, [np.zeros(512, np.float32), 4]))
    assert found == pytest.approx(4 * 4 * 64 * H200.pipes["int"].occupancy / pipes, rel=0.15)


def test_instructions_of_a_slow_pipe_are_scheduled_among_others():
    """Exponentials that nothing needs soon do not hold up a chain of multiply-adds: the slower of both takes all."""
    body = "".join(f"ex2.approx.ftz.f32 %f{2 + i}, %f0;" for i in range(12))
    body += "fma.rn.f32 %f1, %f1, %f1, %f1;" * 24 + "".join(f"add.f32 %f1, %f1, %f{2 + i};" for i in range(12))
    text = (
        small_kernels.HEAD
        + """.visible .entry mixed() {
    .reg .f32 %f<16>; mov.f32 %f0, 0f3F800000; mov.f32 %f1, 0f3F800000;"""
        + body
        + "ret; }"
    )
    chain = 36 * FMA
    assert clocks(recorded(text, 1, 32, [])) == pytest.approx(chain, rel=0.15)
    assert 12 * H200.pipes["ex2"].occupancy + chain > 1.5 * chain


def test_two_halves_of_a_word_are_packed_by_one_instruction():
    pair = "cvt.rn.f16.f32 %h{0}, %f1; cvt.rn.f16.f32 %k{0}, %f1; mov.b32 %g{0}, {{%h{0}, %k{0}}};"
    apart = pair.replace("mov.b32 %g{0}, {{%h{0}, %k{0}}};", "")
    clocks_of = {}
    for name, line in {"pair": pair, "apart": apart}.items():
        text = small_kernels.INDEPENDENT.replace(
            ".reg .f32 %g<64>;", ".reg .b32 %g<64>; .reg .b16 %h<64>; .reg .b16 %k<64>;"
        )
        for i in range(64):
            text = text.replace(f"fma.rn.f32 %g{i}, %f1, %f1, %f1;", line.format(i))
        clocks_of[name] = clocks(recorded(text, 1, 512, [np.zeros(512, np.float32), 4]))
    assert clocks_of["pair"] == pytest.approx(4 * 4 * 64 * H200.pipes["pack"].occupancy, rel=0.15)
    assert clocks_of["apart"] == pytest.approx(2 * clocks_of["pair"], rel=0.15)


def test_a_high_half_takes_one_instruction_more_to_widen():
    line = "mov.b32 {{%h{0}, %k{0}}}, %r1; cvt.f32.bf16 %g{0}, %h{0}; cvt.f32.bf16 %e{0}, %k{0};"
    text = small_kernels.INDEPENDENT.replace(
        ".reg .f32 %g<64>;", ".reg .f32 %g<64>; .reg .f32 %e<64>; .reg .b16 %h<64>; .reg .b16 %k<64>;"
    )
    for i in range(64):
        text = text.replace(f"fma.rn.f32 %g{i}, %f1, %f1, %f1;", line.format(i))
    timing = gpumodel.time_launch(recorded(text, 1, 512, [np.zeros(512, np.float32), 4]), 32, H200).timing
    assert timing.slots == pytest.approx(16 * 4 * 64 * 3, rel=0.05)
    assert timing.clocks == pytest.approx(4 * 4 * 64 * 2 * H200.pipes["widen"].occupancy, rel=0.15)


def test_blackwell_ultra_has_twice_the_exponentials():
    launch = recorded(small_kernels.special("ex2.approx.ftz.f32"), 1, 512, [np.zeros(512, np.float32), 4])
    assert clocks(launch, gpumodel.B200) == pytest.approx(2 * clocks(launch, gpumodel.B300), rel=0.1)


# ------------------------------------------------------------ memory
def chase(loads=32):
    return recorded(small_kernels.CHASE, 1, 1, [buffer(loads * 4096), loads])


def test_a_chain_of_loads_takes_the_latency_of_where_the_data_is():
    launch = chase()
    everywhere = ((0, 1 << 40),)
    dram = clocks(launch)
    near = clocks(launch, setting=Setting(Residency(everywhere)))
    mixed = clocks(launch, setting=Setting(Residency(everywhere, near=False)))
    assert dram - near == pytest.approx(32 * (H200.dram_latency - H200.l2_latency), rel=0.15)
    far = 32 * H200.l2_far_share * (H200.l2_far_latency - H200.l2_latency)
    assert mixed - near == pytest.approx(far, rel=0.4)


def test_a_warm_call_finds_what_fits_and_a_cold_one_nothing():
    launch = chase()
    cold, warm = us(Conditions(), launch), us(Conditions(data="warm"), launch)
    gain = H200.microseconds(32 * (H200.dram_latency - H200.l2_latency))
    assert cold - warm == pytest.approx(gain, rel=0.15)
    half = dataclasses.replace(H200, l2_near_bytes=1000, l2_bytes=2 * 32 * 128 - 1000)
    far = dataclasses.replace(half, l2_far_share=0.0)
    assert us(Conditions(data="warm"), launch, machine=far) == pytest.approx((cold + warm) / 2, rel=0.15)
    none = dataclasses.replace(H200, l2_near_bytes=1000, l2_bytes=2000)
    assert us(Conditions(data="warm"), launch, machine=none) == cold


def test_activations_are_the_small_tensors():
    small, large = chase(), chase(1100)
    assert us(Conditions(data="activations"), small) == us(Conditions(data="warm"), small)
    assert us(Conditions(data="activations"), large) == us(Conditions(), large)


def test_a_later_launch_of_a_call_finds_what_an_earlier_one_has_read():
    data = buffer(32 * 4096)
    first, second = (recorded(small_kernels.CHASE, 1, 1, [data, 32]) for _ in range(2))
    other = chase()
    gain = H200.microseconds(32 * (H200.dram_latency - H200.l2_latency))
    assert us(Conditions(), first, other) - us(Conditions(), first, second) == pytest.approx(gain, rel=0.15)


def test_what_all_sms_read_is_fetched_from_dram_once():
    launch = recorded(small_kernels.async_stream(8, 256), 1, 256, [buffer(288 * 4096), 280])
    launch.grid = (H200.sms, 1, 1)  # each CTA reads the same
    found = gpumodel.time_session(session(launch), H200).kernels[0].timing.clocks
    assert found < 0.8 * clocks(launch)
    assert found >= 288 * 4096 / H200.l2_port


def test_a_record_does_not_depend_on_where_the_host_puts_memory():
    wide = np.zeros((1 << 17) + 4096, np.uint8)
    found = set()
    for offset in (0, 32, 64, 1056):
        data = wide[-wide.ctypes.data % 128 + offset :][: 1 << 17]
        launch = recorded(small_kernels.FENCE, 1, 32, [data, 100])
        lines = [event.lines for visits in launch.trace.warps.values() for visit in visits
                 for events in visit.events.values() for event in events]  # fmt: skip
        found.add((tuple(lines), clocks(launch)))
    assert len(found) == 1


# ------------------------------------------------------------ code
def test_a_loop_larger_than_the_instruction_cache_is_fetched_in_every_trip():
    fits, exceeds = (recorded(small_kernels.loop_of(n, 10), 1, 32, [OUT]) for n in (1000, 9000))
    assert 1000 * 16 * H200.code_growth < H200.code_l0_bytes < H200.code_l1_bytes < 9000 * 16 * H200.code_growth
    assert clocks(fits) == pytest.approx(10 * 1000 * FMA, rel=0.02)
    slow = dataclasses.replace(H200, l2_latency=10 * H200.l2_latency)
    fetched = 9000 * 16 * H200.code_growth * slow.l2_latency / H200.code_ahead
    assert clocks(exceeds, slow) >= 10 * fetched
    stalls = gpumodel.time_launch(exceeds, 32, slow).timing.stalls
    assert stalls[0, "instruction cache"] > 0


def test_cold_code_is_fetched_once():
    launch = recorded(small_kernels.loop_of(1000, 10), 1, 32, [OUT])
    n_bytes = 1000 * 16 * H200.code_growth
    for state, latency in (("l2", H200.l2_latency), ("cold", H200.dram_latency)):
        waits = latency + n_bytes * latency / H200.code_ahead - n_bytes / 16
        found = clocks(launch, setting=Setting(code=state)) - clocks(launch)
        assert found == pytest.approx(waits, rel=0.1)


def test_known_machine_code_tells_the_size_and_the_spills():
    launch = recorded(small_kernels.loop_of(1000, 10), 1, 32, [OUT])
    large = MachineCode(code_bytes=200_000, instructions=12_000)
    assert clocks(launch, setting=Setting(machine_code=large)) > clocks(launch)
    spilling = MachineCode(code_bytes=16_000, instructions=1000, spills=100)
    assert spilling.spill_share == 0.1
    copying = recorded(small_kernels.async_stream(1, 1024), 1, 1024, [buffer(1 << 20), 60])
    busy = dataclasses.replace(H200, lines_per_clock=0.1)  # where the load/store unit is the limit
    code = MachineCode(code_bytes=160, instructions=10, spills=5)
    few, more = (clocks(copying, busy, setting=Setting(machine_code=found)) for found in (None, code))
    assert more > few


def test_least_recently_used_code_leaves_the_cache():
    machine = dataclasses.replace(H200, code_l0_bytes=200, code_l1_bytes=1 << 20)
    cache = CodeCache(machine, dict.fromkeys(range(3), 100), "warm")
    waits = [cache.enter(0, block, False, 0.0) > 0 for block in (0, 1, 0, 2, 0, 1)]
    assert waits == [True, True, False, True, False, True]


def test_code_from_beyond_the_sm_comes_one_block_after_the_other():
    cache = CodeCache(H200, {0: 4096, 1: 4096}, "l2")
    first, second = (cache.enter(block, block, False, 0.0) for block in (0, 1))
    assert second - first == pytest.approx(4096 * H200.l2_latency / H200.code_ahead)
    assert cache.enter(2, 0, False, 0.0) == pytest.approx(first)  # another sub-partition finds it, once it is there


# ------------------------------------------------------------ launches
def test_ctas_are_dispatched_at_a_fixed_rate():
    few, many = (recorded(small_kernels.EMPTY, 132 * n, 32, [OUT], ctas=lambda _, n=n: range(n)) for n in (100, 1100))
    machine = dataclasses.replace(H200, cta_start=0)
    took = machine.microseconds(clocks(many, machine) - clocks(few, machine))
    assert took == pytest.approx(1000 * 132 * machine.cta_ns / 1e3, rel=0.05)


def test_a_launch_costs_more_without_a_graph():
    launch = chase()
    graph, stream = us(Conditions(), launch, launch), us(Conditions(launch="stream"), launch, launch)
    assert stream - graph == pytest.approx(2 * (H200.stream_launch_us - H200.launch_us))


def test_a_profiler_sees_the_launch_of_the_first_kernel_alone():
    launch = chase()
    graph, profiler = us(Conditions(), launch, launch), us(Conditions(launch="profiler"), launch, launch)
    assert profiler - graph == pytest.approx(H200.profiler_us - H200.launch_us)


def pair(triggers, before=400, pdl=True):
    first = recorded(small_kernels.dependent(1, 1000, triggers), 1, 32, [OUT], pdl=pdl)
    second = recorded(small_kernels.dependent(before, 1000), 1, 32, [OUT], pdl=pdl)
    return first, second


def test_what_precedes_the_wait_overlaps_the_kernel_before():
    apart = us(Conditions(), *pair(triggers=True, pdl=False))
    late = us(Conditions(), *pair(triggers=False))
    early = us(Conditions(), *pair(triggers=True))
    assert apart - late == pytest.approx(H200.launch_us - H200.pdl_launch_us, rel=0.02)
    assert late - early == pytest.approx(H200.microseconds(400 * FMA), rel=0.05)
    longer = us(Conditions(), *pair(triggers=True, before=3000))
    assert longer - early == pytest.approx(H200.microseconds((3000 - 1000) * FMA), rel=0.05)


def test_a_full_sm_leaves_no_room_for_the_kernel_after():
    first, second = pair(triggers=True)
    full = dataclasses.replace(H200, max_warps=1)
    kernel = gpumodel.time_launch(first, 32, full)
    assert gpumodel.model.overlap(kernel, second, full) == 0
    assert gpumodel.model.overlap(kernel, second, H200) > 0


def test_a_first_launch_that_follows_a_kernel_starts_early():
    launch = recorded(small_kernels.dependent(400, 100), 1, 32, [OUT], pdl=True)
    plain = recorded(small_kernels.dependent(400, 100), 1, 32, [OUT])
    gain = H200.launch_us - H200.pdl_launch_us + H200.microseconds(400 * FMA)
    assert us(Conditions(), launch) - us(Conditions(follows=True), launch) == pytest.approx(gain, rel=0.05)
    assert us(Conditions(follows=True), plain) == us(Conditions(), plain)


@pytest.mark.parametrize("wrong", [{"data": "hot"}, {"code": "hot"}, {"launch": "eager"}])
def test_unknown_conditions_are_refused_with_the_known_ones(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got '{value}'"):
        Conditions(**wrong)


def test_machines_are_found_by_name_and_targets_by_their_reference_board():
    assert [gpumodel.machine_of(name).name for name in ("H100", "sm_90a", "sm_100a", "sm_103a")] == [
        "H100", "H200", "B200", "B300",
    ]  # fmt: skip

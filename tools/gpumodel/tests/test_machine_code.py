"""What ptxas does to the PTX that the model replays, and what other SMs have fetched before."""

from __future__ import annotations

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel import MachineCode, Residency, Setting
from gpumodel.model import lowered

H200 = gpumodel.H200


def skip(body):
    """A load, code that a branch skips, and a load that depends on neither."""
    return (
        small_kernels.HEAD
        + f""".visible .entry skip(.param .u64 in) {{
.reg .b32 %r<8>; .reg .f32 %f<8>; .reg .b64 %d<2>; .reg .pred %p;
ld.param.u64 %d1, [in]; ld.global.f32 %f1, [%d1]; setp.gt.f32 %p, %f1, 0f3F000000; @%p bra OVER;
{body}
OVER: ld.global.f32 %f3, [%d1+4096]; add.f32 %f4, %f3, %f1; st.global.f32 [%d1+8192], %f4; ret;
}}"""
    )


def timed(body, value):
    data = np.full(4096, value, np.float32)
    launch = ptxsim.run(skip(body), "skip", 1, 1, [data], trace=gpumodel.Trace, wave_lanes=None)
    return gpumodel.time_launch(launch, 32, H200).timing.clocks


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["executed", "skipped"])
def test_a_load_behind_short_code_that_a_branch_skips_does_not_wait_for_it(value):
    short = timed("fma.rn.f32 %f2, %f1, %f1, %f1;" * 32, value)
    long = timed("fma.rn.f32 %f2, %f1, %f1, %f1;" * 80, value)
    assert long - short == pytest.approx(H200.dram_latency, rel=0.3)


def test_a_branch_over_memory_accesses_stays_one():
    loads = timed("ld.global.f32 %f2, [%d1+1024];", 1.0)
    assert loads - timed("fma.rn.f32 %f2, %f1, %f1, %f1;", 1.0) == pytest.approx(H200.dram_latency, rel=0.3)


def test_code_without_loops_takes_the_issue_slots_of_its_machine_code():
    launch = ptxsim.run(
        small_kernels.INDEPENDENT, "independent", 1, 512, [np.zeros(512, np.float32), 1],
        trace=gpumodel.Trace, wave_lanes=None,
    )  # fmt: skip
    slots = sum(op.slots for op in lowered(launch.program, H200).ops)
    looped, straight = MachineCode(16 * 2 * slots, 2 * slots), MachineCode(16 * 2 * slots, 2 * slots, straight=True)
    plain, doubled = (
        gpumodel.time_launch(launch, 32, H200, setting=Setting(machine_code=code)).timing for code in (looped, straight)
    )
    assert doubled.slots == pytest.approx(2 * plain.slots)
    assert doubled.clocks > 1.6 * plain.clocks


def test_lines_that_another_sm_has_fetched_come_from_the_l2():
    data = np.zeros(32 * 4096 + 128, np.uint8)
    launch = ptxsim.run(
        small_kernels.CHASE, "chase", 1, 1, [data[-data.ctypes.data % 128 :], 32], trace=gpumodel.Trace, wave_lanes=None
    )
    whole = (0, 1 << 40)

    def clocks(early):
        residency = Residency(shared=((*whole, 0.01, early),))
        return gpumodel.time_launch(launch, 32, H200, setting=Setting(residency=residency)).timing.clocks

    assert clocks(1.0) - clocks(0.01) == pytest.approx(32 * (H200.dram_latency - H200.l2_latency), rel=0.1)
    assert clocks(0.01) < clocks(0.5) < clocks(1.0)

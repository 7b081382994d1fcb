"""What ptxas does to the PTX that the model replays, and what other SMs have fetched before."""

from __future__ import annotations

import numpy as np
import pytest
import small_kernels

import gpumodel
import ptxsim
from gpumodel import MachineCode, Residency, Setting
from gpumodel.code import Load, loads_of, width_of
from gpumodel.lower import bytes_per_lane
from gpumodel.model import lowered
from ptxsim.sass import Instruction

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


def test_loads_stand_where_the_machine_code_without_loops_has_them():
    """Two independent loads with work on the first between them: side by side, or the second one behind that work."""
    launch = ptxsim.run(
        small_kernels.HEAD
        + """.visible .entry two(.param .u64 in) {
.reg .f32 %f<8>; .reg .b64 %d<2>;
ld.param.u64 %d1, [in]; ld.global.f32 %f1, [%d1];"""
        + "fma.rn.f32 %f1, %f1, %f1, %f1;" * 40
        + """ld.global.f32 %f3, [%d1+4096]; add.f32 %f4, %f3, %f1; st.global.f32 [%d1+8192], %f4; ret; }""",
        "two", 1, 1, [np.zeros(4096, np.float32)], trace=gpumodel.Trace, wave_lanes=None,
    )  # fmt: skip

    def clocks(*loads, straight=True):
        loads = tuple(Load(*load) for load in loads)
        code = MachineCode(16 * 45, 45, straight=straight, loads=loads)
        return gpumodel.time_launch(launch, 32, H200, setting=Setting(machine_code=code)).timing.clocks

    early = clocks()
    assert clocks((4, 0), (4, 41, (0,))) - early == pytest.approx(H200.dram_latency, rel=0.3)
    assert clocks((4, 0), (4, 41)) == early, "the first one is not used before the second one"
    assert clocks((4, 0), (4, 1)) == early
    assert clocks((4, 0), (4, 41, (0,)), straight=False) == pytest.approx(early, rel=0.05), (
        "loops: the places say nothing"
    )
    assert clocks((16, 0), (16, 41, (0,))) == early, "other widths: not these loads"


def test_loads_of_machine_code_know_which_results_are_used_before_them():
    listed = [
        ("LDG.E.128", "R4,desc[UR6][R2.64]"), ("LDG.E", "R9,desc[UR6][R2.64+0x10]"), ("FADD", "R10,R1,R2"),
        ("LDG.E.64", "R12,desc[UR6][R2.64]"), ("FADD", "R10,R10,R6"), ("LDG.E", "R11,desc[UR6][R2.64]"),
        ("STG.E", "desc[UR6][R2.64],R13"), ("LDG.E.U16", "R9,desc[UR6][R2.64]"),
    ]  # fmt: skip
    code = [Instruction(16 * i, "", *each) for i, each in enumerate(listed)]
    assert loads_of(code) == (Load(16, 0), Load(4, 1), Load(8, 3), Load(4, 5, (0,)), Load(2, 7, (0, 1, 2)))


@pytest.mark.parametrize(
    "opcode, width", [("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.128.CONSTANT", 16), ("LDG.E.U16", 2), ("LDG.E.U8", 1)]
)
def test_width_of_a_load_by_its_machine_opcode(opcode, width):
    assert width_of(opcode) == width


@pytest.mark.parametrize(
    "text, width",
    [("ld.global.v4.b32 {%r1}, [%d1]", 16), ("@%p1 ld.global.b16 %r1, [%d1]", 2), ("ld.global.nc.v2.f32 {}, [%d]", 8)],
)  # fmt: skip
def test_width_of_a_load_in_ptx(text, width):
    assert bytes_per_lane(text) == width

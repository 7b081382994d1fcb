"""Machine code: loops and figures of code whose shape is known, and of a compiled kernel beside what ptxas reports."""

import importlib.metadata
import json
import shutil

import pytest

pytest.importorskip("networkx")

from ptxsim import sass


def needs_disassembler():
    try:
        sass.disassembler()
    except sass.DisassemblerError as error:
        pytest.skip(str(error))


def assembled(*lines):
    """Instructions from text; ``>N`` is the address of the N-th one."""
    code = []
    for number, line in enumerate(lines):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        if ">" in operands:
            head, _, place = operands.partition(">")
            operands = f"{head}{16 * int(place):#x}"
        code.append(sass.Instruction(16 * number, predicate, opcode, operands))
    return tuple(code)


def shapes(*lines):
    return [(loop.start // 16, loop.instructions) for loop in sass.loops_of(assembled(*lines))]


def test_code_without_a_backward_branch_has_no_loop():
    assert shapes("S2R R0", "@P0 BRA >3", "FADD R1", "EXIT") == []


def test_nested_loops_are_listed_from_the_largest():
    code = ("MOV R0", "FADD R1", "FMUL R2", "@P0 BRA >2", "IADD3 R3", "@P1 BRA >1", "EXIT")
    assert shapes(*code) == [(1, 5), (2, 2)]


def test_two_backward_branches_to_one_place_are_one_loop():
    assert shapes("FADD R1", "@P0 BRA >0", "FMUL R1", "@P1 BRA >0", "EXIT") == [(0, 4)]


def test_a_loop_with_a_side_entry_counts_as_one():
    code = ("@P0 BRA >3", "FADD R1", "FADD R2", "FMUL R3", "FMUL R4", "@P1 BRA >2", "EXIT")
    assert shapes(*code) == [(2, 4)]
    sideways = ("@P0 BRA >4", "FADD R1", "FADD R2", "BRA >4", "FMUL R4", "@P1 BRA >2", "EXIT")
    assert shapes(*sideways) == [(2, 4)], "neither half dominates the other"


def test_what_only_diverged_warps_reach_belongs_to_no_loop():
    code = ("FADD R1", "BRA.DIV UR4,>5", "SHFL R2", "@P0 BRA >0", "EXIT", "WARPSYNC.COLLECTIVE R3", "BRA >3")
    assert shapes(*code) == [(0, 4)]
    assert sass.flow_of(assembled(*code)).cold == {5 * 16}


def test_a_predicate_among_the_operands_makes_a_branch_conditional():
    assert shapes("FADD R1", "BRA.U UP0,>0", "EXIT") == [(0, 2)]
    flow = sass.flow_of(assembled("BRA.U UP0,>2", "FADD R1", "EXIT"))
    assert set(flow.edges[0]) == {16, 32}


def test_a_called_function_has_loops_of_its_own():
    code = ("CALL.REL.NOINC >3", "FADD R1", "EXIT", "FMUL R2", "@P0 BRA >3", "RET.REL.NODEC R4 >0")
    assert shapes(*code) == [(3, 2)]
    assert sass.flow_of(assembled(*code)).calls == {0: 48}


def test_a_loop_over_active_lanes_is_told_from_others():
    code = ("@P0 ELECT P1,URZ", "@P1 R2UR UR1,R4", "UBLKCP.S.G [UR2],[UR3],UR9", "@P0 BRA.U.ANY >0", "@P2 BRA >0")
    (outer,) = sass.loops_of(assembled(*code, "EXIT"))
    assert outer.per_lane and outer.opcodes["UBLKCP"] == 1
    apart = sass.loops_of(assembled("MOV R1", *code[:3], "@P0 BRA.U.ANY >1", "@P2 BRA >0", "EXIT"))
    assert [(loop.per_lane, loop.instructions) for loop in apart] == [(False, 6), (True, 4)]


def test_branches_through_registers_are_refused():
    with pytest.raises(sass.DisassemblerError, match="BRX at 0x0: branches through registers"):
        sass.loops_of(assembled("BRX R2", "EXIT"))


def test_without_a_disassembler_the_message_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sass.disassembler.cache_clear()
    try:
        with pytest.raises(sass.DisassemblerError, match="pip install nvidia-cuda-nvdisasm"):
            sass.disassembler()
    finally:
        sass.disassembler.cache_clear()


@pytest.fixture(scope="module")
def compiled():
    needs_disassembler()
    cutlass = pytest.importorskip("cutlass")
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    import ptxsim

    @cute.kernel
    def kernel(a: cute.Tensor, out: cute.Tensor):
        lane, _, _ = cute.arch.thread_idx()
        total = cutlass.Float32(0.0)
        for i in range(lane, cute.size(a), 32):
            total += cute.math.exp(a[i])
        out[lane] = total

    @cute.jit
    def launch(a: cute.Tensor, out: cute.Tensor):
        kernel(a, out).launch(grid=[1, 1, 1], block=[32, 1, 1])

    fakes = (make_fake_tensor(cutlass.Float32, (n,), (1,)) for n in (cute.sym_int(), 32))
    return ptxsim.compile(launch, *fakes, arch="sm_100a")


def test_figures_of_a_kernel_are_those_of_ptxas(compiled):
    (code,), (info,) = sass.of_kernel(compiled).values(), compiled.kernels
    assert (code.name, code.arch, code.registers) == (info.name, 100, info.registers)
    assert code.spill_bytes == code.frame_bytes == info.spill_bytes == 0
    assert code.largest_loop.opcodes["LDG"] >= 1 and code.largest_loop.opcodes["MUFU"] >= 1
    assert code.opcodes["EXIT"] >= 1 and code.opcodes["STG"] == 1
    assert code.code_bytes % 128 == 0 and 0 < code.code_bytes - 16 * code.issue_slots < 256
    assert 0 < code.facts()["largest_loop_bytes"] < code.code_bytes


def test_machine_instructions_are_led_back_to_lines_of_the_ptx(compiled):
    (code,) = sass.of_kernel(compiled).values()
    lines = sass.lines_of(sass.cubin_of(compiled))[code.name]
    (store,) = (each.address for each in code.code if each.base == "STG")
    text = compiled.ptx.splitlines()
    assert "st.global" in text[lines[store] - 1]
    loads = {text[lines[each.address] - 1].split()[0] for each in code.code if each.base == "LDG"}
    assert loads == {"ld.global.b32"} or loads == {"ld.global.f32"}


def test_output_of_another_form_is_refused(compiled, monkeypatch):
    sass.of_cubin.cache_clear()
    monkeypatch.setattr(sass, "disassembled", lambda data, *options: json.dumps([{"SM": {}}, []]))
    with pytest.raises(sass.DisassemblerError, match=r"expected the JSON that nvdisasm 13 prints.*pip install"):
        sass.of_kernel(compiled)
    monkeypatch.undo()


def test_bytes_that_are_no_cubin_are_refused():
    needs_disassembler()
    with pytest.raises(sass.DisassemblerError, match="failed with"):
        sass.disassembled(b"no cubin")

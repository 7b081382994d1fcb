"""Issue slots of machine code, of kernels whose machine code can be counted by hand."""

import pytest

torch = pytest.importorskip("torch")
cutlass = pytest.importorskip("cutlass")
pytest.importorskip("scipy")
pytest.importorskip("networkx")

import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import make_fake_tensor  # noqa: E402

import ptxsim  # noqa: E402
from ptxsim import sass, slots  # noqa: E402

WARPS, LENGTH = 4, 40


@pytest.fixture(scope="module", autouse=True)
def disassembler():
    try:
        return sass.disassembler()
    except sass.DisassemblerError as error:
        pytest.skip(str(error))


@cute.kernel
def plain_kernel(a: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    out[thread] = a[thread] + cute.math.exp(a[thread])


@cute.kernel
def loop_kernel(a: cute.Tensor, out: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    total = cutlass.Float32(0.0)
    for i in cutlass.range(cute.size(a), unroll=1):
        total = cute.math.exp(total) + a[i]
    out[thread] = total


@cute.kernel
def divided_kernel(a: cute.Tensor, out: cute.Tensor):
    """A quarter of each warp goes round a loop; one warp goes round no loop at all."""
    thread, _, _ = cute.arch.thread_idx()
    total = cutlass.Float32(0.0)
    if thread % 32 < 8 and thread < 96:
        for i in cutlass.range(cute.size(a), unroll=1):
            total = cute.math.exp(total) + a[i]
    out[thread] = total


def compiled(kernel, arch):
    @cute.jit
    def launch(a: cute.Tensor, out: cute.Tensor):
        kernel(a, out).launch(grid=[1, 1, 1], block=[32 * WARPS, 1, 1])

    fakes = (make_fake_tensor(cutlass.Float32, (n,), (1,)) for n in (cute.sym_int(), 32 * WARPS))
    return ptxsim.compile(launch, *fakes, arch=arch)


def run(function, length, arch):
    """The slots of one call, its code, and its launch."""
    with ptxsim.emulate(arch=arch, counters=True) as session:
        function(torch.randn(length), torch.zeros(32 * WARPS))
    (launch,), (code,) = session.launches, sass.of_kernel(function).values()
    return slots.issued(launch, code, sass.lines_of(sass.cubin_of(function))[code.name]), code, launch


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_straight_code_is_issued_once_by_every_warp(arch):
    found, code, _ = run(compiled(plain_kernel, arch), 32 * WARPS, arch)
    assert found == (WARPS * code.issue_slots, WARPS * code.issue_slots, 0)


def rounds_of(code):
    """The loop, and the elements that it takes in one round."""
    (loop,) = (loop for loop in code.loops if loop.opcodes["MUFU"])
    return loop, loop.opcodes["LDG"]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_loop_is_issued_as_often_as_it_goes_round(arch):
    function = compiled(loop_kernel, arch)
    (first, code, _), (second, _, _) = run(function, LENGTH, arch), run(function, 2 * LENGTH, arch)
    loop, taken = rounds_of(code)
    more = WARPS * LENGTH // taken * loop.instructions
    assert (second.least - first.least, second.most - first.most) == (more, more)
    once = WARPS * code.issue_slots  # every instruction, and the other rounds
    assert first.least <= once + more - WARPS * loop.instructions and first.most >= more
    assert first.most <= 1.01 * first.least, "whether a loop without rounds is jumped over early"


def test_warps_that_stay_away_and_lanes_that_leave_are_told_apart():
    """Three of four warps go round, whatever the number of their lanes."""
    function = compiled(divided_kernel, "sm_90a")
    (first, code, _), (second, _, _) = run(function, LENGTH, "sm_90a"), run(function, 2 * LENGTH, "sm_90a")
    loop, taken = rounds_of(code)
    more = 3 * LENGTH // taken * loop.instructions
    assert (second.least - first.least, second.most - first.most) == (more, more)
    assert first.most <= 1.02 * first.least


def test_codes_that_do_not_correspond_are_not_counted():
    function = compiled(loop_kernel, "sm_90a")
    _, code, launch = run(function, LENGTH, "sm_90a")
    lines = sass.lines_of(sass.cubin_of(function))[code.name]
    (store,) = (each.address for each in code.code if each.base == "STG")
    assert slots.issued(launch, code, lines) is not None
    assert slots.issued(launch, code, dict.fromkeys(lines, lines[store])) is None, "loads of a line that loads nothing"
    other = sass.of_kernel(compiled(plain_kernel, "sm_90a"))
    with pytest.raises(ValueError, match="code: expected that of the kernel of the launch"):
        slots.issued(launch, *other.values(), lines)

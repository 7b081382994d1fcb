"""racecheck refuses global memory before `griddepcontrol.wait`: who has waited, and what may be read early."""

import re

import pytest

torch = pytest.importorskip("torch")
cutlass = pytest.importorskip("cutlass")

import cutlass.cute as cute  # noqa: E402
import cutlass.experimental.primitives as prims  # noqa: E402
from cutlass import Float32, Int64, const_expr  # noqa: E402
from cutlass.cute.runtime import make_fake_tensor  # noqa: E402
from cutlass.memory import SmemAllocator  # noqa: E402

import ptxsim  # noqa: E402

THREADS = 64
WIDTH = 64


class Copy:
    """out = early + late, of 64 threads; `form` says who waits, and what comes before the wait.

    Correct forms: "wait" (all threads wait), "barrier" (one waits, a barrier follows), "mbarrier" (one waits and
    arrives), "late copy" (a bulk load after the wait), "early read" (declared).
    """

    def __init__(self, form, pdl=True):
        self.form, self.pdl = form, pdl

    @cute.jit
    def __call__(self, early: cute.Tensor, late: cute.Tensor, out: cute.Tensor):
        self.kernel(early, late, out).launch(grid=[2, 1, 1], block=[THREADS, 1, 1], use_pdl=self.pdl)

    @cute.kernel
    def kernel(self, early: cute.Tensor, late: cute.Tensor, out: cute.Tensor):
        form = self.form
        t, _, _ = cute.arch.thread_idx()
        b, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        row = cute.recast_ptr(smem.allocate(WIDTH * 4, 128), dtype=Float32)
        bar = smem.allocate_array(Int64, 2)
        if t == 0:
            cute.arch.mbarrier_init(bar, 1)
            cute.arch.mbarrier_init(bar + 1, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        value = Float32(0.0)
        if const_expr(form in ("early read", "undeclared read")):
            value = early[b, t]
        if const_expr(form == "early write"):
            out[b, t] = Float32(0.0)
        if const_expr(form == "early trigger"):
            cute.arch.griddepcontrol_launch_dependents()
        if const_expr(form == "early copy"):
            if t == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(bar, WIDTH * 4)
                source = late.iterator + cute.crd2idx((b, 0), late.layout)
                prims.cp_async_bulk_shared_cluster_global(row.raw_ptr(), source.raw_ptr(), bar.raw_ptr(), WIDTH * 4)
        if const_expr(form in ("barrier", "one thread", "mbarrier", "arrive before", "late copy")):
            if const_expr(form == "arrive before"):
                if t == 0:
                    cute.arch.mbarrier_arrive(bar)
            if t == 0:
                cute.arch.griddepcontrol_wait()
            if const_expr(form == "mbarrier"):
                if t == 0:
                    cute.arch.mbarrier_arrive(bar)
            if const_expr(form in ("mbarrier", "arrive before")):
                cute.arch.mbarrier_wait(bar, 0)
            if const_expr(form in ("barrier", "late copy")):
                cute.arch.sync_threads()
        elif const_expr(form != "never"):
            cute.arch.griddepcontrol_wait()
        if const_expr(form == "late copy"):
            if t == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(bar, WIDTH * 4)
                source = late.iterator + cute.crd2idx((b, 0), late.layout)
                prims.cp_async_bulk_shared_cluster_global(row.raw_ptr(), source.raw_ptr(), bar.raw_ptr(), WIDTH * 4)
        if const_expr(form in ("early copy", "late copy")):
            cute.arch.mbarrier_wait(bar, 0)
        if const_expr(form not in ("early read", "undeclared read")):
            value = early[b, t]
        if const_expr(form in ("early copy", "late copy")):
            value = value + cute.make_tensor(row, cute.make_layout(WIDTH))[t]
        else:
            value = value + late[b, t]
        out[b, t] = value
        if const_expr(form != "early trigger"):
            cute.arch.griddepcontrol_launch_dependents()


def run(form, reads_before_wait=("early",), pdl=True, together=False, **options):
    fakes = [make_fake_tensor(Float32, (2, WIDTH), (cute.sym_int64(divisibility=4), 1), assumed_align=16)] * 3
    kernel = ptxsim.compile(Copy(form, pdl), *fakes, reads_before_wait=reads_before_wait)
    wide = torch.randn(2, 2 * WIDTH)
    early, late = (wide[:, :WIDTH], wide[:, WIDTH:]) if together else torch.randn(2, 2, WIDTH)
    out = torch.full((2, WIDTH), float("nan"))
    if together:
        out = torch.full((2, 2 * WIDTH), float("nan"))[:, :WIDTH]
    with ptxsim.emulate(racecheck=True, **options) as session:
        kernel(early, late, out)
    assert session.launches[-1].pdl == pdl
    assert torch.equal(out, early + late)


@pytest.mark.parametrize("form", ["wait", "barrier", "mbarrier", "late copy", "early read"])
def test_what_comes_after_a_wait_passes(form):
    run(form)
    run(form, async_mode="late", schedule=1)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("one thread", r"read of 'late' \+ \d+ before griddepcontrol.wait"),
        ("arrive before", r"read of 'late' \+ \d+ before griddepcontrol.wait"),
        ("early write", r"write of 'out' \+ \d+ before griddepcontrol.wait"),
        ("early copy", r"read of 'late' \+ \d+ before griddepcontrol.wait"),
        ("early trigger", "launch_dependents before griddepcontrol.wait"),
        ("never", "no thread executed griddepcontrol.wait"),
    ],
)
def test_what_comes_before_a_wait_is_refused(form, message):
    with pytest.raises(ptxsim.RaceError, match=message) as caught:
        run(form)
    if form != "never":
        assert re.search(r"test_dependent_launch\.py:\d+ \(kernel\)[^|]* \| PTX line \d+", str(caught.value)), (
            caught.value
        )


def test_reads_must_be_declared():
    with pytest.raises(
        ptxsim.RaceError, match=r"read of 'early' \+ 0 .*\n.*\n.*\n.*name the tensor in reads_before_wait"
    ):
        run("undeclared read", reads_before_wait=())
    with pytest.raises(ptxsim.RaceError, match="read of 'early'"):
        run("undeclared read", reads_before_wait=("late",))


def test_writes_cannot_be_declared():
    with pytest.raises(ptxsim.RaceError, match="write of 'out'"):
        run("early write", reads_before_wait=("out",))


def test_tensors_of_one_memory_are_told_apart():
    """Parts of a fused row are one allocation: the declaration holds for the bytes of its tensor alone."""
    run("early read", together=True)
    with pytest.raises(ptxsim.RaceError, match="read of 'early'"):
        run("undeclared read", reads_before_wait=("late",), together=True)


def test_declared_names_are_arguments():
    with pytest.raises(ValueError, match=r"reads_before_wait names \['state'\]"):
        run("wait", reads_before_wait=("state",))


def test_a_kernel_that_waits_is_watched_however_it_is_launched():
    with pytest.raises(ptxsim.RaceError, match="write of 'out'"):
        run("early write", pdl=False)
    run("never", pdl=False)  # neither the attribute nor the instruction: a kernel in stream order


def test_atomics_count_as_writes():
    text = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out) {
.reg .b64 %rd<2>;
ld.param.u64 %rd1, [out];
red.global.add.u32 [%rd1], 1;
griddepcontrol.wait;
red.global.add.u32 [%rd1], 1;
ret;
}
"""
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ptxsim.RaceError, match=r"write of 'arg0' \+ 0 .*\n.*PTX line 7: red"):
        ptxsim.run(text, "k", 1, 32, [out], racecheck=True, reads_before_wait=("arg0",))
    ptxsim.run(text.replace("red.global.add.u32 [%rd1], 1;\ngriddep", "griddep"), "k", 1, 32, [out], racecheck=True)

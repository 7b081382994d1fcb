"""A small CuTe DSL kernel with bulk copies, a ring of stages and named bugs: each is caught and leads to its line."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
cutlass = pytest.importorskip("cutlass")

import cutlass.cute as cute  # noqa: E402
import cutlass.experimental.primitives as prims  # noqa: E402
from cutlass import Float32, Int32, Int64, const_expr  # noqa: E402
from cutlass.cute.runtime import make_fake_tensor  # noqa: E402
from cutlass.memory import SmemAllocator  # noqa: E402

import ptxsim  # noqa: E402

WIDTH, THREADS, STAGES = 128, 64, 2
BYTES = WIDTH * 4
MODES = [
    {},
    dict(async_mode="late"),
    *(dict(schedule=s) for s in (1, 2, 3)),
    dict(racecheck=True, initcheck=True),
    dict(racecheck=True, initcheck=True, async_mode="late", schedule=4),
]


class Reverse:
    """out[r] = 2 * x[r] reversed, one CTA per row at a time: bulk load, double into a tile, reverse, bulk store.

    Thread 0 requests the next row while all threads work on this one.  Doubling and reversing cross warps.  Correct
    variants: "full wait" waits for the stores' writes, "spare load" asks for one row more and awaits it in one warp.
    """

    def __init__(self, bug=""):
        self.bug = bug

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, ctas: Int32):
        self.kernel(x, out).launch(grid=[ctas, 1, 1], block=[THREADS, 1, 1])

    @cute.jit
    def request(self, x, row, stage, full):
        source = x.iterator + cute.crd2idx((row, 0), x.layout)
        expected = BYTES + 16 if const_expr(self.bug == "deadlock") else BYTES
        cute.arch.mbarrier_arrive_and_expect_tx(full, expected)
        prims.cp_async_bulk_shared_cluster_global(stage.raw_ptr(), source.raw_ptr(), full.raw_ptr(), BYTES)

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor):
        bug = self.bug
        t, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        smem = SmemAllocator()
        ring, doubled, tile = (cute.recast_ptr(smem.allocate(n * BYTES, 128), dtype=Float32) for n in (STAGES, 1, 1))
        full = smem.allocate_array(Int64, STAGES)
        if t == 0:
            for i in cutlass.range_constexpr(STAGES):
                cute.arch.mbarrier_init(full + i, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        rows = x.shape[0]
        if t == 0:
            self.request(x, row, ring, full)
        stage, phase = Int32(0), Int32(0)
        while row < rows:
            after = stage ^ 1
            following = row + ctas
            last = following <= rows if const_expr(bug == "row past the end") else following < rows
            if t == 0:
                if last:
                    self.request(x, following, ring + after * WIDTH, full + after)
                elif const_expr(bug in ("spare load", "load not waited")):
                    self.request(x, row, ring + after * WIDTH, full + after)
            cute.arch.mbarrier_wait(full + stage, phase)
            values = cute.make_tensor(ring + stage * WIDTH, cute.make_layout(WIDTH))
            scratch = cute.make_tensor(doubled, cute.make_layout(WIDTH))
            target = cute.make_tensor(tile, cute.make_layout(WIDTH))
            if const_expr(bug == "uninitialised"):
                if t >= 4:
                    scratch[t] = values[t] * 2.0
            else:
                scratch[t] = values[t] * 2.0
            scratch[t + THREADS] = values[t + THREADS] * 2.0
            if const_expr(bug != "missing barrier"):
                cute.arch.sync_threads()
            target[t] = scratch[WIDTH - 1 - t]
            target[t + THREADS] = scratch[WIDTH - 1 - THREADS - t]
            if const_expr(bug != "missing proxy fence"):
                cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.sync_threads()
            if t == 0:
                goal = out.iterator + cute.crd2idx((row, 0), out.layout)
                prims.cp_async_bulk_global_shared_cta(goal.raw_ptr(), tile.raw_ptr(), BYTES)
                if const_expr(bug == "store not committed"):
                    if last:
                        cute.arch.cp_async_bulk_commit_group()
                else:
                    cute.arch.cp_async_bulk_commit_group()
                if const_expr(bug == "store not waited"):
                    if last:
                        cute.arch.cp_async_bulk_wait_group(0, read=True)
                elif const_expr(bug != "early reuse"):
                    cute.arch.cp_async_bulk_wait_group(0, read=bug != "full wait")
            cute.arch.sync_threads()
            row = following
            if const_expr(bug != "wrong phase"):
                phase = phase ^ 1 if after == 0 else phase
            stage = after
        if const_expr(bug == "spare load"):
            if t >= 32:
                cute.arch.mbarrier_wait(full + stage, phase)


def compiled(bug="", **options):
    rows = cute.sym_int()
    fakes = [
        make_fake_tensor(Float32, (rows, WIDTH), (cute.sym_int64(divisibility=4), 1), assumed_align=16)
        for _ in range(2)
    ]
    return ptxsim.compile(Reverse(bug), *fakes, Int32(1), **options)


@pytest.fixture(scope="module", params=["", "full wait", "spare load"])
def correct(request):
    return compiled(request.param)


def run(kernel, rows=5, ctas=2, **options):
    x, out = torch.randn(rows, WIDTH), torch.full((rows, WIDTH), float("nan"))
    with ptxsim.emulate(**options):
        kernel(x, out, ctas)
    return out, 2 * x.flip(1)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_correct_kernel_passes(correct, options):
    out, want = run(correct, **options)
    assert torch.equal(out, want)


RACE = dict(racecheck=True)


@pytest.mark.parametrize(
    "bug,options,error,message,line,source",
    [
        ("missing barrier", RACE, ptxsim.RaceError, "write-read race on shared byte", "ld.shared", "= scratch[W"),
        (
            "missing proxy fence",
            RACE,
            ptxsim.RaceError,
            "missing fence.proxy.async",
            "cp.async.bulk.global.shared",
            "prims.cp_async_bulk_global",
        ),
        (
            "wrong phase",
            dict(racecheck=True, async_mode="late"),
            ptxsim.RaceError,
            "mbarrier not waited for",
            "ld.shared",
            "= values[t",
        ),
        (
            "wrong phase",
            {},
            ptxsim.Deadlock,
            "threads .*wait .*phase 0, 1 arrivals",
            "mbarrier.try_wait",
            "mbarrier_wait(",
        ),
        (
            "early reuse",
            RACE,
            ptxsim.RaceError,
            "read-write race.*\n.*\n.*bulk copy issued by warp 0",
            "st.shared",
            "target[t",
        ),
        ("row past the end", {}, ptxsim.MemoryFault, "past the end of 'x'", "cp.async.bulk.shared", "prims.cp_async"),
        (
            "uninitialised",
            dict(initcheck=True),
            ptxsim.UninitialisedRead,
            "that nothing has written",
            "ld.shared",
            "= scratch[W",
        ),
        (
            "deadlock",
            {},
            ptxsim.Deadlock,
            r"threads .*wait .*mbarrier at shared 0x\w+: phase 0, 0 arrivals and 16 bytes outstanding\) at .*PTX line",
            "mbarrier.try_wait",
            "mbarrier_wait(",
        ),
        (
            "store not waited",
            RACE,
            ptxsim.RaceError,
            r"kernel kernel_\w+\n.* at exit: it reads .*\n.*\n.*thread \(0,0,0\) of CTA \(.,0,0\)\n"
            r".*: wait for the group with cp.async.bulk.wait_group.read 0 before exit",
            "cp.async.bulk.global.shared",
            "prims.cp_async_bulk_global",
        ),
        (
            "store not committed",
            RACE,
            ptxsim.RaceError,
            "way out: commit it with cp.async.bulk.commit_group and wait",
            "cp.async.bulk.global.shared",
            "prims.cp_async_bulk_global",
        ),
        *(
            (
                "load not waited",
                dict(racecheck=True, async_mode=mode),
                ptxsim.RaceError,
                r"at exit: it writes .*\n.*\n.*thread \(0,0,0\) of CTA \(.,0,0\)\n.*wait for the phase of the mbarrier",
                "cp.async.bulk.shared",
                "prims.cp_async_bulk_shared",
            )
            for mode in ("early", "late")
        ),
    ],
)
def test_each_bug_is_caught_at_its_line(bug, options, error, message, line, source):
    """`line`: what the PTX line has that the message names, `source`: what the Python line has."""
    kernel = compiled(bug)
    with pytest.raises(error) as caught:
        run(kernel, **options)
    text = str(caught.value)
    assert re.search(message, text), text
    named = [kernel.ptx.splitlines()[int(n) - 1] for n in re.findall(r"PTX line (\d+)", text)]
    assert any(line in ptx for ptx in named), text
    mine = Path(__file__).read_text().splitlines()
    python = [mine[int(n) - 1] for n in re.findall(r"test_seeded_bugs\.py:(\d+) \((?:kernel|request)\)", text)]
    assert any(source in found for found in python), text


@pytest.mark.parametrize("bug", ["store not waited", "load not waited"])
def test_copies_in_flight_at_exit_leave_the_results_right(bug):
    """Nothing but the check sees these bugs, and it reports each copy once."""
    kernel = compiled(bug)
    for mode in ("early", "late"):
        out, want = run(kernel, async_mode=mode)
        assert torch.equal(out, want)
    x = torch.randn(5, WIDTH)
    with ptxsim.emulate(racecheck=True, race_raise=False) as session:
        kernel(x, torch.empty_like(x), 2)
    assert len(session.launches[-1].races) == 1


@pytest.mark.parametrize("bug", ["wrong phase", "early reuse"])
def test_late_mode_shows_wrong_results(bug):
    """Without racecheck, asynchronous copies that complete late make the bug visible in the output."""
    out, want = run(compiled(bug), async_mode="late")
    assert not torch.equal(out, want)


def test_findings_of_one_cause_are_told_together():
    """One missing barrier: two pairs of instructions race, in one function."""
    with pytest.raises(ptxsim.RaceError, match=r"racecheck: 2 finding\(s\) in kernel \S+, of 1 cause\(s\)\n") as caught:
        run(compiled("missing barrier"), **RACE)
    text = str(caught.value)
    assert text.count("2 findings of one cause, first:") == text.count("write-read race") == 1
    assert len(re.findall(r"    also at: tests/test_seeded_bugs.py:\d+ \(kernel\).*; .*PTX line \d+\n?", text)) == 1


def test_line_information_leaves_the_code_as_it_is():
    """Instructions, registers and counters are those of a compile without it; no Python line is known then."""
    texts, counted = [], []
    for lines in (True, False):
        kernel = compiled("", source_lines=lines)
        code = [line for line in kernel.ptx.splitlines() if not re.match(r"\s*(\.(loc|file)\b|//|$)", line)]
        texts.append((code, [(k.registers, k.spill_bytes) for k in kernel.kernels]))
        with ptxsim.emulate(counters=True) as session:
            kernel(torch.ones(5, WIDTH), torch.empty(5, WIDTH), 2)
        counted.append(session.launches[-1].counters.as_dict())
    assert texts[0] == texts[1]
    assert counted[0]["instructions"] == counted[1]["instructions"]
    with pytest.raises(ptxsim.MemoryFault, match=r"kernel \w+, PTX line \d+, thread"):
        run(compiled("row past the end", source_lines=False))


class Overlap:
    """Two CTAs store to the same row, or one reads what the other stored."""

    def __init__(self, kind):
        self.kind = kind

    @cute.jit
    def __call__(self, x: cute.Tensor):
        self.kernel(x).launch(grid=[2, 1, 1], block=[32, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor):
        t, _, _ = cute.arch.thread_idx()
        b, _, _ = cute.arch.block_idx()
        if const_expr(self.kind == "write-write"):
            x[0, t] = Float32(b)
        elif const_expr(self.kind == "write-read"):
            if b == 0:
                x[0, t] = Float32(1.0)
            else:
                x[1, t] = x[0, t]
        else:
            x[b, t] = Float32(b)


@pytest.mark.parametrize("kind", ["write-write", "write-read", "none"])
def test_races_between_ctas(kind):
    kernel = ptxsim.compile(Overlap(kind), make_fake_tensor(Float32, (2, 32), (32, 1)))
    x = torch.zeros(2, 32)
    with ptxsim.emulate(racecheck=True):
        if kind == "none":
            return kernel(x)
        with pytest.raises(ptxsim.RaceError, match="between CTAs on 'x'") as caught:
            kernel(x)
    assert "st.global" in str(caught.value)

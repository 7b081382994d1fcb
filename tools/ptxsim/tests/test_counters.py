"""Counters against figures worked out by hand."""

import pytest

torch = pytest.importorskip("torch")
cutlass = pytest.importorskip("cutlass")

import cutlass.cute as cute  # noqa: E402
import cutlass.experimental.primitives as prims  # noqa: E402
from cutlass import Float32, Int32, Int64, const_expr  # noqa: E402
from cutlass.cute.runtime import make_fake_tensor  # noqa: E402
from cutlass.memory import SmemAllocator  # noqa: E402

import ptxsim  # noqa: E402

MOVED = [f"{level}{kind}_bytes" for kind in ("read", "write") for level in ("", "l2_", "dram_")]


class Pick:
    """One CTA per row of ``out``; what each thread reads is chosen by ``how``."""

    def __init__(self, how):
        self.how = how

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, out: cute.Tensor):
        self.kernel(x, y, out).launch(grid=[out.shape[0], 1, 1], block=[32, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, out: cute.Tensor):
        t, _, _ = cute.arch.thread_idx()
        b, _, _ = cute.arch.block_idx()
        if const_expr(self.how == "shared scalar"):
            out[b, t] = x[b, 0]
        elif const_expr(self.how == "own element"):
            out[b, t] = x[b, t]
        elif const_expr(self.how == "one row for all"):
            out[b, t] = x[0, t]
        elif const_expr(self.how == "stride 8"):
            out[b, t] = x[b, 8 * t]
        else:  # half of the lanes read x, half read y, in one instruction
            pointer = x.iterator.toint() if t < 16 else y.iterator.toint()
            source = cute.make_ptr(Float32, pointer, cute.AddressSpace.gmem, assumed_align=4)
            out[b, t] = cute.make_tensor(source, cute.make_layout(32))[t]


def count(how, rows=4, columns=32):
    fake = [make_fake_tensor(Float32, (cute.sym_int(), cute.sym_int()), (cute.sym_int64(), 1)) for _ in range(3)]
    x, y, out = torch.randn(rows, columns), torch.randn(rows, columns), torch.zeros(rows, 32)
    with ptxsim.emulate(counters=True) as session:
        ptxsim.compile(Pick(how), *fake)(x, y, out)
    counters = session.launches[-1].counters.as_dict()
    assert [counters["tensors"]["out"][k] for k in MOVED] == [0, 0, 0] + [rows * 128] * 3
    for name in MOVED:
        assert counters[name] == sum(t[name] for t in counters["tensors"].values())
    return {n: [t[k] for k in MOVED[:3]] for n, t in counters["tensors"].items() if n != "out"}, counters


@pytest.mark.parametrize(
    "how,asked,sectors,distinct",
    [
        ("own element", 4 * 128, 4 * 128, 4 * 128),
        ("shared scalar", 4 * 4, 4 * 32, 4 * 32),
        ("one row for all", 4 * 128, 4 * 128, 128),
    ],
)
def test_reads_of_one_tensor(how, asked, sectors, distinct):
    assert count(how)[0] == {"x": [asked, sectors, distinct]}


def test_strided_reads_take_a_sector_each():
    assert count("stride 8", columns=256)[0] == {"x": [4 * 128, 4 * 32 * 32, 4 * 32 * 32]}


def test_one_instruction_over_two_tensors():
    assert count("both", rows=1)[0] == {"x": [64, 64, 64], "y": [64, 64, 64]}


def test_instructions_are_counted_per_warp():
    one, four = count("own element", rows=1)[1], count("own element", rows=4)[1]
    assert four["instructions"]["total"] == 4 * one["instructions"]["total"]
    assert one["instructions"]["load/store"] == 2 + sum(
        "ld.param" in line
        for line in ptxsim.compile(
            Pick("own element"),
            *[make_fake_tensor(Float32, (cute.sym_int(), cute.sym_int()), (cute.sym_int64(), 1)) for _ in range(3)],
        ).ptx.splitlines()
    )
    assert sum(v for k, v in one["instructions"].items() if k != "total") == one["instructions"]["total"]


class BulkCopy:
    """Each CTA copies ``rows`` rows of 64 floats to shared memory and back by bulk copies."""

    @cute.jit
    def __call__(self, x: cute.Tensor, out: cute.Tensor, column: Int32):
        self.kernel(x, out, column).launch(grid=[out.shape[0], 1, 1], block=[32, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor, out: cute.Tensor, column: Int32):
        t, _, _ = cute.arch.thread_idx()
        b, _, _ = cute.arch.block_idx()
        smem = SmemAllocator()
        tile = cute.recast_ptr(smem.allocate(256, 128), dtype=Float32)
        full = smem.allocate_array(Int64, 1)
        if t == 0:
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.mbarrier_arrive_and_expect_tx(full, 256)
            source, goal = (
                x.iterator + cute.crd2idx((b, column), x.layout),
                out.iterator + cute.crd2idx((b, 0), out.layout),
            )
            prims.cp_async_bulk_shared_cluster_global(tile.raw_ptr(), source.raw_ptr(), full.raw_ptr(), 256)
            cute.arch.mbarrier_wait(full, 0)
            prims.cp_async_bulk_global_shared_cta(goal.raw_ptr(), tile.raw_ptr(), 256)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0)


@pytest.mark.parametrize("column,sectors", [(0, 8), (4, 9)])
def test_bulk_copies_count_sectors_by_absolute_address(column, sectors):
    fakes = [
        make_fake_tensor(
            Float32, (cute.sym_int(), cute.sym_int()), (cute.sym_int64(divisibility=4), 1), assumed_align=16
        )
        for _ in range(2)
    ]
    x, out = torch.randn(3, 96), torch.zeros(3, 64)
    with ptxsim.emulate(counters=True) as session:
        ptxsim.compile(BulkCopy(), *fakes, Int32(0))(x, out, column)
    assert torch.equal(out, x[:, column : column + 64])
    moved = session.launches[-1].counters.as_dict()
    assert [moved["tensors"]["x"][k] for k in MOVED[:3]] == [768, 3 * 32 * sectors, 3 * 32 * sectors]
    assert [moved["tensors"]["out"][k] for k in MOVED[3:]] == [768, 768, 768]
    assert moved["bulk_copies"] == 6 and moved["smem_wavefronts"] == 0


def test_neighbours_share_a_sector_once():
    """Two views of one allocation whose rows meet inside a sector: counted for each, but once for the launch."""
    pool = torch.randn(72)
    x, y = pool[:36].view(1, 36), pool[36:].view(1, 36)
    fakes = [make_fake_tensor(Float32, (1, 36), (36, 1)) for _ in range(2)] + [
        make_fake_tensor(Float32, (1, 32), (32, 1))
    ]

    class Sum(Pick):
        @cute.kernel
        def kernel(self, x: cute.Tensor, y: cute.Tensor, out: cute.Tensor):
            t, _, _ = cute.arch.thread_idx()
            out[0, t] = x[0, t + 4] + y[0, t]

    out = torch.zeros(1, 32)
    with ptxsim.emulate(counters=True) as session:
        ptxsim.compile(Sum(""), *fakes)(x, y, out)
    moved = session.launches[-1].counters.as_dict()
    assert torch.equal(out[0], x[0, 4:] + y[0, :32])
    assert [moved["tensors"][n]["dram_read_bytes"] for n in "xy"] == [160, 160] and moved["dram_read_bytes"] == 288


class Fused:
    """out = x + y shifted by ``skip`` columns."""

    def __init__(self, skip):
        self.skip = skip

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, out: cute.Tensor):
        self.kernel(x, y, out).launch(grid=[out.shape[0], 1, 1], block=[32, 1, 1])

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, out: cute.Tensor):
        t, _, _ = cute.arch.thread_idx()
        b, _, _ = cute.arch.block_idx()
        out[b, t] = x[b, t] + y[b, t + self.skip]


def test_interleaved_arguments():
    """Slices of one fused projection: traffic by slice, and a fault only where no argument is."""
    pool, out = torch.randn(3, 96), torch.zeros(3, 32)
    x, y = pool[:, :32], pool[:, 32:64]
    fakes = [make_fake_tensor(Float32, (cute.sym_int(), 32), (cute.sym_int64(), 1)) for _ in range(3)]
    with ptxsim.emulate(counters=True) as session:
        ptxsim.compile(Fused(0), *fakes)(x, y, out)
    assert torch.equal(out, x + y)
    moved = session.launches[-1].counters.as_dict()["tensors"]
    assert {n: t["dram_read_bytes"] for n, t in moved.items()} == {"x": 384, "y": 384, "out": 0}
    with ptxsim.emulate(), pytest.raises(ptxsim.MemoryFault, match="in the gap between rows of 'y'"):
        ptxsim.compile(Fused(32), *fakes)(x[:2], y[:2], out[:1])

"""Warp-wide, barrier and tensor-copy instructions that the kernels of the other tests do not use, as PTX."""

import numpy as np
import pytest

import ptxsim
from ptxsim import tensormap


def run(body, x, out, threads=32, params="", args=(), decls="", grid=1, **options):
    """%a = x[tid] -> %d = out[tid] (b32)."""
    text = f""".version 8.3
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 pd{params}) {{
.reg .b32 %i, %a, %d, %r<16>; .reg .b64 %p, %q, %x<8>; .reg .pred %t, %u; .reg .b16 %h<8>; .reg .f32 %f<16>;
{decls}
mov.u32 %i, %tid.x;
ld.param.u64 %p, [px]; mad.wide.u32 %q, %i, 4, %p; ld.global.b32 %a, [%q];
{body}
ld.param.u64 %p, [pd]; mad.wide.u32 %q, %i, 4, %p; st.global.b32 [%q], %d;
ret;
}}"""
    return ptxsim.run(text, "k", grid, threads, [x, out, *args], **options)


@pytest.mark.parametrize(
    "op,fold",
    [
        ("add.u32", np.add),
        ("min.s32", np.minimum),
        ("max.s32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_redux(op, fold, rng):
    x, out = rng.integers(-1000, 1000, 32).astype(np.int32), np.zeros(32, np.int32)
    run(
        f"setp.lt.u32 %t, %i, 20; @%t redux.sync.{op} %d, %a, 0xFFFFF; @!%t redux.sync.{op} %d, %a, 0xFFF00000;", x, out
    )
    assert (out[:20] == fold.reduce(x[:20])).all() and (out[20:] == fold.reduce(x[20:])).all()


def test_match(rng):
    x, out = rng.integers(0, 4, 32).astype(np.uint32), np.zeros(32, np.uint32)
    run("match.any.sync.b32 %d, %a, 0xFFFFFFFF;", x, out)
    assert out.tolist() == [sum(1 << j for j in range(32) if x[j] == v) for v in x]
    run("match.all.sync.b32 %d|%t, %a, 0xFFFFFFFF; @!%t mov.u32 %d, 7;", np.full(32, 5, np.uint32), out)
    assert (out == 0xFFFFFFFF).all()
    run("match.all.sync.b32 %d|%t, %a, 0xFFFFFFFF; @!%t mov.u32 %d, 7;", np.arange(32, dtype=np.uint32), out)
    assert (out == 7).all()


def test_fns():
    x, out = np.full(32, 0b10110100, np.uint32), np.zeros(32, np.uint32)
    run("mov.u32 %r0, 2; add.s32 %r1, %i, 1; fns.b32 %d, %a, %r0, %r1;", x, out)
    assert out[:5].tolist() == [2, 4, 5, 7, 0xFFFFFFFF]


@pytest.mark.parametrize(
    "op,want", [("popc.u32", lambda p: p.sum()), ("and.pred", lambda p: p.all()), ("or.pred", lambda p: p.any())]
)
def test_barrier_reductions(op, want, rng):
    x, out = rng.integers(0, 2, 96).astype(np.uint32), np.zeros(96, np.uint32)
    target = "%d" if op == "popc.u32" else "%u"
    tail = "" if op == "popc.u32" else "selp.u32 %d, 1, 0, %u;"
    run(f"setp.ne.u32 %t, %a, 0; barrier.cta.red.{op} {target}, 0, %t; {tail}", x, out, threads=96)
    assert (out == int(want(x))).all()


def test_mbarrier_arrive_drop_and_counts():
    """32 threads arrive, 16 of them for good: the next phase needs the other 16 only."""
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    wait = "W{0}: mbarrier.try_wait.parity.shared.b64 %t, [%r0], {0}; @!%t bra W{0};"
    run(
        f"""mov.u32 %r0, bar; setp.eq.u32 %t, %i, 0; @%t mbarrier.init.shared.b64 [%r0], 32;
bar.sync 0;
setp.lt.u32 %u, %i, 16;
@%u mbarrier.arrive_drop.shared.b64 %x0, [%r0];
@!%u mbarrier.arrive.shared.b64 %x0, [%r0];
{wait.format(0)}
@!%u mbarrier.arrive.shared.b64 %x0, [%r0];
{wait.format(1)}
mov.u32 %d, 1;""",
        x,
        out,
        decls=".shared .align 8 .b64 bar;",
    )
    assert (out == 1).all()


def test_vector_and_packed_atomics(rng):
    x, out, table = np.zeros(32, np.uint32), np.zeros(32, np.uint32), np.zeros(8, np.float32)
    run(
        """ld.param.u64 %x0, [pt]; and.b32 %r0, %i, 1; mad.wide.u32 %x0, %r0, 16, %x0; cvt.rn.f32.u32 %f0, %i;
mov.f32 %f1, 0f3F800000; red.global.add.v4.f32 [%x0], {%f0, %f1, %f1, %f0}; mov.u32 %d, 0;""",
        x,
        out,
        params=", .param .u64 pt",
        args=[table],
    )
    even, odd = sum(range(0, 32, 2)), sum(range(1, 32, 2))
    assert table.tolist() == [even, 16, 16, even, odd, 16, 16, odd]
    halves = np.zeros(4, np.uint16)
    run(
        """ld.param.u64 %x0, [pt]; mov.u32 %r1, 0x40003C00; red.global.add.noftz.f16x2 [%x0], %r1; mov.u32 %d, 0;""",
        x,
        out,
        params=", .param .u64 pt",
        args=[halves],
    )
    assert halves.view(np.float16)[:2].tolist() == [32.0, 64.0]


SHAPE, BOX = (3, 2, 5, 6, 16), (1, 2, 3, 4, 16)


def tensor_map(array, box):
    dims, strides = array.shape[::-1], array.strides[::-1]
    raw = tensormap.encode(array.ctypes.data, "f32", dims, strides[1:], box[::-1])
    return bytes(raw).ljust(128, b"\0")


def aligned(shape, rng):
    flat = np.zeros(int(np.prod(shape)) + 64, np.float32)
    flat[:] = rng.normal(size=len(flat))
    start = -flat.ctypes.data % 128 // 4
    return flat[start : start + int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("reduce", ["", "add", "max"])
def test_tensor_copies(rank, reduce, late, rng):
    """A box that sticks out of the tensor: loaded with zeros outside, stored or reduced inside only."""
    shape, box = SHAPE[5 - rank :], BOX[5 - rank :]
    source, target = aligned(shape, rng), aligned(shape, rng)
    before = target.copy()
    first = [max(0, n - b // 2 - 1) if axis < rank - 1 else 4 for axis, (n, b) in enumerate(zip(shape, box))]
    coords = ", ".join(str(c) for c in first[::-1])
    size = int(np.prod(box)) * 4
    store = (
        f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{reduce}.tile.bulk_group"
        if reduce
        else f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
    )
    x, out = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    run(
        f"""mov.u32 %r0, tile; mov.u32 %r1, bar; setp.ne.u32 %t, %i, 0; @%t bra DONE;
mov.b64 %x0, pa; cvta.param.u64 %x0, %x0; mov.b64 %x1, pb; cvta.param.u64 %x1, %x1;
prefetch.tensormap [%x0];
mbarrier.init.shared.b64 [%r1], 1; fence.proxy.async.shared::cta;
mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {size};
cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r0], [%x0, {{{coords}}}], [%r1];
W: mbarrier.try_wait.parity.shared.b64 %u, [%r1], 0; @!%u bra W;
{store} [%x1, {{{coords}}}], [%r0];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
DONE: mov.u32 %d, 0;""",
        x,
        out,
        params=", .param .align 64 .b8 pa[128], .param .align 64 .b8 pb[128]",
        args=[tensor_map(source, box), tensor_map(target, box)],
        buffers=[("source", source), ("target", target)],
        decls=f".shared .align 128 .b8 tile[{size}]; .shared .align 8 .b64 bar;",
        async_mode="late" if late else "early",
        racecheck=True,
        initcheck=True,
    )
    window = tuple(slice(f, f + b) for f, b in zip(first, box))
    want = before.copy()
    want[window] = {
        "": source[window],
        "add": before[window] + source[window],
        "max": np.maximum(before[window], source[window]),
    }[reduce]
    assert np.array_equal(target, want)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("waiting", [1, 2])
def test_every_cta_waits_for_a_multicast(waiting, late, rng):
    """CTA 0 of two loads a tile into both; one thread's wait is enough for a CTA, and no CTA waits for another one."""
    source, x, out = aligned((32,), rng), np.zeros(32, np.uint32), np.zeros(64, np.float32)

    def launch():
        run(
            f"""mov.u32 %r0, tile; mov.u32 %r1, bar; mov.u32 %r2, %ctaid.x; setp.ne.u32 %t, %i, 0; @%t bra READY;
mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;
READY: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
or.b32 %r3, %r2, %i; setp.ne.u32 %t, %r3, 0; @%t bra ASKED;
mov.b64 %x0, pa; cvta.param.u64 %x0, %x0; mov.u16 %h0, 3;
cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
[%r0], [%x0, {{0}}], [%r1], %h0;
ASKED: mov.u32 %d, 0; setp.ge.u32 %t, %r2, {waiting}; @%t bra DONE;
setp.ne.u32 %t, %i, 5; @%t bra WAITED;
W: mbarrier.try_wait.parity.shared.b64 %u, [%r1], 0; @!%u bra W;
WAITED: bar.sync 0; mad.lo.u32 %r4, %i, 4, %r0; ld.shared.b32 %d, [%r4];
DONE: mad.lo.u32 %i, %r2, 32, %i;""",
            x,
            out,
            params=", .param .align 64 .b8 pa[128]",
            args=[tensor_map(source, (32,))],
            buffers=[("source", source)],
            decls=".shared .align 128 .b8 tile[128]; .shared .align 8 .b64 bar;",
            grid=2,
            cluster=2,
            async_mode="late" if late else "early",
            racecheck=True,
            initcheck=True,
        )

    if waiting == 2:
        launch()
        assert np.array_equal(out, np.r_[source, source])
        return
    with pytest.raises(ptxsim.RaceError, match="1 finding") as caught:
        launch()
    text = str(caught.value)
    assert "it writes shared memory of CTA (1,0,0)" in text and "by thread (0,0,0) of CTA (0,0,0)" in text, text
    assert np.array_equal(out[:32], source)

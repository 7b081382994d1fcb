"""Spellings of memory and synchronisation instructions that compilers emit for sm_90a and sm_100a."""

import numpy as np
import pytest

import ptxsim

KERNEL = """.version 8.8
.target {arch}
.address_size 64
.visible .entry k(.param .u64 px, .param .u64 py) {{
.reg .b32 %r<8>; .reg .b64 %p, %q, %policy, %g, %h; .reg .pred %t, %one; .reg .f32 %f;
.shared .align 128 .b8 tile[512]; .shared .align 8 .b64 bar;
ld.param.u64 %p, [px]; ld.param.u64 %q, [py];
cvta.to.global.u64 %g, %p; cvta.to.global.u64 %h, %q;
mov.u32 %r0, %tid.x; setp.eq.u32 %one, %r0, 0;
createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %policy, 0.5;
createpolicy.fractional.L2::evict_last.b64 %policy, 1.0;
griddepcontrol.wait;
griddepcontrol.launch_dependents;
prefetch.global.L2 [%g]; prefetch.global.L2::evict_last [%g]; prefetchu.L1 [%p];
mov.u32 %r1, tile; mov.u32 %r2, bar;
@%one mbarrier.init.shared::cta.b64 [%r2], 1;
fence.mbarrier_init.release.cluster;
fence.proxy.async.shared::cta; fence.proxy.async; fence.proxy.async.global; fence.proxy.alias;
fence.acq_rel.gpu; fence.sc.cta; membar.gl;
bar.sync 0;
@!%one bra WAIT;
cp.async.bulk.prefetch.L2.global.L2::cache_hint [%g], 512, %policy;
mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], 512;
cp.async.bulk.{shared}.global.mbarrier::complete_tx::bytes.L2::cache_hint [%r1], [%g], 512, [%r2], %policy;
WAIT:
mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %t, [%r2], 0, 10000000;
@!%t bra WAIT;
mbarrier.test_wait.parity.shared::cta.b64 %t, [%r2], 0;
mad.lo.u32 %r3, %r0, 4, %r1;
ld.shared::cta.f32 %f, [%r3];
add.f32 %f, %f, %f;
st.shared.f32 [%r3], %f;
fence.proxy.async.shared::cta;
barrier.cta.sync.aligned 0, 128;
@!%one bra DONE;
cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%h], [%r1], 512, %policy;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
cp.async.bulk.wait_group 0;
DONE:
ret;
}}"""


@pytest.mark.parametrize(
    "options", [{}, dict(async_mode="late", schedule=1), dict(racecheck=True, initcheck=True)], ids=str
)
@pytest.mark.parametrize(
    "arch,shared", [("sm_90a", "shared::cluster"), ("sm_100a", "shared::cta"), ("sm_103a", "shared::cta")]
)
def test_bulk_copies_hints_and_fences(arch, shared, options):
    x, y = np.arange(132, dtype=np.float32), np.zeros(132, np.float32)
    x, y = (v[-v.ctypes.data % 16 // 4 :][:128] for v in (x, y))
    ptxsim.run(KERNEL.format(arch=arch, shared=shared), "k", 1, 128, [x, y], **options)
    assert np.array_equal(y, 2 * x)


@pytest.mark.parametrize(
    "wrong,error",
    [
        ("cp.async.bulk.commit_group;", None),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", "tcgen05"),
        ("red.async.relaxed.cluster.global.add.u32 [%g], %r0;", "async"),
        ("cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%h], [%r1], 512, %r0;", "cp_mask"),
        ("mov.u32 %r4, %pm0;", r"PTX line \d+: special register %pm0"),
    ],
)
def test_forms_outside_the_model_are_refused_when_executed(wrong, error):
    text = KERNEL.format(arch="sm_100a", shared="shared::cta").replace("griddepcontrol.wait;", wrong)
    x, y = np.zeros(132, np.float32), np.zeros(132, np.float32)
    x, y = (v[-v.ctypes.data % 16 // 4 :][:128] for v in (x, y))
    if error is None:
        ptxsim.run(text, "k", 1, 128, [x, y])
        return
    with pytest.raises(ptxsim.UnsupportedInstruction, match=error):
        ptxsim.run(text, "k", 1, 128, [x, y])


def test_endless_loops_are_reported():
    text = """.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 px) {
.reg .b64 %p; .reg .b32 %r; .reg .pred %t;
ld.param.u64 %p, [px];
AGAIN:
ld.volatile.global.u32 %r, [%p];
setp.eq.u32 %t, %r, 0;
@%t bra AGAIN;
ret;
}"""
    with pytest.raises(ptxsim.Deadlock, match="livelock"):
        ptxsim.run(text, "k", 1, 32, [np.zeros(1, np.uint32)], max_blocks=1000)

"""Kernels in PTX whose time on a machine with given constants can be worked out by hand."""

HEAD = """.version 8.0
.target sm_90a
.address_size 64
"""

COPY = (
    HEAD
    + """.visible .entry copy(.param .u64 out, .param .u64 in, .param .u32 trips) {
.reg .b32 %r<12>; .reg .b64 %d<8>; .reg .pred %p;
ld.param.u64 %d1, [in]; ld.param.u64 %d2, [out]; ld.param.u32 %r1, [trips];
mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x;
mul.lo.u32 %r5, %r4, %r1; shl.b32 %r6, %r5, 2; mul.lo.u32 %r6, %r6, %r3; mad.lo.u32 %r6, %r2, 1, %r6;
mul.wide.u32 %d3, %r6, 16; add.s64 %d4, %d1, %d3; add.s64 %d5, %d2, %d3; mul.wide.u32 %d6, %r4, 16; mov.u32 %r7, 0;
L: ld.global.v4.u32 {%r8, %r9, %r10, %r11}, [%d4]; st.global.v4.u32 [%d5], {%r8, %r9, %r10, %r11};
add.s64 %d4, %d4, %d6; add.s64 %d5, %d5, %d6; add.s32 %r7, %r7, 1; setp.lt.u32 %p, %r7, %r1; @%p bra L; ret;
}"""
)

CHAIN = (
    HEAD
    + """.visible .entry chain(.param .u64 out, .param .u32 trips) {
.reg .b32 %r<8>; .reg .f32 %f<4>; .reg .b64 %d<4>; .reg .pred %p;
ld.param.u32 %r1, [trips]; mov.u32 %r2, 0; mov.f32 %f1, 0f3F000000;
L: """
    + "fma.rn.f32 %f1, %f1, %f1, %f1; " * 64
    + """add.s32 %r2, %r2, 1; setp.lt.u32 %p, %r2, %r1; @%p bra L;
ld.param.u64 %d1, [out]; mov.u32 %r3, %tid.x; mul.wide.u32 %d2, %r3, 4; add.s64 %d3, %d1, %d2; st.global.f32 [%d3], %f1;
ret;
}"""
)

INDEPENDENT = CHAIN.replace("fma.rn.f32 %f1, %f1, %f1, %f1; " * 64, "".join(
    f"fma.rn.f32 %g{i}, %f1, %f1, %f1; " for i in range(64)
)).replace(".reg .f32 %f<4>;", ".reg .f32 %f<4>; .reg .f32 %g<64>;").replace("chain", "independent")  # fmt: skip


def special(instruction):
    """64 independent special functions a trip."""
    return (
        INDEPENDENT.replace("fma.rn.f32 %g", f"{instruction} %g")
        .replace(", %f1, %f1, %f1;", ", %f1;")
        .replace("independent", "special")
    )


def ring(stages, tile=4096, work=32):
    """One warp that brings tiles by bulk copies into a ring of ``stages``, and computes a while on each."""
    return (
        HEAD
        + f""".visible .entry ring(.param .u64 in, .param .u32 tiles) {{
.reg .b32 %r<20>; .reg .b64 %d<8>; .reg .f32 %f<4>; .reg .pred %p<8>;
.shared .align 128 .b8 data[{stages * tile}]; .shared .align 8 .b8 full[{stages * 8}];
ld.param.u64 %d1, [in]; ld.param.u32 %r1, [tiles]; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0;
mov.u32 %r3, data; mov.u32 %r4, full; mov.u32 %r5, 0; mov.f32 %f1, 0f3F000000;
mov.u32 %r14, %ctaid.x; mul.lo.u32 %r15, %r14, %r1; mul.wide.u32 %d5, %r15, {tile}; add.s64 %d1, %d1, %d5;
INIT: mad.lo.u32 %r6, %r5, 8, %r4; @%p1 mbarrier.init.shared.b64 [%r6], 1;
add.s32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, {stages}; @%p2 bra INIT;
bar.warp.sync -1; mov.u32 %r5, 0;
FILL: rem.u32 %r7, %r5, {stages}; mad.lo.u32 %r8, %r7, 8, %r4; mad.lo.u32 %r9, %r7, {tile}, %r3;
mul.wide.u32 %d2, %r5, {tile}; add.s64 %d3, %d1, %d2;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r8], {tile};
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%d3], {tile}, [%r8];
add.s32 %r5, %r5, 1; setp.lt.u32 %p3, %r5, {stages}; @%p3 bra FILL;
mov.u32 %r10, 0;
LOOP: rem.u32 %r7, %r10, {stages}; div.u32 %r11, %r10, {stages}; and.b32 %r12, %r11, 1;
mad.lo.u32 %r8, %r7, 8, %r4; mad.lo.u32 %r9, %r7, {tile}, %r3;
WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [%r8], %r12; @!%p4 bra WAIT;
"""
        + "fma.rn.f32 %f1, %f1, %f1, %f1; " * work
        + f"""
setp.ge.u32 %p5, %r5, %r1; @%p5 bra NEXT;
mul.wide.u32 %d2, %r5, {tile}; add.s64 %d3, %d1, %d2;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r8], {tile};
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%d3], {tile}, [%r8];
add.s32 %r5, %r5, 1;
NEXT: add.s32 %r10, %r10, 1; setp.lt.u32 %p6, %r10, %r1; @%p6 bra LOOP; ret;
}}"""
    )


BARRIER = (
    HEAD
    + """.visible .entry barrier(.param .u64 out) {
.reg .b32 %r<8>; .reg .f32 %f<4>; .reg .pred %p;
mov.u32 %r1, %tid.x; mov.f32 %f1, 0f3F000000; setp.ge.u32 %p, %r1, 32; @%p bra MEET;
"""
    + "fma.rn.f32 %f1, %f1, %f1, %f1; " * 200
    + """MEET: bar.sync 0; ret;
}"""
)


def bulk_stream(stages, tile):
    """One warp that keeps ``stages`` bulk copies of ``tile`` bytes on their way, and does nothing else."""
    init, fill, trip = "", "", ""
    for i in range(stages):
        init += f"@%p1 mbarrier.init.shared.b64 [%r4+{8 * i}], 1;\n"
        copy = f"""@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r4+{8 * i}], {tile};
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3+{i * tile}], [%d1], {tile}, [%r4+{8 * i}];
add.s64 %d1, %d1, {tile};
"""
        fill += copy
        trip += f"W{i}: mbarrier.try_wait.parity.shared.b64 %p4, [%r4+{8 * i}], %r5; @!%p4 bra W{i};\n" + copy
    return (
        HEAD
        + f""".visible .entry bulk_stream(.param .u64 in, .param .u32 trips) {{
.reg .b32 %r<8>; .reg .b64 %d<2>; .reg .pred %p<8>;
.shared .align 128 .b8 data[{stages * tile}]; .shared .align 8 .b8 full[{stages * 8}];
ld.param.u64 %d1, [in]; ld.param.u32 %r1, [trips]; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0;
mov.u32 %r3, data; mov.u32 %r4, full; mov.u32 %r5, 0; mov.u32 %r6, 0;
{init} bar.warp.sync -1;
{fill}
LOOP: {trip}
xor.b32 %r5, %r5, 1; add.s32 %r6, %r6, 1; setp.lt.u32 %p6, %r6, %r1; @%p6 bra LOOP;
{"".join(f"E{i}: mbarrier.try_wait.parity.shared.b64 %p4, [%r4+{8 * i}], %r5; @!%p4 bra E{i};" for i in range(stages))}
ret;
}}"""
    )


def async_stream(stages, threads):
    """Warps of which each thread keeps ``stages`` groups of one cp.async of 16 bytes on their way."""
    tile = 16 * threads
    copy = """cp.async.cg.shared.global [%r6], [%d2], 16; cp.async.commit_group; add.s64 %d2, %d2, STEP;
""".replace("STEP", str(tile))
    return (
        HEAD
        + f""".visible .entry async_stream(.param .u64 in, .param .u32 trips) {{
.reg .b32 %r<12>; .reg .b64 %d<4>; .reg .pred %p<4>; .shared .align 128 .b8 data[{tile}];
ld.param.u64 %d1, [in]; ld.param.u32 %r1, [trips]; mov.u32 %r2, %tid.x; mov.u32 %r3, data; shl.b32 %r4, %r2, 4;
add.s32 %r6, %r3, %r4; mul.wide.u32 %d3, %r2, 16; add.s64 %d2, %d1, %d3; mov.u32 %r5, 0;
{copy * stages}
LOOP: cp.async.wait_group {stages - 1}; {copy}
add.s32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, %r1; @%p1 bra LOOP;
cp.async.wait_group 0; ret;
}}"""
    )


def bulk_lanes(lanes):
    """One warp of which ``lanes`` lanes issue a bulk copy of 128 bytes each."""
    return (
        HEAD
        + f""".visible .entry bulk_lanes(.param .u64 in) {{
.reg .b32 %r<8>; .reg .b64 %d<4>; .reg .pred %p<4>;
.shared .align 128 .b8 data[4096]; .shared .align 8 .b8 full[8];
ld.param.u64 %d1, [in]; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0; setp.lt.u32 %p2, %r2, {lanes};
mov.u32 %r3, data; mov.u32 %r4, full; shl.b32 %r5, %r2, 7; add.s32 %r6, %r3, %r5; cvt.u64.u32 %d2, %r5;
add.s64 %d3, %d1, %d2; @%p1 mbarrier.init.shared.b64 [%r4], 1; bar.warp.sync -1;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r4], {lanes * 128};
@%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r6], [%d3], 128, [%r4];
W: mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 0; @!%p3 bra W; ret;
}}"""
    )


BARRIERS = (
    HEAD
    + """.visible .entry barriers(.param .u64 out) {
"""
    + "bar.sync 0; " * 100
    + """ret;
}"""
)

# stores, and a fence that waits for them
FENCE = (
    HEAD
    + """.visible .entry fence(.param .u64 out, .param .u32 stores) {
.reg .b32 %r<8>; .reg .b64 %d<4>; .reg .pred %p;
ld.param.u64 %d1, [out]; ld.param.u32 %r1, [stores]; mov.u32 %r2, %tid.x; mul.wide.u32 %d2, %r2, 16; mov.u32 %r3, 0;
add.s64 %d1, %d1, %d2; setp.ge.u32 %p, %r3, %r1; @%p bra F;
L: st.global.v4.u32 [%d1], {%r3, %r3, %r3, %r3}; add.s64 %d1, %d1, 512; add.s32 %r3, %r3, 1;
setp.lt.u32 %p, %r3, %r1; @%p bra L;
F: fence.acq_rel.gpu; ret;
}"""
)

# each load's address depends on the load before: a chain through all of the buffer's lines
CHASE = (
    HEAD
    + """.visible .entry chase(.param .u64 in, .param .u32 loads) {
.reg .b32 %r<8>; .reg .b64 %d<4>; .reg .pred %p;
ld.param.u64 %d1, [in]; ld.param.u32 %r1, [loads]; mov.u32 %r3, 0;
L: ld.global.cg.u32 %r2, [%d1]; cvt.u64.u32 %d2, %r2; add.s64 %d1, %d1, %d2; add.s64 %d1, %d1, 4096;
add.s32 %r3, %r3, 1; setp.lt.u32 %p, %r3, %r1; @%p bra L; ret;
}"""
)

EMPTY = HEAD + ".visible .entry empty(.param .u64 out) { ret; }"


def loop_of(instructions, trips):
    """A loop of so many dependent float32 operations, one after the other in the code."""
    return (
        HEAD
        + """.visible .entry loop_of(.param .u64 out) {
.reg .b32 %r<4>; .reg .f32 %f<4>; .reg .pred %p; mov.u32 %r1, 0; mov.f32 %f1, 0f3F000000;
L: """
        + "fma.rn.f32 %f1, %f1, %f1, %f1; " * instructions
        + f"add.s32 %r1, %r1, 1; setp.lt.u32 %p, %r1, {trips}; @%p bra L; ret;\n}}"
    )


def dependent(before, after, triggers=False):
    """A kernel of ``before`` and ``after`` dependent operations before and behind griddepcontrol.wait."""
    chain = "fma.rn.f32 %f1, %f1, %f1, %f1; "
    return (
        HEAD
        + ".visible .entry dependent(.param .u64 out) {\n.reg .f32 %f<4>; mov.f32 %f1, 0f3F000000;\n"
        + ("griddepcontrol.launch_dependents; " if triggers else "")
        + chain * before
        + "\ngriddepcontrol.wait;\n"
        + chain * after
        + "\nret;\n}"
    )

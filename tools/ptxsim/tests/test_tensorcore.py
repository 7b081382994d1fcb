"""Sums of tensor cores: results of GPUs bit for bit, what papers found, and bounds that follow from the figures."""

import json
from pathlib import Path

import numpy as np
import pytest

import ptxsim
from ptxsim import numerics as nm
from ptxsim import tensorcore
from ptxsim.arithmetic import TENSOR_SUMS, Arithmetic, TensorSum
from ptxsim.errors import UnsupportedInstruction

RESULTS = json.loads((Path(__file__).parent / "data" / "tensor_cores.json").read_text())["results"]
TARGETS = {"H100": "sm_90a", "B200": "sm_100a"}
HARDWARE = Arithmetic("hardware")


def values(text, kind):
    """Bits in hexadecimal -> float32."""
    raw = np.frombuffer(
        bytes.fromhex(text), {"e4m3": ">u1", "e5m2": ">u1", "f16": ">u2", "bf16": ">u2"}.get(kind, ">u4")
    )
    raw = raw.astype(raw.dtype.newbyteorder("="))
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return nm.bf16_to_f32(raw)
    return nm.fp8_to_f32(raw, kind) if kind in ("e4m3", "e5m2") else raw.view(np.float32)


def one(a, b, c=0.0, kind="f16", instruction="mma", half=False, target="sm_90a", arithmetic=HARDWARE):
    """c + a . b of one element of a result."""
    a, b = (np.asarray(x, np.float32).reshape(1, 1, -1) for x in (a, b))
    c = np.full((1, 1, 1), c, np.float16 if half else np.float32)
    return tensorcore.product(a, b, c, (kind, kind), arithmetic.tensor_sum(target, instruction, kind, half)).item()


def row(*terms, length=16):
    return np.array([*terms, *[0.0] * (length - len(terms))], np.float32)


ONES = np.ones(16, np.float32)


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32", "e4m3", "e5m2"])
def test_results_of_gpus_bit_for_bit(gpu, kind):
    rows = [r for r in RESULTS if r["gpu"] == gpu and r["kind"] == kind]
    assert rows
    for r in rows:
        c = values(r["c"], r["result"]).item()
        half = r["result"] == "f16"
        got = one(values(r["a"], kind), values(r["b"], kind), c, kind, r["instruction"], half, TARGETS[gpu])
        assert got == values(r["d"], r["result"]).item(), r


@pytest.mark.parametrize("change", [{"fraction": 24}, {"fraction": 26}, {"result": 22}])
def test_other_figures_miss_results_of_gpus(change, monkeypatch):
    monkeypatch.setitem(TENSOR_SUMS[("90", "mma")], ("f16", False), TensorSum(25)._replace(**change))
    with pytest.raises(AssertionError):
        test_results_of_gpus_bit_for_bit("H100", "f16")


def test_results_are_cut_not_rounded():
    assert one(row(1, 2**-12, 2**-12), row(1, 2**-12, 2**-12)) == 1 + 2.0**-23  # two halves of a last bit
    assert one(row(1, 2**-12, 2**-13), row(1, 2**-12, 2**-12)) == 1  # three quarters
    assert one(row(-1, -(2**-12), -(2**-13)), row(1, 2**-12, 2**-12)) == -1


def test_two_more_bits_than_float32_are_kept_of_addends():
    def small(exponent, count):
        return one(row(1, *[2.0**-12] * count), row(1, *[2.0 ** (exponent + 12)] * count))

    assert small(-25, 4) == 1 + 2.0**-23
    assert small(-26, 15) == 1  # each is lost, though they add up to almost 2^-22


def test_products_are_not_normalised_before_they_are_aligned():
    tiny = np.float32(2.0**-25)  # kept beside a product of exponent 0, whose value 2.25 has exponent 1
    assert one(row(1.5, -1.5, 1), row(1.5, 1.5, tiny), kind="bf16") == tiny
    assert one(row(2, -2, 1), row(1, 1, tiny), kind="bf16") == 0


def test_all_products_of_an_instruction_and_its_accumulator_are_added_at_once():
    large = 2.0**14
    assert one(row(large, *[0.5] * 14, -large), row(large, *ONES[:14], large)) == 0  # 0.5 is 2^-29 of the largest
    assert one(row(large, *[8] * 14, -large), row(large, *ONES[:14], large)) == 14 * 8
    assert one(row(1), row(1), c=2.0**26) == 2.0**26 + 0
    assert one(row(1, 2**14), row(1, -(2**12)), c=2.0**26) == 0


@pytest.mark.parametrize("kind,tiny", [("f16", 2.0**-24), ("bf16", 2.0**-133)])
def test_subnormal_numbers_count(kind, tiny):
    assert one(row(tiny), row(3), kind=kind) == np.float32(3 * tiny)
    assert one(row(0), row(0), c=2.0**-149, kind=kind) == np.float32(2.0**-149)


def test_float16_results_are_rounded_to_nearest_even():
    assert one(row(1, 2**-11), row(1, 1), half=True) == 1
    assert one(row(1, 2**-11, 2**-12), row(1, 1, 1), half=True) == 1 + 2.0**-10
    assert one(row(1, 2**-10, 2**-11), row(1, 1, 1), half=True) == 1 + 2.0**-9
    assert one(row(60000, 60000), row(1, 1), half=True) == np.inf


def test_wgmma_of_8_bit_floats_keeps_13_bits():
    def wgmma(a, b, c=0.0):
        return one(row(*a, length=32), row(*b, length=32), c, "e4m3", "wgmma")

    assert wgmma([1, 2**-6], [1, 2**-7]) == 1 + 2.0**-13
    assert wgmma([1, 2**-7], [1, 2**-7]) == 1
    assert wgmma([0], [0], c=1 + 2.0**-13 + 2.0**-14) == 1 + 2.0**-13  # the accumulator is cut, too


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_103a"])
def test_mma_of_8_bit_floats_is_two_of_float16_and_an_addition(target):
    def mma(a, b, c=0.0):
        return one(row(*a, length=32), row(*b, length=32), c, "e5m2", target=target)

    big, small = 2.0**15, 2.0**-4  # big products cancel before small is added only if they share an instruction
    assert mma([big, -big, small], [big, big, 1]) == small
    assert mma([big, small, -big], [big, 1, big]) == 0
    assert mma([1], [2.0**-14], c=1.0) == 1 + 2.0**-14
    assert mma([3], [2.0**-12], c=2.0**12) == 2.0**12 + 2.0**-10  # 0.75 * 2^-10 rounded up, where a cut gives nothing


def sample(rng, kind, rows=64, columns=8, length=16, spread=8):
    """Random values of a type, whose magnitudes differ."""

    def draw(*shape):
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
        x = x.astype(np.float32)
        if kind == "f16":
            return x.astype(np.float16).astype(np.float32)
        if kind == "bf16":
            return nm.bf16_to_f32(nm.f32_to_bf16(x))
        if kind == "tf32":
            return nm.round_tf32(x.view(np.uint32)).view(np.float32)
        return nm.fp8_to_f32(nm.f32_to_fp8(x, kind), kind)

    c = (rng.standard_normal((2, rows, columns)) * 2.0 ** rng.integers(-20, 21, (2, rows, columns))).astype(np.float32)
    return draw(2, rows, length), draw(2, columns, length), c


def true_sums(a, b, c):
    """Sums of products, and the largest addend, in float64."""
    products = a.astype(np.float64)[:, :, None] * b.astype(np.float64)[:, None]
    largest = np.maximum(np.abs(products).max(-1), np.abs(c))
    return products.sum(-1) + c, largest


@pytest.mark.parametrize("kind,length", [("f16", 16), ("bf16", 16), ("tf32", 8), ("e4m3", 32), ("e5m2", 32)])
def test_errors_stay_within_what_the_figures_say(kind, length, rng):
    """All addends but the largest lose less than a bit of `fraction`, the result less than one of `result`."""
    instruction = "wgmma" if length == 32 else "mma"
    a, b, c = sample(rng, kind, length=length)
    figures = HARDWARE.tensor_sum("sm_90a", instruction, kind, False)
    got = tensorcore.product(a, b, c, (kind, kind), figures)
    want, largest = true_sums(a, b, c)
    lost = np.abs(want - got) / ((length + 1) * 2.0**-figures.fraction * largest + 2.0**-figures.result * np.abs(want))
    assert 0.1 < lost.max() <= 1
    assert np.abs(got).mean(dtype=np.float64) < np.abs(want).mean()  # towards zero


def test_scale_cuts_earlier(rng):
    a, b, c = sample(rng, "f16")
    want, _ = true_sums(a, b, c)
    errors = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        figures = Arithmetic("hardware", scale=scale).tensor_sum("sm_90a", "mma", "f16", False)
        got = tensorcore.product(a, b, c, ("f16", "f16"), figures)
        errors.append(np.sqrt(np.mean((got / want - 1) ** 2)))
    assert errors[0] < errors[1] < errors[2] < errors[3]


def test_sums_alone_are_cut_earlier():
    documented, early = (Arithmetic("hardware", early=bits) for bits in (0, 2))
    figures = [each.tensor_sum("sm_90a", "mma", "f16", False) for each in (documented, early)]
    assert (figures[1].fraction, figures[1].result) == (figures[0].fraction - 2, figures[0].result - 2)
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    results = [each.approximation("ex2", "f32", np.exp2)(x) for each in (documented, early)]
    assert np.array_equal(*results) and not np.array_equal(results[0], np.exp2(x))


def test_bits_to_spare_leave_the_cut_of_the_sum_alone(rng):
    """With 28 bits of fraction and products of like size, nothing is lost but behind the result's last bit."""
    a, b, _ = sample(rng, "bf16", spread=0)
    a, b = np.abs(a) % 0.5 + 1, np.abs(b) % 0.5 + 1  # exponents of 0, products of 14 bits
    a, b = (nm.bf16_to_f32(nm.f32_to_bf16(x, "rz")) for x in (a, b))
    c = np.zeros((2, 64, 8), np.float32)
    want, _ = true_sums(a, b, c)
    got = tensorcore.product(a, b, c, ("bf16", "bf16"), TensorSum(28))
    assert np.array_equal(got, tensorcore.cut(want, 23))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_both_ways_to_compute_agree(kind, rng, monkeypatch):
    """float32 and int32 where they hold the products, else float64: the same bits."""
    length = 8 if kind == "tf32" else 16
    a, b, c = sample(rng, kind, length=length)
    c[0, :8], c[0, 8:16], a[1, 5:7] = 0, 2.0**-140, 0
    figures = HARDWARE.tensor_sum("sm_90a", "mma", kind, False)
    fast = tensorcore.product(a, b, c, (kind, kind), figures)
    called = []
    slow_path = tensorcore._in_float64
    monkeypatch.setattr(tensorcore, "_narrow", lambda exponent: False)
    monkeypatch.setattr(tensorcore, "_in_float64", lambda *args: called.append(1) or slow_path(*args))
    assert np.array_equal(tensorcore.product(a, b, c, (kind, kind), figures), fast) and called


def test_nan_and_infinity():
    assert np.isnan(one(row(np.inf, 1), row(0, 1)))
    assert np.isnan(one(row(np.inf, np.inf), row(1, -1)))
    assert one(row(np.inf, 1), row(-1, 5)) == -np.inf
    assert one(row(1), row(1), c=np.inf) == np.inf
    assert np.isnan(one(row(1), row(1), c=np.nan))
    assert one(row(2.0**127), row(2), kind="bf16") == np.inf
    a = np.ones((1, 2, 16), np.float32)
    a[0, 1] = np.nan
    c = np.zeros((1, 2, 1), np.float32)
    got = tensorcore.product(a, a[:, :1], c, ("f16", "f16"), TensorSum(25)).ravel()
    assert got[0] == 16 and got[1:].view(np.uint32) == 0x7FFFFFFF  # a NaN stays in its row


def test_unknown_instructions_are_refused():
    with pytest.raises(
        UnsupportedInstruction, match="no source tells how wgmma of sm_120a adds products of f16 to f32"
    ):
        HARDWARE.tensor_sum("sm_120a", "wgmma", "f16", False)
    assert Arithmetic("exact").tensor_sum("sm_120a", "mma", "f16", False) is None


# ------------------------------------------------------------------------------------------ in kernels
MMA = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd) {{
.reg .b32 %i, %a<4>, %b<2>, %c<4>; .reg .b64 %p, %q;
mov.u32 %i, %tid.x;
ld.param.u64 %p, [pa]; mad.wide.u32 %q, %i, 16, %p; ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%q];
ld.param.u64 %p, [pb]; mad.wide.u32 %q, %i, 8, %p; ld.global.v2.b32 {{%b0, %b1}}, [%q];
ld.param.u64 %p, [pc]; mad.wide.u32 %q, %i, 16, %p; ld.global.v4.b32 {{%c0, %c1, %c2, %c3}}, [%q];
mma.sync.aligned.{form} {{{c}}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{{c}}};
ld.param.u64 %p, [pd]; mad.wide.u32 %q, %i, 16, %p; st.global.v4.b32 [%q], {{%c0, %c1, %c2, %c3}};
ret;
}}"""
FORMS = {
    "f16": ("m16n8k16.row.col.f32.f16.f16.f32", 16, False),
    "f16 to f16": ("m16n8k16.row.col.f16.f16.f16.f16", 16, True),
    "bf16": ("m16n8k16.row.col.f32.bf16.bf16.f32", 16, False),
    "tf32": ("m16n8k8.row.col.f32.tf32.tf32.f32", 8, False),
    "e4m3": ("m16n8k32.row.col.f32.e4m3.e4m3.f32", 32, False),
    "e5m2 to f16": ("m16n8k32.row.col.f16.e5m2.e5m2.f16", 32, True),
    "s8": ("m16n8k32.row.col.s32.s8.s8.s32", 32, False),
}


def run_mma(name, arithmetic, warps=4):
    """Registers of the accumulator before and after, and the operands [warps, rows, K] of an instruction."""
    from ptxsim.isa.mma import a_fragment, b_fragment, c_fragment

    form, _, half = FORMS[name]
    kind, rng = name.split()[0], np.random.default_rng(5)
    small = {"e4m3": 0xBFBFBFBF, "e5m2": 0xBFBFBFBF, "f16": 0xBFFFBFFF, "bf16": 0xBFFFBFFF}.get(kind, 0xFFFFFFFF)
    a, b = (rng.integers(0, 2**32, (32 * warps, n), np.uint32) & np.uint32(small) for n in (4, 2))
    if kind == "tf32":
        a, b = (rng.standard_normal(x.shape, np.float32).view(np.uint32) for x in (a, b))
    c = rng.standard_normal((32 * warps, 4)).astype(np.float32).view(np.uint32)
    if half:
        c[:, :2] = rng.standard_normal((32 * warps, 4)).astype(np.float16).view(np.uint32)
    d = np.zeros_like(c)
    text = MMA.format(form=form, c="%c0, %c1" if half else "%c0, %c1, %c2, %c3")
    ptxsim.run(text, "k", 1, 32 * warps, [a, b, c, d], arithmetic=arithmetic)

    def accumulators(words):
        if half:
            words = np.ascontiguousarray(words[:, :2]).view(np.float16)
        elif kind != "s8":
            words = words.view(np.float32)
        return c_fragment([np.ascontiguousarray(words[:, i]) for i in range(4)])

    operands = a_fragment(list(np.ascontiguousarray(a.T)), kind), b_fragment(list(np.ascontiguousarray(b.T)), kind)
    return operands[0], operands[1].swapaxes(1, 2), accumulators(c), accumulators(d)


@pytest.mark.parametrize("name", FORMS)
def test_mma_of_a_kernel(name):
    a, b, c, got = run_mma(name, "hardware")
    exact = run_mma(name, "exact")[3]
    if name == "s8":
        assert np.array_equal(got, exact)
        return
    kind, half = name.split()[0], FORMS[name][2]
    figures = HARDWARE.tensor_sum("sm_90a", "mma", kind, half)
    assert np.array_equal(got, tensorcore.product(a, b, c, (kind, kind), figures))
    # cut at 25 bits, a sum rounded to 11 differs once in 10^4 times; products of such e4m3 add up without loss
    assert np.array_equal(got, exact) == (name in ("f16 to f16", "e4m3"))
    assert np.array_equal(run_mma(name, Arithmetic("hardware", scale=0.0))[3], exact)


WGMMA = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pd) {
.reg .b32 %i, %j, %a<8>, %w; .reg .f32 %d<4>; .reg .b64 %p, %q, %l; .reg .pred %t;
.shared .align 128 .b8 tile[512];
mov.u32 %i, %tid.x;
ld.param.u64 %p, [pa]; mad.wide.u32 %q, %i, 32, %p;
ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%q]; ld.global.v4.b32 {%a4, %a5, %a6, %a7}, [%q+16];
ld.param.u64 %p, [pb]; mad.wide.u32 %q, %i, 4, %p; ld.global.b32 %w, [%q];
mov.u32 %j, tile; shl.b32 %i, %i, 2; add.u32 %j, %j, %i; st.shared.b32 [%j], %w;
fence.proxy.async; bar.sync 0;
mov.u32 %j, tile; shr.u32 %j, %j, 4; or.b32 %j, %j, 0x00080000; cvt.u64.u32 %l, %j;
add.u64 %q, %l, 16;
setp.ne.u32 %t, 0, 1;
mov.f32 %d0, 0f3F800000; mov.f32 %d1, %d0; mov.f32 %d2, %d0; mov.f32 %d3, %d0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, %l, %t, 1, 1, 0;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, {%a4, %a5, %a6, %a7}, %q, %t, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mov.u32 %i, %tid.x;
ld.param.u64 %p, [pd]; mad.wide.u32 %q, %i, 16, %p; st.global.v4.f32 [%q], {%d0, %d1, %d2, %d3};
ret;
}"""


@pytest.mark.parametrize("mode", ["early", "late"])
def test_wgmma_of_a_kernel_adds_one_instruction_after_the_other(mode):
    from ptxsim.isa.mma import a_fragment
    from ptxsim.isa.wgmma import matrix

    rng = np.random.default_rng(3)
    a = rng.standard_normal((128, 16)).astype(np.float16)
    b = rng.standard_normal((4, 8, 8)).astype(np.float16)  # 16 bytes of K, then column, then element

    def run(**options):
        d = np.zeros((128, 4), np.float32)
        ptxsim.run(WGMMA, "k", 1, 128, [a, b, d], async_mode=mode, **options)
        return matrix(list(np.ascontiguousarray(d.T)), (1, 64, 8))

    registers = np.ascontiguousarray(a.view(np.uint32).T)
    figures = HARDWARE.tensor_sum("sm_90a", "wgmma", "f16", False)
    want, true = np.ones((1, 64, 8), np.float32), np.ones((1, 64, 8))
    for step in range(2):
        left = a_fragment(list(registers[4 * step : 4 * step + 4]), "f16").reshape(1, 64, 16)
        right = b[2 * step : 2 * step + 2].transpose(1, 0, 2).reshape(1, 8, 16).astype(np.float32)
        want = tensorcore.product(left, right, want, ("f16", "f16"), figures)
        true = true + left.astype(np.float64) @ right.swapaxes(1, 2)
    assert np.array_equal(run(arithmetic="hardware"), want)
    exact = run()
    assert not np.array_equal(exact, want)
    np.testing.assert_allclose(exact, true, rtol=1e-5, atol=1e-5)
    assert np.array_equal(run(arithmetic=Arithmetic("hardware", scale=0.0)), exact)

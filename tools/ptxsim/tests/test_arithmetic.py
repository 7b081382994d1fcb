"""Results of approximate functions: what the documents allow, always alike, and the exact ones where asked for."""

import numpy as np
import pytest

import ptxsim
from ptxsim import arithmetic
from ptxsim.arithmetic import APPROXIMATE, GRIDS, Arithmetic
from ptxsim.errors import UnsupportedInstruction

FORMS = {
    "ex2": "ex2.approx.f32 %d, %a;",
    "rcp": "rcp.approx.f32 %d, %a;",
    "sqrt": "sqrt.approx.f32 %d, %a;",
    "rsqrt": "rsqrt.approx.f32 %d, %a;",
    "lg2": "lg2.approx.f32 %d, %a;",
    "sin": "sin.approx.f32 %d, %a;",
    "cos": "cos.approx.f32 %d, %a;",
    "tanh": "tanh.approx.f32 %d, %a;",
    "div.full": "div.full.f32 %d, %b, %a;",
    "div.approx": "div.approx.f32 %d, %b, %a;",
}
TRUE = {
    "ex2": np.exp2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def run(body, a, b, out, **options):
    """Run an instruction of %a and %b that sets %d once per element."""
    result, each, size = np.zeros(len(a), out), a.dtype.itemsize, np.dtype(out).itemsize
    loads = "".join(
        f"ld.param.u64 %p, [p{n}]; mad.wide.u32 %q, %i, {each}, %p; ld.global.b{8 * each} %{n}, [%q];" for n in "ab"
    )
    text = f""".version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pd) {{
.reg .b32 %i, %j; .reg .b64 %p, %q; .reg .b{8 * each} %a, %b; .reg .b{8 * size} %d; .reg .pred %t;
mov.u32 %i, %tid.x; mov.u32 %j, %ctaid.x; mad.lo.u32 %i, %j, 256, %i;
setp.ge.u32 %t, %i, {len(a)};
@%t ret;
{loads}
{body}
ld.param.u64 %p, [pd]; mad.wide.u32 %q, %i, {size}, %p; st.global.b{8 * size} [%q], %d;
ret;
}}"""
    ptxsim.run(text, "k", -(-len(a) // 256), 256, [a, b, result], **options)
    return result


def operands(op, rng):
    """Numbers of all sizes that the function takes, and dividends."""
    a = np.ldexp(rng.uniform(1, 2, 20000), rng.integers(-40, 40, 20000)) * rng.choice([-1, 1], 20000)
    if op in ("ex2", "sin", "cos", "tanh"):
        a = rng.uniform(-6, 6, 20000)
    elif op in ("sqrt", "rsqrt", "lg2"):
        a = np.concatenate([np.abs(a[:10000]), rng.uniform(0.4, 2.2, 10000)])
    return a.astype(np.float32), rng.normal(size=20000).astype(np.float32)


def errors(op, got, a, b):
    """Errors of results, in units of the documented bound."""
    x = a.astype(np.float64)
    want = b / x if op.startswith("div") else TRUE[op](x)
    near = want.astype(np.float32)
    out = np.zeros(len(a))
    for kind, size, _, low, high in APPROXIMATE[op, "f32"]:
        unit = {
            "ulp": np.spacing(np.abs(want).astype(np.float32)).astype(np.float64),
            "rounded": np.spacing(np.abs(near)).astype(np.float64),
            "relative": np.abs(want),
            "absolute": 1.0,
        }[kind]
        here = (np.abs(x) >= low) & (np.abs(x) < high)
        if size:
            out = np.where(here, (got - (near if kind == "rounded" else want)) / (size * unit), out)
    return out


@pytest.mark.parametrize("op", FORMS)
def test_errors_fill_the_documented_range(op, rng):
    a, b = operands(op, rng)
    found = errors(op, run(FORMS[op], a, b, out="f4", arithmetic="hardware").astype(np.float64), a, b)
    assert np.abs(found).max() <= 1 + 1e-9
    assert found.min() < -0.9 and found.max() > 0.9
    assert np.abs(found.mean()) < 0.02 and np.std(found) > 0.5


@pytest.mark.parametrize("op", FORMS)
def test_errors_lean_to_one_end(op, rng):
    a, b = operands(op, rng)
    for lean, sign in (("low", -1), ("high", 1)):
        found = sign * errors(op, run(FORMS[op], a, b, out="f4", arithmetic=Arithmetic("hardware", lean=lean)), a, b)
        assert found.max() <= 1 + 1e-9 and found.min() > -0.5 and found.mean() > 0.4


@pytest.mark.parametrize("op", FORMS)
def test_no_error_is_exact(op, rng):
    a, b = operands(op, rng)
    exact = run(FORMS[op], a, b, out="f4")
    assert np.array_equal(run(FORMS[op], a, b, out="f4", arithmetic=Arithmetic("hardware", scale=0.0)), exact)
    assert not np.array_equal(run(FORMS[op], a, b, out="f4", arithmetic="hardware"), exact)


def test_equal_operands_give_equal_results(rng):
    """In any lane and order; another seed gives others."""
    a = rng.uniform(-6, 6, 4000).astype(np.float32)
    order = rng.permutation(len(a))
    hardware, again = (run(FORMS["ex2"], x, x, out="f4", arithmetic="hardware") for x in (a, a[order]))
    assert np.array_equal(again, hardware[order])
    assert not np.array_equal(run(FORMS["ex2"], a, a, out="f4", arithmetic=Arithmetic("hardware", seed=1)), hardware)


@pytest.mark.parametrize("op", FORMS)
def test_special_operands_have_the_results_of_the_tables(op):
    a = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    b = np.ones_like(a)
    exact, hardware = (run(FORMS[op], a, b, out="f4", arithmetic=name) for name in ("exact", "hardware"))
    np.testing.assert_array_equal(hardware, exact)
    assert np.array_equal(np.signbit(hardware[:4]), np.signbit(exact[:4]))


def test_results_keep_their_sign_and_stay_finite():
    a = np.array([-140.0, -149.6, 127.99999, -184.7], np.float32)
    for lean in ("low", "high"):
        found = run(FORMS["ex2"], a, a, out="f4", arithmetic=Arithmetic("hardware", lean=lean))
        assert (found >= 0).all() and np.isfinite(found).all()
        assert found[3] == (2.0**-148 if lean == "high" else 0)  # two steps from zero
    flushed = run("ex2.approx.ftz.f32 %d, %a;", a, a, out="f4", arithmetic=Arithmetic("hardware", lean="high"))
    assert not flushed[[0, 1, 3]].any() and flushed[2] > 0


def test_large_divisors_of_an_approximate_division():
    a, b = np.array([2.0**127, -(2.0**127), 2.0**127], np.float32), np.array([1, 1, np.inf], np.float32)
    found = run(FORMS["div.approx"], a, b, out="f4", arithmetic="hardware")
    assert found[0] == 0 and found[1] == 0 and np.signbit(found[1]) and np.isnan(found[2])
    assert run(FORMS["div.full"], a, b, out="f4", arithmetic="hardware")[0] > 0


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_halves(name, rng):
    x = rng.uniform(-6, 6, 4000).astype(np.float32)
    grid = GRIDS[name]
    x = arithmetic.rounded(x.astype(np.float64), grid)
    ((kind, size, *_),) = APPROXIMATE["ex2", name]
    found = Arithmetic("hardware").approximation("ex2", name, np.exp2)(x)
    relative = found / np.exp2(x.astype(np.float64)) - 1
    assert kind == "relative" and np.abs(relative).max() <= size < 1.3 * np.abs(relative).max()
    assert np.array_equal(arithmetic.rounded(found.astype(np.float64), grid), found)
    bits = (x.view(np.uint32) >> 16 if name == "bf16" else x.astype(np.float16).view(np.uint16)).astype(np.uint16)
    body = f"ex2.approx{'.ftz' * (name == 'bf16')}.{name} %d, %a;"
    out = run(body, bits, bits, out="u2", arithmetic="hardware")
    wide = (out.astype(np.uint32) << 16).view(np.float32) if name == "bf16" else out.view(np.float16).astype(np.float32)
    assert np.array_equal(wide, found)


def test_what_no_document_describes_is_refused():
    a = np.ones(32)
    with pytest.raises(UnsupportedInstruction, match=r"no error of rcp\.approx\.f64 is documented"):
        run("rcp.approx.ftz.f64 %d, %a;", a, a, out="f8", arithmetic="hardware")
    assert np.array_equal(run("rcp.rn.f64 %d, %a;", a, a, out="f8", arithmetic="hardware"), a)


@pytest.mark.parametrize("bad", [{"name": "fast"}, {"lean": "left"}, {"scale": -1.0}])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be"):
        Arithmetic(**{"name": "hardware", **bad})

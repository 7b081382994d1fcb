"""Terms of the bounds for approximate functions: they hold for all documented errors, and for no larger ones."""

from __future__ import annotations

from pathlib import Path

import approximations
import kernel_backends
import pytest
import scan_cases
import step_cases
import torch

pytest.importorskip("cutlass")

import ptxsim
from ptxsim.arithmetic import EXACT, HARDWARE, Arithmetic

pytest_plugins = "pytester"
CONFTEST = Path(__file__).parents[1] / "conftest.py"
CASES = {
    "scan": (scan_cases, scan_cases.Case(io="f32", decay="slow", lengths=(16,) * 2, dim=64, nulls=())),
    "step": (step_cases, step_cases.Case(io="f32", state="f32", nheads=2, softplus=False, decay="slow")),
}
ALLOWED = [Arithmetic("hardware", seed=1), Arithmetic("hardware", lean="low"), Arithmetic("hardware", lean="high")]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arithmetic", ALLOWED, ids=["other errors", "all low", "all high"])
def test_bounds_hold_for_all_errors_that_are_documented(name, arithmetic):
    cases, case = CASES[name]
    with kernel_backends.kernel(arithmetic=arithmetic):
        cases.verify(case)


@pytest.mark.parametrize("name", CASES)
def test_larger_errors_exceed_the_bounds(name):
    cases, case = CASES[name]
    with kernel_backends.kernel(arithmetic=Arithmetic("hardware", scale=3.0, lean="high")):
        with pytest.raises(AssertionError, match="exceeds"):
            cases.verify(case)


@pytest.mark.parametrize("name", CASES)
def test_errors_of_zero_change_no_bit(name):
    cases, case = CASES[name]
    results = []
    for arithmetic in (EXACT, Arithmetic("hardware", scale=0.0), HARDWARE):
        with kernel_backends.kernel(arithmetic=arithmetic):
            _, out = cases.verify(case)
            results.append(out.clone())
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())
    assert not torch.equal(results[0].nan_to_num(), results[2].nan_to_num())


def test_terms_are_those_of_the_arithmetic_in_use():
    assert not approximations.in_use().any()
    with ptxsim.emulate():
        assert not approximations.in_use().any()
    with ptxsim.emulate(arithmetic="hardware"):
        assert approximations.in_use() == approximations.Errors(ex2=2.0**-22, rcp=2.0**-23)


CONFIG = """[pytest]
markers =
    slow: long
    wide: many
    gpu: needs a GPU
    thin: slice
    accuracy: in both
"""
TESTS = """
import kernel_backends, pytest

def test_kernel(backend):
    with backend() as session:
        assert session.options.arithmetic.name == "exact"

@kernel_backends.both
def test_both(backend):
    assert kernel_backends.arithmetic == "exact"

@pytest.mark.accuracy
def test_marked():
    assert kernel_backends.arithmetic == "exact"

def test_without():
    pass

@pytest.mark.accuracy
@pytest.mark.parametrize("n", range(5))
def test_cases(n):
    pass
"""


def test_the_option_selects_what_depends_on_it(pytester):
    pytester.makeini(CONFIG)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_some=TESTS)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=10)
    result = pytester.runpytest_inprocess("--arithmetic", "hardware", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=3, passed=5, deselected=2)
    assert "pytest test_some.py::test_kernel --arithmetic hardware" in result.outlines

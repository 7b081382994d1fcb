"""A plain run takes a slice of the cases of a test marked `thin`: every n-th, and the first of each value."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = "pytester"
CONFTEST = Path(__file__).parents[1] / "conftest.py"
CONFIG = """[pytest]
addopts = -m "not slow and not wide"
markers =
    slow: long
    wide: many
    gpu: needs a GPU
    thin: slice
"""
TESTS = """
import dataclasses, pytest

@dataclasses.dataclass
class Case:
    dim: int = 8
    state: str = "f32"

    def __str__(self):
        return f"{self.dim}-{self.state}"

SLOW = pytest.param(Case(7), marks=pytest.mark.slow)
CASES = [Case(), Case(1), Case(2), Case(3, "f16"), Case(4), Case(5, "f16"), Case(6), SLOW]

@pytest.mark.thin(4, "state")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fields_of_a_case(case):
    pass

@pytest.mark.thin(3)
@pytest.mark.parametrize("n", range(5))
def test_every_third(n):
    pass

@pytest.mark.thin(4, "arch")
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("n", range(2))
def test_parameters(n, arch):
    pass

def test_other():
    pass
"""
DEFAULT = {
    "test_fields_of_a_case[8-f32]",
    "test_fields_of_a_case[3-f16]",
    "test_fields_of_a_case[4-f32]",
    "test_every_third[0]",
    "test_every_third[3]",
    "test_parameters[0-sm_90a]",
    "test_parameters[0-sm_100a]",
    "test_other",
}
WIDE = {
    "test_fields_of_a_case[1-f32]",
    "test_fields_of_a_case[2-f32]",
    "test_fields_of_a_case[5-f16]",
    "test_fields_of_a_case[6-f32]",
    "test_every_third[1]",
    "test_every_third[2]",
    "test_every_third[4]",
    "test_parameters[1-sm_90a]",
    "test_parameters[1-sm_100a]",
}
SLOW = {"test_fields_of_a_case[7-f32]"}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [([], DEFAULT), (["-m", "wide"], WIDE), (["-m", "slow"], SLOW), (["-m", ""], DEFAULT | WIDE | SLOW)],
    ids=["default", "wide", "slow", "all"],
)
def test_each_case_is_in_one_tier(pytester, options, chosen):
    pytester.makeini(CONFIG)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_some=TESTS)
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:cacheprovider", *options)
    assert {line.partition("::")[2] for line in result.outlines if "::" in line} == chosen

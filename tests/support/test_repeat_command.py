"""Each failing test says which command repeats it, and that command does."""

from __future__ import annotations

import shlex
from pathlib import Path

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
import pytest

@pytest.mark.parametrize("case", ["a", "it's dim=8 [x]"])
def test_fails(case):
    assert case == "a"

@pytest.mark.slow
def test_slow():
    assert False

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.wide
def test_wide(broken):
    pass
"""


def commands(output: list[str]) -> list[str]:
    return [output[i + 1] for i, line in enumerate(output) if "- repeat with -" in line]


def test_every_failure_names_a_command_that_repeats_it(pytester):
    pytester.makeini(CONFIG)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_some=TESTS)
    result = pytester.runpytest_inprocess("-m", "", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=2, errors=1)
    found = commands(result.outlines)
    assert sorted(found) == [
        r"""pytest 'test_some.py::test_fails[it'"'"'s dim=8 [x]]'""",
        "pytest test_some.py::test_slow -m slow",
        "pytest test_some.py::test_wide -m wide",
    ]
    for command in found:
        repeated = pytester.runpytest_inprocess(*shlex.split(command)[1:], "-p", "no:cacheprovider")
        assert sum(repeated.parseoutcomes().get(kind, 0) for kind in ("failed", "errors")) == 1
        assert commands(repeated.outlines) == [command]


def test_the_command_goes_to_the_gpu_if_the_run_did(pytester):
    pytester.makeini(CONFIG)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_some="def test_fails():\n    assert False\n")
    result = pytester.runpytest_inprocess("--gpu", "-p", "no:cacheprovider")
    assert commands(result.outlines) == ["pytest test_some.py::test_fails --gpu"]

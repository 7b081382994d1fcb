"""Seeded faults: all apply to the code as it is and name tests that exist; under `slow`, those tests catch them."""

from __future__ import annotations

import ast
import functools
import re

import faults
import pytest

from cute_ssm.ops import OPERATORS

ALL = [(area, fault) for area, found in faults.catalogue().items() for fault in found]


@functools.cache
def functions(path):
    """Names of the tests of a file, with those of their classes."""
    tree = ast.parse((faults.ROOT / path).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("area", "fault"), ALL, ids=[f"{area}: {fault.name}" for area, fault in ALL])
def test_a_fault_applies_and_its_tests_exist(area, fault):
    """A text that is no longer there, or twice, is an error here, long before the faults are run."""
    text = faults.changed(fault, (faults.ROOT / fault.file).read_text(encoding="utf-8"))
    if fault.file.endswith(".py"):
        ast.parse(text)
    assert fault.tests
    for test in fault.tests:
        path, _, name = test.partition("::")
        assert re.sub(r"\[.*", "", name) in functions(path), f"{path} has no {name}"


def test_faults_have_names_of_their_own_and_lie_in_all_parts():
    names = [f"{area}: {fault.name}" for area, fault in ALL]
    assert len(set(names)) == len(names) >= 60
    files = [fault.file.split("/") for _, fault in ALL if fault.file.startswith("cute_ssm/")]
    assert {parts[1] for parts in files} >= {"device", "ops", "serving", "runtime", "tuning", "tuner", "compat"}
    assert {parts[2] for parts in files if parts[1] == "ops"} >= set(OPERATORS) - {"materialize"}


@pytest.mark.parametrize(
    ("old", "after", "message"),
    [
        ("absent", "", "has 0 times, not once, 'absent'"),
        ("twice", "", "has 2 times, not once, 'twice'"),
        ("twice", "nowhere", "has no 'nowhere'"),
    ],
)
def test_a_fault_that_does_not_apply_is_named(old, after, message):
    fault = faults.Fault("some fault", "some/file.py", old, "new", (), after)
    with pytest.raises(faults.Applied, match=f"some fault: some/file.py {message}"):
        faults.changed(fault, "once twice then twice")


def test_an_anchor_chooses_the_place():
    fault = faults.Fault("some fault", "some/file.py", "twice", "new", (), "then")
    assert faults.changed(fault, "once twice then twice, twice") == "once twice then new, twice"


@pytest.mark.slow
def test_faults_are_caught(capsys):
    assert faults.main(["--jobs", "2"]) == 0, capsys.readouterr().out

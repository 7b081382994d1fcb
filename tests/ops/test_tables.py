"""The argument table of every operator and the kernel that it feeds name the same tensors."""

from __future__ import annotations

import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest

from cute_ssm.ops import operators
from cute_ssm.ops._operator import Operator
from cute_ssm.ops._table import Table


def table_of(operator: Operator) -> Table | None:
    """The table of an operator: in its arguments.py, or in operator.py where it has no such file."""
    name = "arguments" if importlib.util.find_spec(f"{operator.package}.arguments") else "operator"
    return getattr(operator.module(name), "TABLE", None)


def groups(kernel: ModuleType) -> dict[str, Any]:
    """The NamedTuples of tensors that a kernel passes to its parts."""
    found = {name: value for name, value in vars(kernel).items() if name.endswith("Tensors")}
    return {name: value for name, value in found.items() if hasattr(value, "_fields")}


@pytest.mark.parametrize("operator", [found for found in operators() if table_of(found)], ids=lambda o: o.name)
def test_table_entry_and_groups_name_the_same_tensors_in_the_same_order(operator):
    names = list(table_of(operator).tensors)
    kernel = operator.module("kernel")
    entry = inspect.signature(getattr(kernel, operator.kernel).__call__)
    assert list(entry.parameters)[1 : len(names) + 1] == names
    for group, fields in groups(kernel).items():
        tensors = [name for name in fields._fields if name in names]
        assert tensors == [name for name in names if name in tensors], group
        unknown = {name for name, kind in fields.__annotations__.items() if "Tensor" in str(kind)}
        unknown -= {*entry.parameters}  # an operator may add tensors of its own, such as scratch, behind the others
        assert not unknown, group

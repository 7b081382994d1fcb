"""The comparison that tests share."""

from __future__ import annotations

import re

import pytest
import torch
from bits import each_same_bits, equal, same_bits, same_memory


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, bool]
)
def test_the_first_difference_is_told(dtype):
    want = torch.zeros(3, 4).to(torch.bool if dtype is bool else dtype)
    got = want.clone()
    same_bits(got, want)
    got[1, 3] = got[2, 0] = 1
    with pytest.raises(
        AssertionError, match=r"^out: 2 of 12 differ, first at \[1, 3\]: got (1|1\.0|True), wanted (0|0\.0|False)$"
    ):
        same_bits(got, want, "out")


def test_bits_are_compared_not_values():
    same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match=re.escape("1 of 1 differ, first at [0]: got -0.0, wanted 0.0")):
        same_bits(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_other_types_and_shapes_differ():
    with pytest.raises(AssertionError, match=r"torch.float32 \(2,\), wanted torch.float16 \(2,\)"):
        same_bits(torch.zeros(2), torch.zeros(2).half())
    with pytest.raises(AssertionError, match=r"\(2,\), wanted torch.float32 \(1,\)"):
        same_bits(torch.zeros(2), torch.zeros(1))


def test_each_tensor_is_named():
    with pytest.raises(AssertionError, match="changed: b: 1 of 1 differ"):
        each_same_bits({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.zeros(1)}, "changed")
    with pytest.raises(AssertionError, match=r"^1: 1 of 1 differ"):
        each_same_bits([torch.ones(1), torch.ones(1)], [torch.ones(1), torch.zeros(1)])


def test_values_are_compared_not_bits():
    equal(torch.tensor([-0.0]), torch.tensor([0.0]))
    equal(torch.ones(2).bfloat16(), torch.ones(2))
    with pytest.raises(AssertionError, match=re.escape("y: 1 of 2 differ, first at [1]: got nan, wanted nan")):
        equal(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), "y")


def test_memory_is_compared_between_elements_too():
    got, want = torch.zeros(4), torch.zeros(4)
    same_memory(got[::2], want[::2])
    got[2] = 1
    with pytest.raises(AssertionError, match=re.escape("x: 1 of 2 differ, first at [1]: got 1.0, wanted 0.0")):
        same_memory(got[::2], want[::2], "x")
    got[2], got[1] = 0, 1
    with pytest.raises(
        AssertionError, match=r"x: the elements agree, but 2 of 16 bytes of memory differ, first at byte"
    ):
        same_memory(got[::2], want[::2], "x")
    with pytest.raises(AssertionError, match=r"x: 8 bytes of memory, wanted 16"):
        same_memory(torch.zeros(2), want[::2], "x")
